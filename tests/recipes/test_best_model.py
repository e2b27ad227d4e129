"""The best checkpoint at the end, checkpoints written in the background, shards of an export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from scpl_ds.cli import main
from tests.support.tiny import DROP, assert_same, recipe_for, tensors_of, train

Recipe = dict[str, Any]
BEST = {"train.load_best_model_at_end": True, "train.eval_steps": 3, "train.save_total_limit": 1}


def export_of(folder: Path) -> dict[str, Any]:
    return {
        n: t for f in sorted(folder.glob("model*.safetensors")) for n, t in load_file(f).items()
    }


def val_losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["val/loss"] for row in rows if "val/loss" in row}


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_the_export_is_of_the_best_checkpoint_which_the_limit_spares(
    base: Recipe, tmp_path: Path, background: bool, capsys: pytest.CaptureFixture[str]
):
    """A loss that falls, of which the greatest is asked for: the first checkpoint is the best."""
    changes = {**BEST, "train.greater_is_better": True, "train.save_async": background}
    changes["trackers"] = [{"name": "jsonl"}]
    run = tmp_path / "run"
    assert train(recipe_for(base, "none", run, **changes)) == 0
    losses = val_losses(run)
    assert set(losses) == {3, 6, 8}
    best = max(losses, key=losses.__getitem__)
    assert best != 8, losses
    result = json.loads((run / "result.json").read_text())
    assert result["best_model_checkpoint"] == str(run / f"checkpoint-{best}")
    assert result["best_metric"] == losses[best]
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{best}", "checkpoint-8"]
    assert main(["export", str(run / f"checkpoint-{best}"), str(tmp_path / "again")]) == 0
    assert_same(export_of(run / "export"), export_of(tmp_path / "again"))


def test_a_resumed_run_remembers_which_was_the_best(base: Recipe, tmp_path: Path):
    changes = {**BEST, "train.greater_is_better": True, "train.num_train_epochs": DROP}
    run = tmp_path / "run"
    first = recipe_for(base, "none", run, **changes, **{"train.max_steps": 6})
    assert train(first) == 0
    before = json.loads((run / "result.json").read_text())
    assert train(first, "train.max_steps=9", "train.resume_from_checkpoint=true") == 0
    after = json.loads((run / "result.json").read_text())
    assert before["best_metric"] <= after["best_metric"]
    assert Path(after["best_model_checkpoint"]).is_dir()
    if after["best_metric"] == before["best_metric"]:
        assert after["best_model_checkpoint"] == before["best_model_checkpoint"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eval_f1", "'f1' is not among the numbers of an evaluation of 'sequence-classification'"),
        ("perplexity", "loss, accuracy, accuracy_after_layer_N of a local head"),
        ("accuracy_after_layer_9", "no stage ends with layer 9, so there is no local head behind"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_before_the_first_step(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
):
    """It was refused at the first evaluation."""
    recipe = recipe_for(base, "none", tmp_path / "run", **BEST)
    assert train(recipe, f"train.metric_for_best_model={name}") == 2
    said = capsys.readouterr().err
    assert "train.metric_for_best_model: " in said and words in said
    assert not (tmp_path / "run").exists()


def test_a_best_model_without_evaluation_data_is_refused_before_the_first_step(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The run warned, and exported its last checkpoint."""
    recipe = recipe_for(base, "none", tmp_path / "run", **BEST, **{"data.eval_file": DROP})
    assert train(recipe) == 2
    assert "train.load_best_model_at_end needs evaluations" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.save_steps": 2}, "save_steps: 2 and eval_steps: 3 do not fall together"),
        ({"train.eval_strategy": "no", "train.eval_steps": DROP}, "make both steps or epoch"),
        ({"train.load_best_model_at_end": False, "train.greater_is_better": True},
         "train.greater_is_better: has no effect without load_best_model_at_end"),
    ],
)  # fmt: skip
def test_a_best_model_that_cannot_be_found_is_refused_before_the_first_step(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Recipe, words: str
):
    assert train(recipe_for(base, "none", tmp_path / "run", **{**BEST, **changes})) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_checkpoints_written_in_the_background_are_the_same(
    plain_run: Path, base: Recipe, tmp_path: Path
):
    run = tmp_path / "run"
    assert train(recipe_for(base, "none", run, **{"train.save_async": True})) == 0
    assert sorted(p.name for p in run.glob("*checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    for name in ("checkpoint-6", "checkpoint-8"):
        assert_same(tensors_of(run / name), tensors_of(plain_run / name))
    assert_same(export_of(run / "export"), export_of(plain_run / "export"))


def test_an_export_in_small_shards_is_the_same_model(plain_run: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert main(["export", str(plain_run), str(out), "--max-shard-size", "8KiB"]) == 0
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    sizes = [sum(t.nbytes for t in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 8 * 1024
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert {n: s.name for s in shards for n in load_file(s)} == index["weight_map"]
    assert_same(export_of(out), export_of(plain_run / "export"))
    assert not list(out.glob(".shard*"))
