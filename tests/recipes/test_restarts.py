"""What a restart finds, and a run that diverges, in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from scpl_ds import checkpoint
from scpl_ds.engine import Engine
from tests.support.tiny import DROP, put, recipe_for, train

Recipe = dict[str, Any]
AUTO = "train.resume_from_checkpoint=auto"


def test_auto_starts_anew_where_there_is_no_checkpoint(base: Recipe, tmp_path: Path):
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **{"train.max_steps": 2, "train.export": False})
    unsaved = put(recipe, {"train.save_steps": DROP, "train.save_strategy": "no"})
    assert train(unsaved, AUTO) == 0
    assert not (run / "latest").exists()
    assert train(recipe, AUTO) == 0
    assert (run / "checkpoint-2").exists() and run.with_name("run.1").exists()


def test_auto_goes_on_from_the_last_complete_checkpoint(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **{"train.max_steps": 4, "train.export": False})
    assert train(recipe, AUTO) == 0
    (run / "checkpoint-4" / "manifest.json").unlink()  # half of it was removed
    assert train(recipe, AUTO) == 0
    assert "checkpoint-3 is the last complete one" in capsys.readouterr().err
    assert (run / "checkpoint-4" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
        ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    ],
)
def test_a_run_that_its_launcher_starts_again_goes_on(
    base: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    count: str,
):
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **{"train.max_steps": 4, "train.export": False})
    monkeypatch.setenv(name, "77")
    assert train(recipe) == 0
    shutil.rmtree(run / "checkpoint-4")  # as if it had been killed before
    monkeypatch.setenv(count, "1")
    assert train(recipe) == 0
    assert "Started again by its launcher" in capsys.readouterr().err
    assert (run / "checkpoint-4").exists() and not run.with_name("run.1").exists()
    assert train(recipe, "train.seed=7") == 0  # another run of the same job
    assert run.with_name("run.1").exists()
    monkeypatch.setenv(name, "78")  # not the launch that wrote these checkpoints
    assert train(recipe, "train.seed=7") == 0
    assert run.with_name("run.2").exists()


def test_a_run_that_went_back_is_started_again_from_there(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **{"train.max_steps": 4, "train.export": False})
    assert train(recipe) == 0
    back = f"train.resume_from_checkpoint={run / 'checkpoint-3'}"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_batch", killed)
        assert train(recipe, back) == 130
    assert checkpoint.resolve(run).name == "checkpoint-3"


def test_a_logged_loss_that_is_no_number_ends_the_run_with_code_1(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    changes = {"deepspeed.optimizer.params.lr": 1e30, "train.save_steps": 100}
    assert train(recipe_for(base, "none", tmp_path / "run", **changes)) == 1
    said = capsys.readouterr().err
    assert "DivergenceError: The " in said and " of stage 0 is nan at step " in said
