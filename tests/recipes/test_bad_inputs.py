"""What cannot be trained is refused by `scpl-ds` itself: exit code 2, one message, nothing
written."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.cli import main
from tests.support import tiny
from tests.support.bad_inputs import CASES, LAYERS, Case
from tests.support.tiny import put, write_recipe

Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A good recipe and its files; copied by what damages them."""
    return tiny.make(tmp_path_factory.mktemp("good"), num_hidden_layers=LAYERS)


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that is refused and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.count("scpl-ds: ") == 1, said.err
    assert sorted(folder.rglob("*")) == before
    return said.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_refused_before_anything_is_trained_or_written(
    case: Case, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = put(base, {"train.output_dir": str(tmp_path / "run"), **case.changes})
    if case.prepare is not None:
        recipe = put(recipe, case.prepare(tmp_path, recipe))
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    message = refused(["train", str(path), *case.overrides], tmp_path, capsys)
    assert message.startswith("scpl-ds: "), f"something else was said first: {message}"
    for word in case.words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "nowhere.yaml"], ("nowhere.yaml does not exist",)),
        (["nowhere.yaml"], ("nowhere.yaml does not exist",)),
        (["train", "broken.yaml"], ("broken.yaml is not valid YAML", "line 3")),
        (["train", "good.yaml", "scpl.stages"], ("scpl.stages", "key=value")),
        (["train", "good.yaml", "--max_steps=3"], ("--max_steps=3",)),
        (["eval", "nowhere"], ("nowhere is not a run folder", "scpl-ds train RECIPE")),
        (["export", "nowhere", "out"], ("nowhere is not a run folder",)),
        (["export", "nowhere", "out", "a=1"], ("takes no overrides",)),
        (["plan", "good.yaml", "scpl.stages=9"], ("6 layers", "9")),
        (["plan", "good.yaml", "--ranks", "0"], ("ranks",)),
        (["trian", "good.yaml"], ("trian",)),
        ([], ("COMMAND",)),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_refused(
    argv: list[str],
    words: tuple[str, ...],
    base: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "good.yaml", base)
    (tmp_path / "broken.yaml").write_text("model: {name_or_path: demo}\nscpl: {stages: 2\n")
    message = refused(argv, tmp_path, capsys)
    for word in words:
        assert word in message


def test_ranks_that_do_not_fit_are_refused_before_a_world_is_made(
    base: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Nobody listens at that address: a rendezvous would wait for ever."""
    for name, value in rank_env(rank=0, world_size=3, port=1).items():
        monkeypatch.setenv(name, value)
    changes = {"scpl.pipeline_ranks": 2, "train.output_dir": str(tmp_path / "run")}
    path = write_recipe(tmp_path / "mine.yaml", put(base, changes))
    message = refused(["train", str(path)], tmp_path, capsys)
    assert "2 pipeline ranks x 1 dp rank need 2 ranks, but WORLD_SIZE is 3" in message


def rank_env(*, rank: int, world_size: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in values.items()}


# -- as processes --------------------------------------------------------------------------


def start(argv: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scpl_ds", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"scpl.stage": 2}, "scpl.stage: unknown key"),
        ({"scpl.stages": 7}, "6 layers"),
        ({"data.train_file": "nowhere.csv"}, "nowhere.csv does not exist"),
    ],
    ids=["recipe", "model", "data"],
)
def test_the_process_itself_ends_with_2_and_one_message(
    changes: dict[str, Any], word: str, base: Recipe, tmp_path: Path
):
    recipe = put(base, {"train.output_dir": str(tmp_path / "run"), **changes})
    process = start(["train", str(write_recipe(tmp_path / "mine.yaml", recipe))])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("scpl-ds: ") and word in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_what_only_one_rank_can_see_ends_both_at_once_with_one_message(
    base: Recipe, tmp_path: Path
):
    """Data are read on the first stage's rank alone; the other would wait for its first batch."""
    changes = {"train.output_dir": str(tmp_path / "run"), "data.train_file": "nowhere.csv"}
    path = write_recipe(tmp_path / "mine.yaml", put(base, changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        start(["train", str(path)], **rank_env(rank=rank, world_size=2, port=port))
        for rank in range(2)
    ]
    # Waiting for a batch ends after scpl.timeout_s, which is 600.
    said = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert said[0].startswith("scpl-ds: DataError") and "nowhere.csv does not exist" in said[0]
    assert said[1] == ""
    assert not (tmp_path / "run").exists()
