"""What the local objective costs: its forward and backward beside those of its whole stage."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.meter_machine import describe_machine
from scpl_ds.partition.anatomy import analyze, model_class
from scpl_ds.partition.config import load_config
from scpl_ds.partition.matrices import matrices_of
from scpl_ds.partition.stage_module import stage_from_model
from scpl_ds.problems import problems_of
from scpl_ds.recipe_scpl import ObjectiveChoice
from scpl_ds.stage import LocalStage, as_body

_WARM_UP = 5
_DESCRIBED: dict[str, dict[str, Any]] = {
    "sequence-classification": {"model_type": "bert", "feedforward": 4},
    "causal-lm": {"model_type": "llama", "feedforward": 8 / 3},
}
"""The architecture of each task; ``feedforward`` is a multiple of the hidden size."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A BERT, or a Llama, with random weights, of which the first half is the stage."""

    task: str = "sequence-classification"
    hidden_size: int = 256
    layers: int = 8
    sequence_length: int = 64
    vocab_size: int = 4096


def measure(
    micro_batches: Sequence[int] = (4, 8, 32),
    *,
    size: Size = Size(),
    objectives: Sequence[Any] = ("supcon",),
    repeats: int = 30,
    threads: int = 1,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Time the first of two stages with its local objective, one row a micro-batch size and
    objective.

    The stage, its layers alone and its objective alone take turns, so that whatever else the
    machine does hits all three; each figure is a median. The layers alone go backward from a
    gradient of random numbers. The objective alone runs right after the layers, with cold caches,
    so its share is rather too high.

    Args:
        micro_batches: Rows.
        size: Of the model.
        objectives: As ``scpl.objective`` takes them.
        repeats: Timings of each, after 5 that are thrown away, or one fewer than are kept.
        threads: CPU threads; set back afterwards.
        device: Where to run.

    Returns:
        Rows with ``objective, hidden_size, layers`` (of the stage), ``sequence_length, micro_batch,
        threads, device, stage_s, layers_s, head_s, head_share`` (head_s / stage_s).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = []
            for choice in [_choice(asked) for asked in objectives]:
                stage = _stage(size, choice).to(device).train()
                own = [_row(stage, size, rows, repeats) for rows in micro_batches]
                found += [{"objective": choice.name, **row} for row in own]
            return found
    finally:
        torch.set_num_threads(before)


def main(args: argparse.Namespace, save: Callable[[Any], None]) -> str:
    """The command: the table."""
    size = Size(args.task, args.hidden_size, args.layers, args.seq, args.vocab)
    default = ("logit_lens",) if args.task == "causal-lm" else ("supcon",)
    rows = measure(
        args.micro_batches, size=size, objectives=args.objectives or default, repeats=args.repeats
    )
    save({"machine": describe_machine() | {"threads": 1}, "rows": rows})
    return render(rows)


def _choice(asked: Any) -> ObjectiveChoice:
    try:
        return ObjectiveChoice.model_validate(asked)
    except pydantic.ValidationError as error:
        found = problems_of(error, ObjectiveChoice)
        raise RecipeError(f"--objectives: {'; '.join(p.message for p in found)}") from None


def _stage(size: Size, choice: ObjectiveChoice) -> LocalStage:
    shape = _DESCRIBED[size.task]
    heads = max(size.hidden_size // 64, 1)
    described = {
        "model_type": shape["model_type"],
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": round(shape["feedforward"] * size.hidden_size),
        "vocab_size": size.vocab_size,
        "max_position_embeddings": max(size.sequence_length, 512),
        "pad_token_id": 0,
    }
    with tempfile.TemporaryDirectory(prefix="scpl-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(described))
        config = load_config(folder, num_labels=2)
    model = model_class(config, size.task)._from_config(config)
    body = stage_from_model(model, analyze(model), 0, size.layers // 2)
    head = choice.build(
        hidden_size=size.hidden_size,
        num_labels=2,
        matrices=functools.partial(matrices_of, model),
    )
    return LocalStage(as_body(body), head, detach_features=False)


def _row(stage: LocalStage, size: Size, rows: int, repeats: int) -> dict[str, Any]:
    device = next(stage.parameters()).device
    shape = (rows, size.sequence_length)
    ids = torch.randint(1, size.vocab_size, shape, device=device)
    labels = torch.randint(0, 2, (rows,), device=device) if size.task != "causal-lm" else ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    hidden = torch.randn(*shape, size.hidden_size, device=device)
    gradient = torch.randn_like(hidden)
    objective = stage.objective
    assert objective is not None

    def whole() -> None:
        stage(inputs)["loss"].backward()

    def layers() -> None:
        stage.body(inputs, None).hidden_states.backward(gradient)

    def head() -> None:
        leaf = hidden.detach().requires_grad_()
        objective(
            leaf, attention_mask=inputs["attention_mask"], labels=inputs["labels"]
        ).loss.backward()

    parts = (whole, layers, head)
    seconds: list[list[float]] = [[] for _ in parts]
    warm_up = min(_WARM_UP, repeats - 1)
    for _ in range(warm_up + repeats):
        for part, taken in zip(parts, seconds, strict=True):
            stage.zero_grad(set_to_none=True)
            taken.append(_seconds(part, gradient))
    stage_s, layers_s, head_s = (statistics.median(taken[warm_up:]) for taken in seconds)
    return {
        "hidden_size": size.hidden_size,
        "layers": size.layers // 2,
        "sequence_length": size.sequence_length,
        "micro_batch": rows,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "stage_s": stage_s,
        "layers_s": layers_s,
        "head_s": head_s,
        "head_share": head_s / stage_s,
    }


def _seconds(work: Callable[[], None], tensor: Tensor) -> float:
    """Until the device of ``tensor`` has done it."""
    wait = torch.cuda.synchronize if tensor.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, in milliseconds."""
    lines = [
        "| objective | hidden size | layers | micro-batch | stage, ms | layers alone, ms "
        "| head alone, ms | head's share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["objective"], row["hidden_size"], row["layers"],
            f"{row['micro_batch']} x {row['sequence_length']}",
            *(f"{1e3 * row[key]:.2f}" for key in ("stage_s", "layers_s", "head_s")),
            f"{row['head_share']:.1%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
