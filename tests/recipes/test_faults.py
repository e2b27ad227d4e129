"""Runs that are interrupted: told to stop, killed, broken, begun twice."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_ds.engine import Engine
from scpl_ds.errors import DataError, OtherRankFailed, RecipeError, SaveError
from scpl_ds.lock import NAME
from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.trainer import fit
from tests.support.distributed import fork_rank, run_ranks, wait_for
from tests.support.tiny import assert_same, put, recipe_for, tensors_of, train

pytestmark = pytest.mark.forks

Recipe = dict[str, Any]
SHAPES = [(2, 1), (2, 2)]
AUTO = "train.resume_from_checkpoint=auto"


LONG = {"train.num_train_epochs": 3}


def steps(data_parallel: int) -> int:
    return 3 * 8 // data_parallel


def at_step(number: int, act: Callable[[], None]) -> None:
    """Let this rank do something before its step ``number``, from 1."""
    train_batch = Engine.train_batch

    def train_after(engine: Engine, *args: Any) -> Any:
        if engine.global_steps == number - 1:
            act()
        return train_batch(engine, *args)

    Engine.train_batch = train_after  # in a fork


def with_signal(recipe: Recipe, ranks: set[int], name: str, step: int) -> Callable[[], None]:
    """The body of a rank of a run; some ranks get a signal in a step."""

    def body() -> None:
        rank = int(os.environ["RANK"])
        if rank in ranks:
            at_step(step, lambda: os.kill(os.getpid(), getattr(signal, name)))
        result = fit(recipe_from_mapping(recipe))
        folder = Path(recipe["train"]["output_dir"])
        (folder / f"result-{rank}.json").write_text(json.dumps(result))

    return body


@pytest.fixture(scope="module")
def whole(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Last checkpoint of an uninterrupted run over so many data-parallel ranks."""
    made: dict[int, Path] = {}

    def get(data_parallel: int) -> Path:
        if data_parallel not in made:
            folder = tmp_path_factory.mktemp("uninterrupted") / "run"
            recipe = recipe_from_mapping(recipe_for(base, "none", folder, **LONG))
            run_ranks(2 * data_parallel, lambda: fit(recipe) and None)
            made[data_parallel] = folder / f"checkpoint-{steps(data_parallel)}"
        return made[data_parallel]

    return get


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("who", "name"), [({0}, "SIGTERM"), ({1}, "SIGUSR1"), (None, "SIGTERM")])
def test_a_run_told_to_stop_saves_and_goes_on_to_the_same_bits(
    who: set[int] | None,
    name: str,
    shape: tuple[int, int],
    base: Recipe,
    whole: Callable[[int], Path],
    tmp_path: Path,
):
    ranks, last = shape[0] * shape[1], steps(shape[1])
    told = set(range(ranks)) if who is None else who
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **LONG)
    run_ranks(ranks, with_signal(recipe, told, name, 2))
    results = [json.loads((run / f"result-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(result["steps"] == results[0]["steps"] < last for result in results)
    assert name in results[0]["stopped"]
    saved = Path(results[0]["checkpoint"])
    assert saved.name == f"checkpoint-{results[0]['steps']}"
    assert saved.name == (run / "latest").read_text().split()[0]
    assert not (run / NAME).exists() and not (run / "result.json").exists()
    again = put(recipe, {"train.resume_from_checkpoint": "auto"})
    run_ranks(ranks, with_signal(again, set(), name, 0))
    assert_same(tensors_of(run / f"checkpoint-{last}"), tensors_of(whole(shape[1])))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_all_processes_of_a_job_saves_though_workers_get_it_too(
    name: str, base: Recipe, tmp_path: Path
):
    """They left, and the run ended with 'DataLoader worker exited unexpectedly'."""
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **LONG, **{"train.dataloader_num_workers": 2})
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        os._exit(train(recipe))
    os.waitpid(pid, os.WUNTRACED)
    os.killpg(pid, getattr(signal, name))
    os.kill(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (run / "latest").read_text().split()[0] in ("checkpoint-2", "checkpoint-3")


def test_a_signal_in_the_last_step_lets_the_run_end(base: Recipe, tmp_path: Path):
    run = tmp_path / "run"
    run_ranks(2, with_signal(recipe_for(base, "none", run), {1}, "SIGTERM", 8))
    result = json.loads((run / "result-0.json").read_text())
    assert result["steps"] == 8 and "stopped" not in result


@pytest.mark.parametrize("victim", [0, 1])
def test_first_stages_that_wait_for_nobody_stop_after_the_same_step(
    victim: int, base: Recipe, tmp_path: Path
):
    """Lanes of a frozen first stage run apart."""
    run = tmp_path / "run"
    changes = {"scpl.freeze_stages": 1, "train.num_train_epochs": 12, "train.save_steps": 100}
    recipe = recipe_for(base, "none", run, **changes)
    run_ranks(4, with_signal(recipe, {victim}, "SIGTERM", 3))
    results = [json.loads((run / f"result-{rank}.json").read_text()) for rank in range(4)]
    assert all(result["steps"] == results[0]["steps"] < 48 for result in results)


@pytest.mark.parametrize("victim", range(4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_killed_rank_ends_the_others_soon_and_they_name_it(
    victim: int, shape: tuple[int, int], base: Recipe, tmp_path: Path
):
    ranks = shape[0] * shape[1]
    if victim >= ranks:
        pytest.skip("there is no such rank")
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **{"scpl.timeout_s": 3600})
    moment = tmp_path / "moment"

    def die() -> None:
        moment.write_text(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        if int(os.environ["RANK"]) == victim:
            at_step(2, die)
        fit(recipe_from_mapping(recipe))

    pids = {fork_rank(rank, ranks, tmp_path, body): rank for rank in range(ranks)}
    failed = dict(wait_for(pids, limit_s=90))
    assert time.monotonic() - float(moment.read_text()) < 30
    assert failed == {r: "signal 9" if r == victim else "exit code 1" for r in range(ranks)}
    for rank in set(range(ranks)) - {victim}:
        said = (tmp_path / f"error-{rank}").read_text()
        stage = victim // shape[1]
        assert f"rank {victim} (stage {stage}) is no longer running" in said, said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(
    ranks: int, base: Recipe, tmp_path: Path
):
    run = tmp_path / "run"
    changes = {"deepspeed.optimizer.params.lr": 1e30, "train.logging_steps": 100}
    recipe = recipe_for(base, "none", run, **changes)

    def body() -> None:
        with pytest.raises(ArithmeticError) as caught:
            fit(recipe_from_mapping(recipe))
        (tmp_path / f"said-{os.environ['RANK']}").write_text(str(caught.value))

    run_ranks(ranks, body)
    said = (tmp_path / "said-0").read_text()
    assert "of stage 0 is nan at step 3" in said or "of stage 0 is inf at step 3" in said
    assert {(tmp_path / f"said-{rank}").read_text() for rank in range(ranks)} == {said}
    assert not list(run.glob("checkpoint-*"))


def test_a_run_whose_folder_another_took_over_saves_nothing_there(base: Recipe, tmp_path: Path):
    """As one that was suspended for longer than its lock is waited for."""
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run)

    def taken_over() -> None:
        owner = json.loads((run / NAME).read_text())
        (run / NAME).write_text(json.dumps({**owner, "host": "elsewhere", "token": "another"}))

    def body() -> None:
        if os.environ["RANK"] == "1":
            expected: Any = pytest.raises(OtherRankFailed, match="rank 0 found")
        else:
            at_step(2, taken_over)
            expected = pytest.raises(SaveError, match=r"by now: process .* on elsewhere")
        with expected:
            fit(recipe_from_mapping(recipe))

    run_ranks(2, body)
    assert not list(run.glob("checkpoint-*")) and (run / NAME).exists()


def test_a_data_file_that_was_sorted_between_two_starts_is_refused(base: Recipe, tmp_path: Path):
    """Samples were repeated and left out without a word."""
    run, copied = tmp_path / "run", tmp_path / "train.csv"
    rows = Path(base["data"]["train_file"]).read_text().splitlines()
    copied.write_text("\n".join(rows) + "\n")
    changes = {"data.train_file": str(copied), "train.export": False}
    recipe = recipe_for(base, "none", run, **changes)

    def start(max_steps: int, wanted: str | None) -> None:
        given = {"train.max_steps": max_steps, "train.resume_from_checkpoint": "auto"}
        with pytest.raises(DataError, match=wanted) if wanted else contextlib.nullcontext():
            fit(recipe_from_mapping(put(recipe, given)))

    run_ranks(2, lambda: start(3, None))
    copied.write_text("\n".join([rows[0], *sorted(rows[1:])]) + "\n")
    run_ranks(1, lambda: start(6, "samples are not those of the checkpoint: as many, 64, but"))
    copied.write_text("\n".join(rows) + "\n")
    run_ranks(1, lambda: start(6, None))
    assert (run / "checkpoint-6").is_dir()


def test_a_loss_that_explodes_and_stays_a_number_costs_no_checkpoint_from_before(
    base: Recipe, tmp_path: Path
):
    """With save_total_limit: 1 a loss of 1e6 was saved over the last good checkpoint."""
    run = tmp_path / "run"
    changes = {"train.save_total_limit": 1, "deepspeed.gradient_clipping": 1.0}
    recipe = recipe_for(base, "none", run, **changes)

    def explode() -> None:
        for module in gc.get_objects():
            if isinstance(module, torch.nn.Linear) and module.out_features == 2:
                module.weight.data.mul_(1e7)

    def body() -> None:
        at_step(5, explode)
        fit(recipe_from_mapping(recipe))

    run_ranks(1, body)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-8",
    ]


def test_a_folder_in_which_another_run_trains_is_refused(base: Recipe, tmp_path: Path):
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run, **{"train.max_steps": 2, "train.export": False})
    pid = os.fork()
    if pid == 0:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        os._exit(train(recipe))

    def another() -> None:  # in forks as well: a process that has trained is not forked from
        for resume in (False, "auto"):
            again = put(recipe, {"train.resume_from_checkpoint": resume})
            with pytest.raises(RecipeError, match=f"in use by another run: process {pid} on "):
                fit(recipe_from_mapping(again))

    try:
        os.waitpid(pid, os.WUNTRACED)
        run_ranks(1, another)
    finally:
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
    assert status == 0 and (run / "checkpoint-2").is_dir()
