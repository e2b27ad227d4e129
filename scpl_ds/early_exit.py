"""Inference that stops early: local heads that can classify answer for the samples they are sure
of."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from scpl_ds.errors import CheckpointError, RecipeError
from scpl_ds.export import HEADS_CONFIG, HEADS_FILE, load_exported
from scpl_ds.objectives._base import Objective, StageView
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.stage_module import StageModule, StageOutput, stage_from_model
from scpl_ds.recipe_scpl import ObjectiveChoice


class EarlyExitOutput(NamedTuple):
    """Answers of B samples."""

    logits: Tensor
    """[B, C]; of the head where each sample left."""
    layers: Tensor
    """How many layers each sample went through, int64 [B]."""


class Point(NamedTuple):
    """One point of the curve of accuracy against depth."""

    threshold: float | None
    patience: int | None
    accuracy: float
    """In [0, 1]."""
    average_depth: float
    """Mean share of the layers that a sample went through, in (0, 1]."""
    samples_per_s: float


def refuse_heads(choice: ObjectiveChoice) -> None:
    """
    Raises:
        RecipeError: Heads of such an objective cannot classify.
    """
    if not choice.can_answer():
        raise RecipeError(
            f"scpl.objective: heads of '{choice.name}' cannot classify, so no sample can leave "
            "early. Train with early_exit, dascpl, deinforeg, predsim or associated, or a list "
            "with one of them."
        )


class EarlyExitModel(nn.Module):
    """An exported model with its local heads, cut at the boundaries it was trained with.

    Samples leave one by one: those that are left over go on as a smaller batch. Made by
    :meth:`from_pretrained`.
    """

    def __init__(
        self, stages: Sequence[StageModule], heads: Mapping[int, Objective], num_layers: int
    ) -> None:
        """
        Args:
            stages: Of the whole model, in order.
            heads: Number of the stage -> its local objective; frozen stages have none.
            num_layers: Of the whole model.
        """
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleDict({str(k): head for k, head in heads.items()})
        self._walk = [(stage, heads.get(k)) for k, stage in enumerate(stages)]
        self.num_layers = num_layers
        self.eval()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, task: str = "sequence-classification"
    ) -> EarlyExitModel:
        """The model of a folder that ``scpl-ds export`` or a run has written.

        Raises:
            CheckpointError: The folder has no local heads.
            RecipeError: Its heads cannot classify.
        """
        folder = Path(folder)
        if not (folder / HEADS_CONFIG).is_file():
            raise CheckpointError(
                f"{folder} has no {HEADS_CONFIG}: it was not exported from a run of "
                "`scpl-ds train` whose stages have local heads (scpl.method: bp and scpl.lookahead "
                "leave none that answer)."
            )
        facts = json.loads((folder / HEADS_CONFIG).read_text())
        choice = ObjectiveChoice.model_validate(facts["objective"])
        refuse_heads(choice)
        model = load_exported(folder, task)
        anatomy = analyze(model)
        spans = list(zip(facts["bounds"], facts["bounds"][1:], strict=False))
        stages = [stage_from_model(model, anatomy, *span) for span in spans]
        saved = load_file(folder / HEADS_FILE)
        heads: dict[int, Objective] = {}
        for number, stage in enumerate(stages):
            own = f"layer_{stage.end - 1}."
            state = {k.removeprefix(own): v for k, v in saved.items() if k.startswith(own)}
            if not state:
                continue
            sizes = {"hidden_size": stage.hidden_size, "num_labels": model.config.num_labels}
            head: Objective = choice.create(**sizes)
            head.attach(stage)
            head.load_state_dict(state)
            heads[number] = head.eval()
        return cls(stages, heads, anatomy.num_layers)

    @torch.inference_mode()
    def forward(
        self, *, threshold: float | None = None, patience: int | None = None, **inputs: Tensor
    ) -> EarlyExitOutput:
        """Classify B samples.

        Args:
            threshold: A sample leaves at the first head whose softmax gives a class at least so
                much, in (0, 1]. None: no sample leaves for that.
            patience: A sample leaves where this many heads one after the other, beyond the first of
                them, have given the same class. None: no sample leaves for that.
            **inputs: As the model takes them, [B, T]; ``labels`` are left out.
        """
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        rows = torch.arange(len(next(iter(inputs.values()))))
        hidden: Tensor | None = None
        extras: dict[str, Tensor] = {}
        logits: Tensor | None = None
        layers = torch.full((len(rows),), self.num_layers)
        last = torch.full((len(rows),), -1)
        agreed = torch.zeros(len(rows), dtype=torch.int64)
        for stage, head in self._walk:
            output: StageOutput = stage(inputs, hidden)
            leaving, answer = output.hidden_states, output.logits
            if head is not None and (not stage.is_last or head.replaces_head):
                given = head.answer(StageView(leaving, hidden, inputs, extras))
                answer, extras = given.logits, {**extras, **given.extras}
            hidden = leaving
            if answer is None:
                continue
            answer = answer.float().cpu()
            logits = answer.new_zeros(len(layers), answer.shape[1]) if logits is None else logits
            logits[rows] = answer
            if stage.is_last:
                break
            found = answer.argmax(1)
            agreed[rows] = torch.where(found == last[rows], agreed[rows] + 1, 0)
            last[rows] = found
            leaves = torch.zeros(len(rows), dtype=torch.bool)
            if threshold is not None:
                leaves |= answer.softmax(1).amax(1) >= threshold
            if patience is not None:
                leaves |= agreed[rows] >= patience
            layers[rows[leaves]] = stage.end
            if leaves.all():
                break
            stay = (~leaves).nonzero()[:, 0]
            rows, hidden = rows[stay], leaving[stay.to(leaving.device)]
            inputs = {name: value[stay.to(value.device)] for name, value in inputs.items()}
        assert logits is not None, "the last stage answers"
        return EarlyExitOutput(logits, layers)


def curve(
    model: EarlyExitModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    thresholds: Sequence[float] = (),
    patiences: Sequence[int] = (),
) -> list[Point]:
    """Accuracy, depth and speed of a model on labelled batches; the whole model comes first.

    Args:
        model: On its device.
        batches: Read once for every point; with ``labels``.
        thresholds: A point each.
        patiences: A point each.
    """
    ways: list[dict[str, Any]] = [{}]
    ways += [{"threshold": value} for value in thresholds]
    ways += [{"patience": value} for value in patiences]
    kept = list(batches)
    model(**kept[0])  # what is slow only once is nobody's
    points: list[Point] = []
    for way in ways:
        correct = total = 0
        depth = 0.0
        began = time.monotonic()
        for batch in kept:
            output = model(**batch, **way)
            correct += int((output.logits.argmax(1) == batch["labels"].cpu()).sum())
            depth += float(output.layers.sum()) / model.num_layers
            total += len(output.layers)
        seconds = time.monotonic() - began
        points.append(
            Point(
                way.get("threshold"), way.get("patience"), correct / total, depth / total,
                total / seconds,
            )
        )  # fmt: skip
    return points
