"""``scpl-ds bench memory``: measured beside predicted memory of every rank, a row a system.

Each row trains a few steps in processes of its own, started as a user would (``torch.distributed.
run``), from a checkpoint with random weights in a temporary folder. Backprop is the same engine
with one stage: the task loss through all layers, equal to a plain loop to the bit (tests/parity).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scpl_ds.errors import RecipeError, ScplError
from scpl_ds.partition.random_model import write_random_model
from scpl_ds.sharding._base import DTYPES

log = logging.getLogger(__name__)
MIB = 2**20
_LIMIT_S = 3600


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a system, its stages, its ranks, its ZeRO stage."""

    system: str
    """``bp``, ``bp-checkpointing`` or ``scpl``."""
    stages: int = 1
    pipeline_ranks: int = 1
    dp_size: int = 1
    sharding: str = "none"
    zero_stage: int = 0
    deepspeed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """More of the ``deepspeed`` section, merged into it."""
    lora: Mapping[str, Any] | None = None
    """``model.lora``."""

    @property
    def ranks(self) -> int:
        return self.pipeline_ranks * self.dp_size


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is trained: a model of ``partition.random_model`` and one micro-batch."""

    model: str
    micro_batch: int
    sequence_length: int
    steps: int = 3
    weights: str = "fp32"
    """Of the checkpoint."""


STANDARD = (
    Case("bp"),
    Case("bp-checkpointing"),
    *(Case("scpl", stages=k) for k in (2, 4, 8)),
    *(Case("scpl", 2, 2, 2, "deepspeed", z) for z in (0, 1, 2, 3)),
    *(Case("scpl", 2, 2, 2, "fsdp", z) for z in (2, 3)),
)
"""One rank, and 2 pipeline x 2 data-parallel ranks, on a model of about 120 M parameters."""

_BF16 = {"bf16": {"enabled": True}}
_OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}

LARGE = (Case("scpl", 4, 2, 1, "deepspeed", 2, {**_BF16, **_OFFLOAD}),)
"""A Llama of about 0.7 B parameters in bf16: 4 stages on 2 ranks, optimizer offloaded."""

GPU = (
    Case("bp", 1, 1, 1, "deepspeed", 1, _BF16),
    Case("bp-checkpointing", 1, 1, 1, "deepspeed", 1, _BF16),
    *(Case("scpl", k, 1, 1, "deepspeed", 1, _BF16) for k in (2, 4, 8)),
)
"""A Llama of about 1.5 B parameters in bf16 on one GPU."""

SUITES: dict[str, tuple[tuple[Case, ...], Shape]] = {
    "standard": (STANDARD, Shape("gpt2-124m", micro_batch=8, sequence_length=128)),
    "large": (LARGE, Shape("llama-0.7b", 1, 128, weights="bf16")),
    "gpu": (GPU, Shape("llama-1.5b", 2, 2048, steps=5, weights="bf16")),
}


def run(
    suite: str,
    *,
    cases: Sequence[Case] | None = None,
    shape: Shape | None = None,
    on_row: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure a suite, one row a case; progress goes to the log.

    Args:
        suite: Of ``SUITES``.
        cases: Others than the suite's.
        shape: Another than the suite's.
        on_row: Called with all rows so far after each case, so that a later failure loses none.

    Returns:
        Rows with ``system, stages, ranks, zero_stage, sharding, parameter_bytes,
        activation_and_gradient_bytes, peak_bytes, predicted_peak_bytes`` of the rank that needs the
        most, and ``per_rank`` with the same of every rank.

    Raises:
        RecipeError: The suite needs a GPU and there is none.
        ScplError: A process failed, and the message ends with what it said; or it took too long.
    """
    if suite == "gpu" and not torch.cuda.is_available():
        raise RecipeError(
            "--suite gpu trains 1.5 B parameters on a CUDA device and torch finds none here; use "
            "--suite standard or large, or a machine with a GPU."
        )
    default_cases, default_shape = SUITES[suite]
    rows = []
    with tempfile.TemporaryDirectory(prefix="scpl-bench-") as folder:
        shape = shape or default_shape
        model = Path(folder) / "model"
        write_random_model(shape.model, model, dtype=DTYPES[shape.weights])
        for case in cases or default_cases:
            rows.append(_row(case, _measure(case, shape, model, Path(folder))))
            log.info("%s", render(rows[-1:]).splitlines()[-1])
            if on_row is not None:
                on_row(rows)
    return rows


def main(args: argparse.Namespace, save: Callable[[Any], None]) -> str:
    """``scpl-ds bench memory``."""
    return render(run(args.suite, on_row=save))


def recipe_of(case: Case, shape: Shape, model: Path) -> dict[str, Any]:
    """The recipe that a case trains, as plain data."""
    deepspeed: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": shape.micro_batch,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": {"stage": case.zero_stage},
        **case.deepspeed,
    }
    return {
        "model": {"name_or_path": str(model), "num_labels": 2, "lora": case.lora},
        "scpl": {
            "stages": case.stages,
            "pipeline_ranks": case.pipeline_ranks,
            "sharding": case.sharding,
        },
        "deepspeed": deepspeed,
        "data": {"name": "demo", "max_length": shape.sequence_length},
        "train": {
            "max_steps": shape.steps,
            "gradient_checkpointing": case.system == "bp-checkpointing",
        },
    }


def _measure(case: Case, shape: Shape, model: Path, folder: Path) -> list[dict[str, Any]]:
    """What every rank of a case reports, in rank order."""
    recipe, out = folder / "recipe.json", folder / "out"
    recipe.write_text(json.dumps(recipe_of(case, shape, model)))
    out.mkdir(exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={case.ranks}", "-m", "scpl_ds.bench._memory_worker",
        str(recipe), str(out), str(shape.steps),
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            _, said = launcher.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            launcher.terminate()  # it ends its ranks
            raise ScplError(f"{case} took more than {_LIMIT_S} s and was ended.") from error
    if launcher.returncode != 0:
        said = said.split("torch.distributed.elastic")[0].strip()
        raise ScplError(f"{case} failed:\n{said[-2000:]}")
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(case.ranks)]


def _row(case: Case, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    most = max(ranks, key=lambda rank: rank["peak_bytes"])
    return {
        "system": case.system,
        "stages": case.stages,
        "ranks": case.ranks,
        "zero_stage": case.zero_stage,
        "sharding": case.sharding,
        **{key: most[key] for key in _FIGURES},
        "device": most["device"],
        "per_rank": [{key: rank[key] for key in _FIGURES} for rank in ranks],
    }


_FIGURES = (
    "parameter_bytes",
    "activation_and_gradient_bytes",
    "peak_bytes",
    "predicted_peak_bytes",
    "loading_peak_bytes",
    "tokens_per_s",
)
"""Of one rank. ``loading_peak_bytes``: before the first step, mapped pages of the model included;
``peak_bytes`` is of the steps."""


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, in MiB, each with its prediction's largest error."""
    lines = [
        "| system | stages | ranks | backend | ZeRO | parameters | activations + gradients | peak "
        "| predicted | off by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        worst = max((_error(rank) for rank in row["per_rank"]), key=abs)
        cells = [
            row["system"], row["stages"], row["ranks"], row["sharding"], row["zero_stage"],
            *(f"{row[key] / MIB:.0f}" for key in _FIGURES[:4]),
            f"{worst:+.1%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _error(rank: Mapping[str, Any]) -> float:
    return rank["predicted_peak_bytes"] / rank["peak_bytes"] - 1
