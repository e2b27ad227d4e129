"""Artifacts of a W&B run: what was handed over is what is going to be uploaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scpl_ds.trackers import _wandb_artifacts
from tests.support.wandb_file import WandbRun, read_wandb_file

BODY = """
import shutil
from pathlib import Path
from scpl_ds.trackers._base import Artifact, TrackerSet
run = Path({run!r})
trackers = TrackerSet.build([{section!r}], run_dir=run, resume=False)
trackers.start({{}})
for step, best in ((1, False), (2, True)):
    made = run / f"checkpoint-{{step}}"
    (made / "model").mkdir(parents=True)
    (made / "a.bin").write_bytes(bytes([step]) * 1000)
    (made / "model" / "config.json").write_text("{{}}")
    about = {{"scores": {{"val/loss": 0.5}}, "hub_token": "hf_" + "x" * 30}}
    trackers.artifact(Artifact(made, "checkpoint", step, about, best))
    shutil.rmtree(made)  # pruned at once
(run / "export").mkdir()
(run / "export" / "model.safetensors").write_bytes(b"first")
trackers.artifact(Artifact(run / "export", "model", 2, {{}}))
shutil.rmtree(run / "export")
trackers.finish({{}})
"""


def tracked(run: Path, log_model: object = None, **environment: str) -> WandbRun:
    """In a process of its own: wandb leaves threads and a server behind."""
    pytest.importorskip("wandb")
    run.mkdir()
    section = {"name": "wandb", "mode": "offline", "log_model": log_model}
    done = subprocess.run(
        [sys.executable, "-c", BODY.format(run=str(run), section=section)],
        env={"PATH": "", "HOME": str(run.parent), **environment},
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr and "Adding directory" not in done.stderr
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    return read_wandb_file(file)


def test_a_folder_that_is_removed_at_once_is_still_there_to_be_uploaded(tmp_path: Path):
    found = tracked(tmp_path / "run", "checkpoint")
    one, two, model = found.artifacts
    assert [each.type for each in found.artifacts] == ["checkpoint", "checkpoint", "model"]
    assert one.name == two.name == f"checkpoint-{found.run_id}"
    assert (one.aliases, two.aliases) == ({"latest", "step-1"}, {"latest", "step-2", "best"})
    assert two.metadata == {"step": 2, "scores": {"val/loss": 0.5}, "hub_token": "<redacted>"}
    assert two.files.keys() == {"a.bin", "model/config.json"}
    assert Path(two.files["a.bin"][2]).read_bytes() == bytes([2]) * 1000
    assert Path(model.files["model.safetensors"][2]).read_bytes() == b"first"


@pytest.mark.parametrize(
    ("log_model", "variable", "kinds"),
    [
        (None, None, []),
        (False, "checkpoint", []),
        ("end", None, ["model"]),
        (None, "end", ["model"]),
        (None, "checkpoint", ["checkpoint", "checkpoint", "model"]),
        ("end", "checkpoint", ["model"]),
    ],
)
def test_the_recipe_says_what_is_kept_and_else_wandbs_own_variable(
    tmp_path: Path, log_model: object, variable: str | None, kinds: list[str]
):
    environment = {} if variable is None else {"WANDB_LOG_MODEL": variable}
    found = tracked(tmp_path / "run", log_model, **environment)
    assert [each.type for each in found.artifacts] == kinds
    assert (tmp_path / "run" / "wandb" / "artifacts").exists() is bool(kinds)


NO_ROOM = """
import os, resource
from pathlib import Path
from scpl_ds.trackers._base import Artifact, TrackerSet
def refuses(*_):  # as between two disks
    raise OSError(18, "Invalid cross-device link")
run = Path({run!r})
section = {{"name": "wandb", "mode": "offline", "log_model": "checkpoint"}}
trackers = TrackerSet.build([section], run_dir=run, resume=False)
trackers.start({{}})
os.link = refuses
for step in (1, 2):
    made = run / f"checkpoint-{{step}}"
    made.mkdir()
    (made / "a.bin").write_bytes(bytes(10_000_000))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
    trackers.artifact(Artifact(made, "checkpoint", step, {{}}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    trackers.log({{"head/loss": 1.0 / step}}, step)
trackers.finish({{"steps": 2}})
"""


def test_an_artifact_without_room_for_its_copy_is_left_out_and_the_run_goes_on(tmp_path: Path):
    """The tracker used to be left out, with all that was to come."""
    pytest.importorskip("wandb")
    run = tmp_path / "run"
    run.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM.format(run=str(run))],
        env={"PATH": "", "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    found = read_wandb_file(file)
    assert [row["head/loss"] for row in found.history if "head/loss" in row] == [1.0, 0.5]
    assert found.summary["steps"] == 2 and found.artifacts == ()
    (said,) = [line for line in done.stderr.splitlines() if "left out" in line]
    assert f"artifact checkpoint-{found.run_id}-step-1 is left out" in said
    assert "File too large" in said
    assert not list((run / "wandb" / "artifacts").iterdir())


def test_a_link_costs_no_room_and_where_there_can_be_none_the_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "a"
    source.write_bytes(b"weights")
    _wandb_artifacts._link(str(source), str(tmp_path / "b"))
    assert (tmp_path / "b").stat().st_ino == source.stat().st_ino

    def refuses(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(_wandb_artifacts.os, "link", refuses)
    _wandb_artifacts._link(str(source), str(tmp_path / "c"))
    assert (tmp_path / "c").read_bytes() == b"weights"
    assert (tmp_path / "c").stat().st_ino != source.stat().st_ino
