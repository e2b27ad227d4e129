"""Trackers: what they wrote is read back, and none of them can hurt a run."""

from __future__ import annotations

import doctest
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pydantic
import pytest
from rich.console import Console

from scpl_ds import registry
from scpl_ds.errors import RecipeError
from scpl_ds.trackers import console as console_module
from scpl_ds.trackers import wandb as wandb_module
from scpl_ds.trackers._base import Tracker, TrackerSet, redact
from scpl_ds.trackers.console import ConsoleTracker, format_line
from scpl_ds.trackers.jsonl import JsonlTracker
from scpl_ds.trackers.wandb import WandbTracker
from tests.support.wandb_file import read_wandb_file

NAN = float("nan")


@pytest.mark.parametrize(
    "name, cls",
    [("console", ConsoleTracker), ("jsonl", JsonlTracker), ("wandb", WandbTracker)],
)
def test_the_recipe_name_leads_to_the_class(name, cls):
    assert registry.resolve("tracker", name, where="trackers[0].name") is cls


# ------------------------------------------------------------------------------------ the set


class Recorder(Tracker):
    """Keeps every call."""

    def __init__(self, *, run_dir: Path) -> None:
        super().__init__(self.Options(), run_dir=run_dir, resume=False)
        self.calls: list[tuple] = []

    def start(self, config, *, total_steps=None, resumed_step=None):
        self.calls.append(("start", config, total_steps, resumed_step))

    def log(self, metrics, step):
        self.calls.append(("log", metrics, step))

    def tick(self, step):
        self.calls.append(("tick", step))

    def picture(self, name, svg):
        self.calls.append(("picture", name, svg))

    def finish(self, summary, *, exit_code=0):
        self.calls.append(("finish", summary, exit_code))


class FailsIn(Recorder):
    """Raises in one of the calls."""

    def __init__(self, what: str, *, run_dir: Path) -> None:
        super().__init__(run_dir=run_dir)
        self.what = what

    def __getattribute__(self, name):
        if name in ("start", "log", "tick", "picture", "finish") and name == self.what:
            raise ConnectionError("the server is gone")
        return super().__getattribute__(name)


def run_through(trackers: TrackerSet) -> None:
    trackers.start({"a": 1}, total_steps=3)
    for step in (1, 2, 3):
        trackers.tick(step)
        trackers.log({"head/loss": 1.0}, step)
    trackers.picture("profile/timeline", Path("timeline.svg"))
    trackers.finish({"eval_accuracy": 0.9})


def test_every_tracker_gets_every_call(tmp_path):
    recorder = Recorder(run_dir=tmp_path)
    run_through(TrackerSet([recorder]))
    assert recorder.calls[0] == ("start", {"a": 1}, 3, None)
    assert recorder.calls[1:3] == [("tick", 1), ("log", {"head/loss": 1.0}, 1)]
    assert recorder.calls[-2] == ("picture", "profile/timeline", Path("timeline.svg"))
    assert recorder.calls[-1] == ("finish", {"eval_accuracy": 0.9}, 0)
    assert len(recorder.calls) == 9


@pytest.mark.parametrize("what", ["start", "log", "tick", "picture", "finish"])
def test_a_failing_tracker_is_reported_once_and_the_others_go_on(tmp_path, caplog, what):
    recorder = Recorder(run_dir=tmp_path)
    with caplog.at_level(logging.WARNING):
        run_through(TrackerSet([FailsIn(what, run_dir=tmp_path), recorder]))
    assert len(recorder.calls) == 9
    (record,) = caplog.records
    assert f"FailsIn failed in {what}" in record.getMessage()
    assert "ConnectionError: the server is gone" in record.getMessage()


def test_finishing_twice_closes_once(tmp_path):
    recorder = Recorder(run_dir=tmp_path)
    trackers = TrackerSet([recorder])
    run_through(trackers)
    trackers.finish({}, exit_code=1)
    assert sum(call[0] == "finish" for call in recorder.calls) == 1


def test_a_recipe_always_gets_a_jsonl_tracker(tmp_path):
    trackers = TrackerSet.build([], run_dir=tmp_path, resume=False)
    run_through(trackers)
    assert len(rows(tmp_path)) == 3


def test_an_unknown_tracker_names_the_nearest_one(tmp_path):
    with pytest.raises(RecipeError, match=r"trackers\[0\].name.*did you mean 'wandb'"):
        TrackerSet.build([{"name": "wandbb"}], run_dir=tmp_path, resume=False)


class FailsToBeMade(Recorder):
    """Raises in its constructor."""

    def __init__(self, options, *, run_dir, resume):
        raise self.error

    error: Exception = ConnectionError("the server is gone")


def test_a_tracker_that_cannot_be_made_is_reported_and_the_run_goes_on(tmp_path, caplog):
    """It ended the run."""
    section = {"name": f"{__name__}:FailsToBeMade"}
    with caplog.at_level(logging.WARNING):
        trackers = TrackerSet.build([section], run_dir=tmp_path, resume=False)
        run_through(trackers)
    assert len(rows(tmp_path)) == 3
    (record,) = caplog.records
    assert "tracker FailsToBeMade failed in its constructor" in record.getMessage()
    assert "ConnectionError: the server is gone" in record.getMessage()


def test_a_tracker_may_refuse_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(FailsToBeMade, "error", RecipeError("trackers.x: is not possible here"))
    section = {"name": f"{__name__}:FailsToBeMade"}
    with pytest.raises(RecipeError, match="not possible here"):
        TrackerSet.build([section], run_dir=tmp_path, resume=False)


def test_an_unknown_option_is_refused(tmp_path):
    section = {"name": "wandb", "projct": "x"}
    with pytest.raises(pydantic.ValidationError, match="projct"):
        TrackerSet.build([section], run_dir=tmp_path, resume=False)


def test_secrets_are_replaced_and_nothing_else_is():
    config = {
        "data": {"token": "hf_abcdefghijklmnopqrstuv", "api_key": "x1", "pad_token": "[PAD]"},
        "urls": ["https://me:hunter2@host/path", "https://host/path"],
        "note": "uses hf_abcdefghijklmnopqrstuv here",
        "use_auth_token": True,
        "perf": {"tokens_per_s": 3.5, "max_tokens": 4},
        "path": Path("runs/x"),
        "bounds": (0, 3, 6),
        "off": None,
    }
    assert redact(config) == {
        "data": {"token": "<redacted>", "api_key": "<redacted>", "pad_token": "[PAD]"},
        "urls": ["https://<redacted>host/path", "https://host/path"],
        "note": "uses <redacted> here",
        "use_auth_token": True,
        "perf": {"tokens_per_s": 3.5, "max_tokens": 4},
        "path": "runs/x",
        "bounds": [0, 3, 6],
        "off": None,
    }


def test_no_tracker_sees_a_secret(tmp_path):
    recorder = Recorder(run_dir=tmp_path)
    TrackerSet([recorder]).start({"data": {"password": "hunter2"}})
    assert recorder.calls[0][1] == {"data": {"password": "<redacted>"}}


# -------------------------------------------------------------------------------------- jsonl


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def jsonl(run_dir: Path, *, resume: bool = False, resumed_step: int | None = None) -> JsonlTracker:
    tracker = JsonlTracker(JsonlTracker.Options(), run_dir=run_dir, resume=resume)
    tracker.start({}, resumed_step=resumed_step)
    return tracker


def test_jsonl_writes_one_object_a_logging_step(tmp_path):
    tracker = jsonl(tmp_path)
    tracker.log({"stage0/loss": 2.5, "lr": 2}, 20)
    tracker.log({"stage0/loss": 2.25}, 40)
    first, second = rows(tmp_path)
    assert first.pop("time") <= second.pop("time")
    assert first == {"step": 20, "stage0/loss": 2.5, "lr": 2.0}
    assert second == {"step": 40, "stage0/loss": 2.25}


def test_jsonl_lines_are_on_disk_before_the_file_is_closed(tmp_path):
    tracker = jsonl(tmp_path)
    tracker.log({"a": 1.0}, 1)
    assert len(rows(tmp_path)) == 1
    tracker.finish({})


def test_jsonl_writes_what_json_has_no_number_for_as_null(tmp_path):
    tracker = jsonl(tmp_path)
    tracker.log({"a": NAN, "b": float("inf"), "c": -float("inf"), "d": 0.0}, 1)
    (row,) = rows(tmp_path)
    assert [row[k] for k in "abcd"] == [None, None, None, 0.0]


@pytest.mark.parametrize("resumed_step", [40, 50, None])
def test_a_resumed_jsonl_drops_what_came_after_the_checkpoint(tmp_path, resumed_step):
    before = jsonl(tmp_path)
    for step in (20, 40, 60, 80):
        before.log({"a": 1.0}, step)
    before.finish({})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10')  # cut short by a kill
    after = jsonl(tmp_path, resume=True, resumed_step=resumed_step)
    after.log({"a": 2.0}, 60)
    after.log({"a": 2.0}, 80)
    after.finish({})
    assert [(r["step"], r["a"]) for r in rows(tmp_path)] == [(20, 1), (40, 1), (60, 2), (80, 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_jsonl_without_a_file_starts_one(tmp_path):
    jsonl(tmp_path, resume=True, resumed_step=40).log({"a": 1.0}, 60)
    assert [r["step"] for r in rows(tmp_path)] == [60]


def test_a_run_that_is_not_resumed_starts_the_file_afresh(tmp_path):
    jsonl(tmp_path).log({"a": 1.0}, 60)
    jsonl(tmp_path / "." / "").log({"a": 2.0}, 20)
    assert [r["step"] for r in rows(tmp_path)] == [20]


# ------------------------------------------------------------------------------------ console


def test_a_console_line_shows_what_was_measured_in_a_fixed_order():
    metrics = {
        "perf/peak_memory_gib": 3.12,
        "head/loss": 0.42,
        "stage1/loss": 2.2,
        "stage10/loss": 1.5,
        "stage0/loss": 2.912,
        "stage0/grad_norm": 1.0,
        "val/accuracy": 0.813,
        "perf/tokens_per_s": 12400.0,
        "lr": 1e-4,
    }
    assert format_line(metrics, 40, 200) == (
        "step   40/200  val_acc  81.3%  loss s0 2.91  s1 2.20  s10 1.50  head 0.42"
        "  12.4k tok/s  3.1 GiB"
    )


@pytest.mark.parametrize(
    "metrics, step, total, line",
    [
        ({}, 5, None, "step    5"),
        (
            {"val/accuracy": 1.0, "val/loss": 0.0312},
            5,
            10,
            "step    5/10  val_acc 100.0%  val_loss 0.0312",
        ),
        ({"stage0/loss": NAN}, 12345, 100000, "step  12345/100000  loss s0 nan"),
        ({"perf/samples_per_s": 33.33}, 5, 10, "step    5/10  33.3 samples/s"),
        ({"perf/bubble_fraction": 0.104}, 5, 10, "step    5/10  bubble 10%"),
        (
            {"perf/samples_per_s": 5.0, "perf/tokens_per_s": 2.5e6},
            5,
            10,
            "step    5/10  2.5M tok/s",
        ),
        (
            {"stage0/valid_anchor_fraction": 0.25, "stage1/valid_anchor_fraction": 0.9},
            5,
            10,
            "step    5/10  rows with a positive only s0 25%",
        ),
    ],
)
def test_console_lines(metrics, step, total, line):
    assert format_line(metrics, step, total) == line


def test_console_docstring_examples_hold():
    failures, tried = doctest.testmod(console_module)
    assert tried and not failures


def on_console(run_dir: Path, *, terminal: bool, **options) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    screen = Console(file=out, force_terminal=terminal, width=60, legacy_windows=False)
    options = ConsoleTracker.Options(**options)
    return ConsoleTracker(options, run_dir=run_dir, resume=False, console=screen), out


def test_outside_a_terminal_there_are_plain_lines_only(tmp_path):
    tracker, out = on_console(tmp_path, terminal=False)
    metrics = {f"stage{k}/loss": 2.5 for k in range(20)}  # longer than the 60 columns
    tracker.start({}, total_steps=4)
    tracker.tick(1)
    tracker.log(metrics, 2)
    tracker.finish({})
    assert out.getvalue() == format_line(metrics, 2, 4) + "\n"


def test_in_a_terminal_there_is_a_bar_with_the_time_left(tmp_path):
    tracker, out = on_console(tmp_path, terminal=True)
    tracker.start({}, total_steps=4, resumed_step=1)
    tracker.tick(2)
    tracker.log({"head/loss": 0.5}, 3)
    tracker.finish({})
    text = out.getvalue()
    assert "going on from step 1" in text and "loss head 0.50" in text
    assert "3/4" in text and "left" in text


def test_the_bar_can_be_switched_off(tmp_path):
    tracker, out = on_console(tmp_path, terminal=True, progress=False)
    tracker.start({}, total_steps=4)
    tracker.log({"head/loss": 0.5}, 3)
    assert out.getvalue() == "step    3/4  loss head 0.50\n"


def test_a_failed_run_says_where_it_stopped(tmp_path):
    tracker, out = on_console(tmp_path, terminal=False)
    tracker.start({}, total_steps=4)
    tracker.tick(3)
    tracker.finish({}, exit_code=1)
    assert out.getvalue() == "stopped at step 3 (exit code 1)\n"


# -------------------------------------------------------------------------------------- wandb
# wandb reads its environment once a process, so every run is a process of its own.


def wandb_process(run_dir: Path, body: str, **environment: str) -> subprocess.CompletedProcess:
    """Run ``body`` with ``tracker(resume=False, **options)`` at hand; WANDB_* only as given."""
    script = textwrap.dedent("""
        import logging, sys
        from pathlib import Path
        from scpl_ds.trackers.wandb import WandbTracker
        logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")
        def tracker(resume=False, **options):
            return WandbTracker(
                WandbTracker.Options(**options), run_dir=Path(sys.argv[1]), resume=resume)
    """) + textwrap.dedent(body)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = run_dir.parent / "home"
    home.mkdir(exist_ok=True)
    clean |= {"HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    clean.pop("NETRC", None)
    return subprocess.run(
        [sys.executable, "-c", script, str(run_dir)],
        env=clean,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def offline_runs(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))


def read_history(path: Path) -> list[dict]:
    """Rows of a file that may have been cut short by a kill."""
    return read_wandb_file(path).history if path.stat().st_size else []


@pytest.fixture
def run_dir(tmp_path):
    pytest.importorskip("wandb")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_an_offline_run_holds_config_metrics_steps_and_summary_and_touches_no_network(run_dir):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = wandb_process(
            run_dir,
            """
            t = tracker(mode="offline", tags=("a", "b"))
            t.start({"recipe": {"scpl": {"stages": 2}}, "git_commit": "abc"}, total_steps=60)
            t.log({"stage0/loss": 2.5, "stage1/loss": float("nan"), "lr": 1e-4}, 20)
            t.log({"val/accuracy": 0.75}, 20)
            t.log({"stage0/loss": 9.0}, 10)      # steps never go back
            for step in range(21, 900):          # more than one 32 KiB block of the file
                t.log({"stage0/loss": 1.0}, step)
            t.finish({"eval_accuracy": 0.8})
            """,
            WANDB_BASE_URL=url,
            HTTPS_PROXY=url,
            HTTP_PROXY=url,
            WANDB_API_KEY="a" * 40,
        )
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.returncode == 0, done.stderr
    (path,) = offline_runs(run_dir)
    run = read_wandb_file(path)
    assert run.run_id == (run_dir / "wandb_run_id").read_text().strip()
    assert (run.project, run.name, run.exit_code) == ("scpl-ds", "run", 0)
    assert run.config["recipe"] == {"scpl": {"stages": 2}} and run.config["git_commit"] == "abc"
    steps = [row["train/global_step"] for row in run.history]
    assert steps == [20, 20, *range(21, 900)]
    assert run.history[0]["stage0/loss"] == 2.5 and run.history[0]["lr"] == 1e-4
    assert run.history[1]["val/accuracy"] == 0.75
    assert run.step_metrics["*"] == "train/global_step"
    assert run.summary["eval_accuracy"] == 0.8
    assert f"wandb sync {run_dir}/wandb/offline-run-*-{run.run_id}" in done.stderr
    assert done.stdout == ""


def test_a_picture_is_kept_whole_in_an_offline_run_at_the_last_step(run_dir):
    picture = run_dir / "timeline.svg"
    picture.write_text('<svg xmlns="http://www.w3.org/2000/svg"><rect width="3"/></svg>\n')
    body = """
        t = tracker(mode="offline")
        t.start({})
        t.log({"head/loss": 1.0}, 7)
        t.picture("profile/timeline", Path(sys.argv[1]) / "timeline.svg")
        t.finish({"bubble_fraction": 0.25})
    """
    done = wandb_process(run_dir, body)
    assert done.returncode == 0, done.stderr
    (path,) = offline_runs(run_dir)
    run = read_wandb_file(path)
    row = run.history[-1]
    assert row["train/global_step"] == 7
    assert row["profile/timeline/_type"] == "html-file"
    (kept,) = path.parent.glob("files/media/html/**/*.html")
    assert kept.read_text().strip() == picture.read_text().strip()
    assert run.summary["bubble_fraction"] == 0.25


def test_a_resumed_run_keeps_its_id_and_repeats_no_step(run_dir):
    first = """
        t = tracker(mode="offline")
        t.start({"a": 1})
        for step in (20, 40, 60):
            t.log({"x": 1.0}, step)
        t.finish({}, exit_code=1)
    """
    second = """
        t = tracker(mode="offline", resume=True)
        t.start({"a": 2}, resumed_step=40)
        for step in (50, 60, 80):
            t.log({"x": 2.0}, step)
        t.finish({})
    """
    for body in (first, second):
        done = wandb_process(run_dir, body)
        assert done.returncode == 0, done.stderr
    before, after = sorted(map(read_wandb_file, offline_runs(run_dir)), key=lambda r: r.config["a"])
    assert before.run_id == after.run_id
    assert before.exit_code == 1 and after.exit_code == 0
    assert [r["train/global_step"] for r in before.history] == [20, 40, 60]
    assert [r["train/global_step"] for r in after.history] == [60, 80]


def test_a_run_that_goes_on_after_a_kill_loses_no_step(run_dir):
    """wandb holds rows back for seconds: rows from just before a kill must be logged again."""
    first = """
        import os, signal
        t = tracker(mode="offline")
        t.start({"a": 1})
        for step in (20, 40, 60):
            t.log({"x": 1.0}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    second = """
        t = tracker(mode="offline", resume=True)
        t.start({"a": 1}, resumed_step=0)
        for step in (20, 40, 60, 80):
            t.log({"x": 1.0}, step)
        t.finish({})
    """
    assert wandb_process(run_dir, first).returncode == -signal.SIGKILL
    done = wandb_process(run_dir, second)
    assert done.returncode == 0, done.stderr
    logged = [r["train/global_step"] for p in offline_runs(run_dir) for r in read_history(p)]
    assert {20, 40, 60, 80} <= set(logged)
    assert (run_dir / "wandb_last_step").read_text() == "80\n"


def test_steps_are_taken_as_written_once_wandb_has_had_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(wandb_module.time, "monotonic", lambda: now[0])
    tracker = WandbTracker(WandbTracker.Options(), run_dir=tmp_path, resume=False)
    logged = []
    tracker._run = SimpleNamespace(log=logged.append)
    for now[0], step in ((0, 1), (10, 2), (25, 3), (35, 4), (41, 5)):
        tracker.log({}, step)
    assert (tmp_path / "wandb_last_step").read_text() == "2\n"
    assert [row["train/global_step"] for row in logged] == [1, 2, 3, 4, 5]


def test_a_run_that_is_not_resumed_gets_a_new_id(run_dir):
    body = 't = tracker(mode="offline"); t.start({}); t.log({"x": 1.0}, 5); t.finish({})'
    for _ in range(2):
        assert wandb_process(run_dir, body).returncode == 0
    one, two = map(read_wandb_file, offline_runs(run_dir))
    assert one.run_id != two.run_id
    assert len(one.history) == len(two.history) == 1


def test_wandbs_own_variables_are_honoured_where_the_recipe_is_silent(run_dir, tmp_path):
    done = wandb_process(
        run_dir,
        't = tracker(run_name="from recipe"); t.start({}); t.finish({})',
        WANDB_MODE="offline",
        WANDB_PROJECT="their-project",
        WANDB_NAME="their-name",
        WANDB_RUN_ID="their-id",
        WANDB_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    (path,) = offline_runs(tmp_path)
    run = read_wandb_file(path)
    assert (run.project, run.run_id, run.name) == ("their-project", "their-id", "from recipe")


@pytest.mark.parametrize(
    ("options", "environment", "name"),
    [
        ({}, {}, "mine"),
        ({}, {"WANDB_NAME": "from the shell"}, "from the shell"),
        ({"run_name": "of the tracker"}, {"WANDB_NAME": "from the shell"}, "of the tracker"),
    ],
)
def test_the_name_of_the_run_is_wandbs_display_name(run_dir, options, environment, name):
    """``train.run_name`` was read by nothing."""
    body = f"""
        from scpl_ds.trackers._base import TrackerSet
        section = {{"name": "wandb", "mode": "offline", **{options!r}}}
        t = TrackerSet.build([section], run_dir=Path(sys.argv[1]), resume=False, run_name="mine")
        t.start({{}}); t.finish({{}})
    """
    done = wandb_process(run_dir, body, **environment)
    assert done.returncode == 0, done.stderr
    (path,) = offline_runs(run_dir)
    assert read_wandb_file(path).name == name


@pytest.mark.parametrize("how", ["option", "variable"])
def test_disabled_writes_nothing_and_does_not_import_wandb(run_dir, how):
    option, variable = (
        ('mode="disabled"', {}) if how == "option" else ("", {"WANDB_MODE": "disabled"})
    )
    done = wandb_process(
        run_dir,
        f"""
        t = tracker({option}); t.start({{}}); t.log({{"x": 1.0}}, 1); t.finish({{}})
        assert "wandb" not in sys.modules
        """,
        **variable,
    )
    assert done.returncode == 0, done.stderr
    assert not list(run_dir.iterdir())


@pytest.mark.parametrize("key", ["", "a" * 40], ids=["no key", "no server"])
def test_online_without_a_key_or_a_server_goes_on_offline_and_says_so_once(run_dir, key):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = wandb_process(
        run_dir,
        """
        t = tracker(mode="online", init_timeout_s=1, finish_timeout_s=1)
        t.start({"a": 1}); t.log({"x": 1.0}, 5); t.finish({})
        """,
        WANDB_BASE_URL=url,
        **({"WANDB_API_KEY": key} if key else {}),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING") == 1 and "written offline" in done.stderr
    (path,) = run_dir.glob("wandb/*run-2*/run-*.wandb")
    assert [row["x"] for row in read_wandb_file(path).history] == [1.0]


def test_a_machine_without_wandb_says_how_to_get_it_and_trains_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    section = {"name": "wandb", "mode": "offline"}
    trackers = TrackerSet.build([section], run_dir=tmp_path, resume=False)
    with caplog.at_level(logging.WARNING):
        run_through(trackers)
    (record,) = caplog.records
    assert "pip install 'scpl-ds[wandb]'" in record.getMessage()
    assert len(rows(tmp_path)) == 3
