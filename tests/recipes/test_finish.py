"""What comes after the last step: the whole model is loaded, where only stages were before."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_ds import checkpoint, evaluation, export, setup, trainer
from scpl_ds.evaluation import Score, score_model
from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.setup_schedule import draw_schedule
from tests.support.tiny import put, recipe_for

BACKWARDS_LATE = "tests.unit.test_extension:later_stages_first"


@pytest.mark.parametrize("sharding", ["none", "deepspeed"])
def test_the_stages_are_gone_when_the_whole_model_is_loaded(
    sharding: str, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rank 0 used to hold the whole model beside its stages, on a GPU that could hold only them."""
    held: list[weakref.ref[torch.nn.Parameter]] = []
    left: list[int] = []
    make_engine, load_exported = setup.make_engine, export.load_exported

    def make(*args: Any, **kwargs: Any) -> Any:
        engine = make_engine(*args, **kwargs)
        held.extend(weakref.ref(p) for p in engine.module.parameters())
        return engine

    def load(*args: Any, **kwargs: Any) -> Any:
        left.append(sum(ref() is not None for ref in held))
        return load_exported(*args, **kwargs)

    monkeypatch.setattr(setup, "make_engine", make)
    monkeypatch.setattr(export, "load_exported", load)
    recipe = recipe_for(base, sharding, tmp_path / "run", **{"train.max_steps": 1})
    trainer.fit(recipe_from_mapping(recipe))
    assert held and left == [0]


def test_a_model_too_large_for_the_device_is_scored_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(logging.getLogger("scpl_ds"), "propagate", True)
    asked: list[torch.device] = []

    def forward_all(model: torch.nn.Module, batches: Any) -> Any:
        asked.append(next(model.parameters()).device)
        for batch in batches:
            if asked[-1].type == "meta":
                raise torch.OutOfMemoryError
            yield batch["logits"], batch["labels"]

    class Movable(torch.nn.Linear):
        """A GPU is not needed: it says where it was sent to."""

        def to(self, device: torch.device) -> Any:
            return torch.nn.Linear(1, 1, device=device)

    monkeypatch.setattr(evaluation, "_forward_all", forward_all)
    batch = {"logits": torch.eye(2), "labels": torch.tensor([0, 0])}
    score = score_model(Movable(1, 1), [batch], torch.device("meta"))
    assert (score.correct, score.total) == (1, 2)
    assert [device.type for device in asked] == ["meta", "cpu"]
    assert "does not fit on meta: it is scored on the CPU" in caplog.text
    assert isinstance(score, Score)


def test_the_drawing_is_of_the_schedule_that_is_named(base: dict[str, Any]):
    """`stream` used to be drawn under whatever name the recipe gave."""
    drawn = draw_schedule(recipe_from_mapping(base), 2, 2)
    assert drawn.splitlines() == [
        "stage 0 |F0 B0 == F1 B1 ==",
        "stage 1 |   F0 B0 == F1 B1 ==",
    ]
    other = recipe_from_mapping(put(base, {"scpl.schedule": "scpl_ds.schedules:one_f_one_b"}))
    assert draw_schedule(other, 2, 2).splitlines()[0] == "stage 0 |F0 F1 B0 == B1 =="


def test_a_schedule_made_for_another_layout_is_not_drawn(base: dict[str, Any]):
    recipe = recipe_from_mapping(put(base, {"scpl.schedule": BACKWARDS_LATE}))
    drawn = draw_schedule(recipe, 2, 2)
    assert drawn == "(not drawn with one rank a stage: AssertionError: made for one process)"


@pytest.mark.parametrize("strategy, left", [("no", []), ("epoch", ["checkpoint-2", "latest"])])
def test_save_strategy_no_leaves_an_export_and_no_checkpoint(
    strategy: str, left: list[str], base: dict[str, Any], tmp_path: Path
):
    """What the export was made of used to stay: 2.5 GB of a small language model."""
    changes = {"train.max_steps": 2, "train.save_steps": None, "train.save_strategy": strategy}
    recipe = recipe_for(base, "none", tmp_path / "run", **changes)
    result = trainer.fit(recipe_from_mapping(recipe))
    names = [path.name for path in (tmp_path / "run").iterdir()]
    assert sorted(n for n in names if "checkpoint" in n or n == "latest") == left
    export.load_exported(tmp_path / "run" / "export", "sequence-classification")
    assert 0.0 <= result["eval_accuracy"] <= 1.0


def test_a_checkpoint_that_is_removed_is_no_longer_the_latest(tmp_path: Path):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.MANIFEST).write_text("{}")
    checkpoint.name_latest(tmp_path / "checkpoint-4")
    checkpoint.remove(tmp_path / "checkpoint-4")
    assert checkpoint.resolve(tmp_path).name == "checkpoint-2"
    checkpoint.remove(tmp_path / "checkpoint-2")
    assert not list(tmp_path.iterdir())
