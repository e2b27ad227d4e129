"""Weights & Biases: a run on two ranks, stopped and resumed offline, read back as it was written;
and a run whose service is not there, or is gone from the middle on."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import yaml

from scpl_ds.recipe import load_recipe, recipe_from_mapping
from scpl_ds.trackers._base import Tracker
from scpl_ds.trainer import fit
from tests.support.distributed import run_ranks
from tests.support.tiny import DROP, assert_same, recipe_for, tensors_of, write_recipe
from tests.support.wandb_file import WandbRun, read_wandb_file

pytestmark = pytest.mark.forks
STOP, STEPS = 5, 8
KEY = "a" * 40


class Terminate(Tracker):
    """Asks its own rank to stop after step ``STOP``, as a scheduler does."""

    def start(self, config: Any, **_: Any) -> None:
        """Nothing to open."""

    def log(self, metrics: Any, step: int) -> None:
        """Nothing to write."""

    def tick(self, step: int) -> None:
        if step == STOP:
            os.kill(os.getpid(), signal.SIGTERM)


class Tracked(NamedTuple):
    folder: Path
    parts: list[WandbRun]
    """Of the two processes, in order."""
    rows: list[dict[str, Any]]
    """Of both."""


@pytest.fixture(scope="module")
def tracked(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """8 steps in two stages on two ranks, stopped about half way."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("tracked") / "run"
    wandb = {"name": "wandb", "mode": "offline", "log_model": "checkpoint", "group": "seeds"}
    changes = {
        "trackers": [{"name": f"{__name__}:Terminate"}, wandb],
        "train.eval_steps": 4,
        "train.sample_predictions": 3,
        "train.profile": True,
        "train.save_total_limit": 1,
        "train.save_async": True,
        "train.run_name": "mine",
    }
    clean = {k: v for k, v in os.environ.items() if k.startswith("WANDB_")}
    for name in clean:
        del os.environ[name]
    try:
        for more in ({}, {"train.resume_from_checkpoint": True, "trackers": [wandb]}):
            recipe = recipe_from_mapping(recipe_for(base, "none", folder, **{**changes, **more}))
            run_ranks(2, lambda recipe=recipe: fit(recipe))
    finally:
        os.environ.update(clean)
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    parts = [read_wandb_file(file) for file in files]
    return Tracked(folder, parts, [row for part in parts for row in part.history])


def test_there_is_one_run_of_two_ranks_resumed_once_under_its_id(tracked: Tracked):
    assert len(tracked.parts) == 2
    kept = (tracked.folder / "wandb_run_id").read_text().strip()
    assert {part.run_id for part in tracked.parts} == {kept}
    assert {(part.name, part.group, part.exit_code) for part in tracked.parts} == {
        ("mine", "seeds", 0)
    }


def test_the_sweep_of_launch_is_judged_by_a_number_that_the_summary_of_a_run_has(tracked: Tracked):
    sweep = yaml.safe_load((Path(__file__).parents[2] / "launch" / "sweep.yaml").read_text())
    task = load_recipe(Path(__file__).parents[2] / sweep["program"]).model.task
    assert task == "sequence-classification"  # as the run here
    judged = tracked.parts[-1].summary[sweep["metric"]["name"]]
    score = json.loads((tracked.folder / "result.json").read_text())["eval_accuracy"]
    assert judged == score and 0.0 <= judged <= 1.0 and sweep["metric"]["goal"] == "maximize"


def test_every_step_is_there_once_with_the_losses_of_every_stage(tracked: Tracked):
    steps = [row["train/global_step"] for row in tracked.rows]
    assert steps == sorted(steps)
    trained = [row for row in tracked.rows if "stage0/loss" in row]
    assert [row["train/global_step"] for row in trained] == list(range(1, STEPS + 1))
    wanted = {"stage0/loss", "stage1/loss", "head/loss", "stage0/grad_norm", "lr", "epoch"}
    wanted |= {"perf/tokens_per_s", "perf/bubble_fraction", "perf/rank1/busy"}
    assert all(wanted <= row.keys() for row in trained)
    assert [row["train/global_step"] for row in tracked.rows if "val/accuracy" in row] == [4, 8]


def test_its_numbers_are_those_of_metrics_jsonl(tracked: Tracked):
    lines = (tracked.folder / "metrics.jsonl").read_text().splitlines()
    ours = {row["step"]: row for row in map(json.loads, lines) if "stage0/loss" in row}
    for row in tracked.rows:
        if "stage0/loss" in row:
            step = row["train/global_step"]
            assert (row["stage0/loss"], row["head/loss"]) == (
                ours[step]["stage0/loss"], ours[step]["head/loss"],
            )  # fmt: skip


def test_config_and_summary_say_what_the_run_was(tracked: Tracked):
    last = tracked.parts[-1]
    assert last.config["recipe"]["scpl"]["stages"] == 2
    assert [row["ranks"] for row in last.config["partition"]] == ["0", "1"]
    result = json.loads((tracked.folder / "result.json").read_text())
    assert last.summary["eval_accuracy"] == result["eval_accuracy"]
    assert last.summary["val/accuracy"]["max"] >= last.summary["val/accuracy"]["last"]


def test_ranks_get_no_panels_of_their_own_and_all_is_over_the_steps(tracked: Tracked):
    last = tracked.parts[-1]
    assert last.hidden == {"train/global_step", "perf/rank*"}
    axes = {axis for name, axis in last.step_metrics.items() if name != "train/global_step"}
    assert axes == {"train/global_step"} and "*" in last.step_metrics


def test_cut_predictions_and_timeline_are_there_to_look_at(tracked: Tracked):
    kinds = {"partition": "table-file", "predictions": "table-file"}
    for name, kind in {**kinds, "profile/timeline": "html-file"}.items():
        assert any(row.get(f"{name}/_type") == kind for row in tracked.rows), name
    media = tracked.folder.glob("wandb/offline-run-*/files/media/table/*.table.json")
    tables = {file.name.split("_")[0]: json.loads(file.read_text()) for file in media}
    cut = [
        dict(zip(tables["partition"]["columns"], r, strict=True))
        for r in tables["partition"]["data"]
    ]
    assert [(row["stage"], row["layers"]) for row in cut] == [(0, "0-1"), (1, "2-3")]
    assert sum(row["flops_share"] for row in cut) == pytest.approx(1)
    assert tables["predictions"]["columns"] == ["text", "label", "prediction", "probability"]
    assert len(tables["predictions"]["data"]) == 3
    assert list(tracked.folder.glob("wandb/offline-run-*/files/media/html/profile/*.html"))


def test_every_checkpoint_and_the_export_wait_to_be_uploaded_whole(tracked: Tracked):
    """Only checkpoint-8 is left in the run folder: the others were pruned after they were taken."""
    assert [path.name for path in tracked.folder.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    made = [artifact for part in tracked.parts for artifact in part.artifacts]
    run_id = tracked.parts[0].run_id
    checkpoints = [each for each in made if each.type == "checkpoint"]
    stopped = max(row["train/global_step"] for row in tracked.parts[0].history)
    assert STOP <= stopped < STEPS, "the ranks agree on a step to stop after"
    assert [each.metadata["step"] for each in checkpoints] == sorted({3, 6, stopped, STEPS})
    assert checkpoints[-1].metadata["scores"].keys() == {"val/accuracy", "val/loss"}
    assert checkpoints[0].metadata["scores"] == {}, "not evaluated at that step"
    assert all(each.name == f"checkpoint-{run_id}" for each in checkpoints)
    assert all({"latest", f"step-{each.metadata['step']}"} <= each.aliases for each in checkpoints)
    (model,) = [each for each in made if each.type == "model"]
    result = json.loads((tracked.folder / "result.json").read_text())
    assert model.metadata["scores"]["eval_accuracy"] == result["eval_accuracy"]
    assert model.files.keys() == {path.name for path in (tracked.folder / "export").iterdir()}
    for each in made:
        assert each.files
        for name, (digest, size, where) in each.files.items():
            data = Path(where).read_bytes()
            assert len(data) == size, name
            assert base64.b64encode(hashlib.md5(data).digest()).decode() == digest, name
    written = {n: Path(f[2]).read_bytes() for n, f in checkpoints[-1].files.items()}
    last = tracked.folder / f"checkpoint-{STEPS}"
    assert written == {
        path.relative_to(last).as_posix(): path.read_bytes()
        for path in last.rglob("*")
        if path.is_file()
    }


def test_wandb_sync_finds_both_parts(tracked: Tracked):
    """Without the network: what it would do."""
    folders = sorted(tracked.folder.glob("wandb/offline-run-*"))
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", *map(str, folders)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "2 run(s)" in said and all(folder.name in said for folder in folders)


class Silent(http.server.BaseHTTPRequestHandler):
    """Plays the service until it has made the run; whatever is asked after that gets no answer."""

    over = threading.Event()
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked.append(self.path)
        if b"mutation UpsertBucket" not in body:
            self.over.wait()
            return
        project = {"id": "p", "name": "scpl-ds", "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "project": project}
        made = {"data": {"upsertBucket": {"inserted": True, "bucket": bucket}}}
        answer = json.dumps(made).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the test's output."""


@contextlib.contextmanager
def no_service() -> Iterator[str]:
    """The address of nobody."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def silent_service() -> Iterator[str]:
    Silent.over.clear()
    Silent.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Silent.over.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("service", "folder", "told"),
    [
        (no_service, "offline-run-*", "this run is written offline"),
        (silent_service, "run-*", "has not confirmed the end of the run"),
    ],
)
def test_without_the_service_or_without_it_from_the_middle_on_training_is_the_same(
    service: Any, folder: str, told: str, plain_run: Path, base: dict[str, Any], tmp_path: Path
):
    pytest.importorskip("wandb")
    wandb = {"name": "wandb", "mode": "online", "init_timeout_s": 20, "finish_timeout_s": 1}
    if service is no_service:
        wandb["init_timeout_s"] = 1
    changes = {"trackers": [{**wandb, "log_model": "checkpoint"}], "train.run_name": DROP}
    recipe = recipe_for(base, "none", tmp_path / "run", **changes)
    path = write_recipe(tmp_path / "r.yaml", recipe)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    with service() as url:
        own = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
        done = subprocess.run(
            [sys.executable, "-m", "scpl_ds", "train", str(path)],
            env={**clean, **own, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert told in done.stderr and "wandb sync" in done.stderr
    assert KEY not in done.stderr + done.stdout
    found, wanted = tmp_path / "run" / f"checkpoint-{STEPS}", plain_run / f"checkpoint-{STEPS}"
    assert_same(tensors_of(found), tensors_of(wanted))
    (file,) = (tmp_path / "run").glob(f"wandb/{folder}/run-*.wandb")
    kept = read_wandb_file(file)
    steps = [row["train/global_step"] for row in kept.history if "stage0/loss" in row]
    assert steps == list(range(1, STEPS + 1)), "all of it can be sent later"
    names = [path.name for path in (tmp_path / "run" / "wandb" / "artifacts").iterdir()]
    taken = sorted((name.split("-")[0], int(name.rpartition("-")[2])) for name in names)
    assert taken == [*(("checkpoint", step) for step in (3, 6, 8)), ("model", STEPS)]
