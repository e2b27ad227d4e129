"""A new objective, data source, tracker, sharding backend, schedule: one class in one file each.

This file is that one file: a recipe names its classes, and a run trains with all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from scpl_ds.data._base import DataOptions, DataSource, Splits
from scpl_ds.objectives._base import Objective, ObjectiveOptions, ObjectiveOutput
from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.schedules import Action, Backward, Forward, Load, Step, stream
from scpl_ds.sharding.none import NoneBackend
from scpl_ds.trackers._base import Tracker
from scpl_ds.trainer import fit
from tests.support import tiny
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks

HERE = "tests.unit.test_extension"


class PullTogetherOptions(ObjectiveOptions):
    strength: float = 1.0
    """How strongly features are pulled to their class's mean."""


class PullTogether(Objective):
    """Distance of mean features to their class's mean."""

    Options: ClassVar[type[BaseModel]] = PullTogetherOptions

    def __init__(
        self, options: PullTogetherOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.strength = options.strength

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        features = hidden_states.mean(1)
        same = (labels[:, None] == labels[None, :]).float()
        means = same @ features / same.sum(1, keepdim=True)
        loss = self.strength * (features - means).pow(2).mean()
        return ObjectiveOutput(loss, {"pulled": loss.detach()})

    def flops(self, batch: int, sequence: int) -> int:
        return 0


class Counting(DataSource):
    """Texts made of the good words or of the bad ones."""

    Options: ClassVar[type[DataOptions]] = DataOptions

    def load(self) -> Splits:
        rows = tiny.sentences(32, seed=5)
        table = datasets.Dataset.from_dict(
            {"text": [text for text, _ in rows], "label": [label for _, label in rows]}
        )
        return Splits(table, table, ("bad", "good"))


class ToOneFile(Tracker):
    """Every logged step as one line of a file of its own."""

    def start(self, config: Mapping[str, Any], **_: Any) -> None:
        (self.run_dir / "mine.txt").write_text("")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        with (self.run_dir / "mine.txt").open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class HalfRate(NoneBackend):
    """Plain torch at half the learning rate."""

    def step(self, lr: float, *, clip_to: float | None = None) -> dict[str, Tensor]:
        return super().step(lr / 2, clip_to=clip_to)


def later_stages_first(
    local_stages: Sequence[int],
    num_stages: int,
    num_micro_batches: int,
    *,
    step_in_backward: bool = True,
) -> Iterator[Action]:
    """All forwards of a micro-batch, then its backwards from the last stage to the first."""
    del step_in_backward
    assert len(local_stages) == num_stages, "made for one process"
    for n in range(num_micro_batches):
        yield Load(n)
        yield from (Forward(k, n) for k in local_stages)
        yield from (Backward(k, n) for k in reversed(local_stages))
    yield from (Step(k) for k in local_stages)


def recipe(folder: Path, **scpl: Any) -> dict[str, Any]:
    mapping = tiny.make(folder)
    mapping["scpl"] |= scpl
    mapping["train"] |= {"max_steps": 2, "logging_steps": 1, "eval_strategy": "no"}
    return mapping


def trained(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "run" / "checkpoint-2" / "stage-1.safetensors")


def test_a_run_of_throw_away_classes_trains_two_steps(tmp_path: Path) -> None:
    mapping = recipe(
        tmp_path,
        objective={"name": f"{HERE}:PullTogether", "strength": 0.5},
        sharding=f"{HERE}:HalfRate",
        schedule=f"{HERE}:later_stages_first",
    )
    mapping["data"] = {"name": f"{HERE}:Counting", "max_length": 16}
    mapping["trackers"] = [{"name": f"{HERE}:ToOneFile"}]
    run_ranks(1, lambda: fit(recipe_from_mapping(mapping)))
    lines = [json.loads(line) for line in (tmp_path / "run/mine.txt").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"stage0/pulled", "stage0/loss", "head/loss"} <= set(lines[0])


def test_an_order_of_stages_that_only_delays_backwards_changes_no_parameter(tmp_path: Path) -> None:
    results = []
    for name, schedule in (("a", "stream"), ("b", f"{HERE}:later_stages_first")):
        folder = tmp_path / name
        mapping = recipe(folder, schedule=schedule)
        run_ranks(1, lambda mapping=mapping: fit(recipe_from_mapping(mapping)))
        results.append(trained(folder))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_stream_is_what_its_name_resolves_to() -> None:
    from scpl_ds import registry

    assert registry.resolve("schedule", "stream", where="scpl.schedule") is stream
