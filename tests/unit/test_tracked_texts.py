"""Texts that a run shows: what every tracker makes of them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from scpl_ds.trackers._base import Tracker, TrackerOptions, TrackerSet
from scpl_ds.trackers.console import ConsoleOptions, ConsoleTracker
from scpl_ds.trackers.jsonl import JsonlTracker
from tests.support.wandb_file import read_wandb_file

ROWS = [{"prompt": "Once [b]", "text": " upon\na time"}, {"prompt": "é", "text": ""}]


def jsonl(folder: Path, **more: int) -> JsonlTracker:
    tracker = JsonlTracker(JsonlTracker.Options(), run_dir=folder, resume=bool(more))
    tracker.start({}, **more)
    return tracker


def test_the_console_shows_each_text_on_a_line(tmp_path: Path):
    said = io.StringIO()
    tracker = ConsoleTracker(
        ConsoleOptions(), run_dir=tmp_path, resume=False, console=Console(file=said)
    )
    tracker.start({})
    tracker.table("samples", ROWS, 40)
    lines = said.getvalue().splitlines()
    assert lines[0] == r"step   40  samples  prompt 'Once [b]'  text ' upon\na time'"
    assert len(lines) == 2


def test_jsonl_keeps_texts_in_a_file_of_their_own(tmp_path: Path):
    jsonl(tmp_path).table("samples", ROWS, 40)
    lines = (tmp_path / "tables.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"step": 40, "name": "samples", **ROWS[0]}
    assert "é" in lines[1] and len(lines) == 2
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_resumed_run_drops_texts_after_its_checkpoint_and_a_new_one_all(tmp_path: Path):
    first = jsonl(tmp_path)
    for step in (20, 40, 60):
        first.table("samples", ROWS[:1], step)
    jsonl(tmp_path, resumed_step=40).table("samples", ROWS[:1], 60)
    lines = (tmp_path / "tables.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40, 60]
    jsonl(tmp_path)
    assert not (tmp_path / "tables.jsonl").exists()


def test_wandb_keeps_texts_as_a_table_in_an_offline_run(tmp_path: Path):
    """In a process of its own: wandb leaves threads and a server behind."""
    body = f"""
from pathlib import Path
from scpl_ds.trackers.wandb import WandbOptions, WandbTracker
t = WandbTracker(WandbOptions(mode="offline"), run_dir=Path({str(tmp_path)!r}), resume=False)
t.start({{}})
t.log({{"head/loss": 1.0}}, 7)
t.table("samples", {ROWS!r}, 7)
t.finish({{}})
"""
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    row = read_wandb_file(path).history[-1]
    assert row["train/global_step"] == 7 and row["samples/_type"] == "table-file"
    (kept,) = path.parent.glob("files/media/table/**/*.table.json")
    table = json.loads(kept.read_text())
    assert table["columns"] == ["prompt", "text"]
    assert table["data"] == [[row["prompt"], row["text"]] for row in ROWS]


class Fails(Tracker):
    def start(self, config, *, total_steps=None, resumed_step=None):
        pass

    def log(self, metrics, step):
        pass

    def table(self, name, rows, step):
        raise ConnectionError("the server is gone")


def test_a_tracker_that_fails_at_texts_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    trackers = TrackerSet([Fails(TrackerOptions(), run_dir=tmp_path, resume=False)])
    with caplog.at_level(logging.WARNING):
        trackers.table("samples", ROWS, 1)
        trackers.table("samples", ROWS, 2)
    (record,) = caplog.records
    assert "Fails failed in table" in record.getMessage()


def test_a_text_with_a_line_separator_of_unicode_survives_a_resume(tmp_path: Path):
    rows = [{"prompt": "a", "text": "one\u2028two\u0085three"}]
    jsonl(tmp_path).table("samples", rows, 10)
    path = tmp_path / "tables.jsonl"
    before = path.read_text(encoding="utf-8")
    resumed = JsonlTracker(JsonlTracker.Options(), run_dir=tmp_path, resume=True)
    resumed.start({}, resumed_step=20)
    assert path.read_text(encoding="utf-8") == before
