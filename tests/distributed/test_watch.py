"""A rank that is gone or fails ends the others soon, and they say which it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scpl_ds.distributed.collectives import barrier
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.watch import Watch
from tests.support.distributed import distributed, fork_rank, wait_for

pytestmark = pytest.mark.forks

RANKS = 3


def run(folder: Path, body: Callable[[Mesh, Watch], None], *, grace_s: float) -> dict[int, str]:
    """What each of the ranks that did not end well ended with; the timeout is an hour."""

    def watched() -> None:
        mesh = Mesh(RANKS, 1, "cpu", timeout_s=3600)
        with Watch(mesh, log_of=lambda rank: folder / f"rank{rank}.log", grace_s=grace_s) as watch:
            watch.tell_stages([mesh.rank])
            body(mesh, watch)

    pids = {fork_rank(rank, RANKS, folder, watched): rank for rank in range(RANKS)}
    return dict(wait_for(pids, limit_s=60))


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_killed_rank_is_named_by_all_others(tmp_path: Path, victim: int):
    def body(mesh: Mesh, watch: Watch) -> None:
        if mesh.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        barrier(mesh)

    failed = run(tmp_path, body, grace_s=30)
    assert failed == {
        rank: "signal 9" if rank == victim else "exit code 1" for rank in range(RANKS)
    }
    for rank in set(range(RANKS)) - {victim}:
        said = (tmp_path / f"error-{rank}").read_text()
        assert f"rank {rank} (stage {rank}) stops: rank {victim} (stage {victim}) is no " in said


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_rank_that_raises_is_quoted_by_all_others(tmp_path: Path, victim: int):
    def body(mesh: Mesh, watch: Watch) -> None:
        if mesh.rank == victim:
            raise KeyError("no such column")
        barrier(mesh)

    failed = run(tmp_path, body, grace_s=30)
    assert failed == dict.fromkeys(range(RANKS), "exit code 1")
    for rank in set(range(RANKS)) - {victim}:
        said = (tmp_path / f"error-{rank}").read_text()
        assert f"rank {victim} (stage {victim}) failed: KeyError: 'no such column'" in said


@pytest.mark.parametrize("killed", [True, False])
def test_a_rank_that_waits_where_nobody_answers_is_ended(tmp_path: Path, killed: bool):
    """As in a collective of NCCL, which does not see that a peer is gone."""

    def body(mesh: Mesh, watch: Watch) -> None:
        if mesh.rank == 1 and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if mesh.rank == 1:
            raise ValueError
        reads, _ = os.pipe()
        os.read(reads, 1)

    began = time.monotonic()
    failed = run(tmp_path, body, grace_s=1)
    assert time.monotonic() - began < 20
    assert failed[0] == failed[2] == "exit code 1"
    for rank in (0, 2):
        assert "body" in (tmp_path / f"rank{rank}.log").read_text()  # where it was


def test_a_rank_that_stands_still_is_told_of_after_the_timeout(tmp_path: Path):
    """Its connections stay open: a process that was stopped, a machine that lost its power."""

    def body(mesh: Mesh, watch: Watch) -> None:
        if mesh.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        reads, _ = os.pipe()
        os.read(reads, 1)

    def watched() -> None:
        mesh = Mesh(RANKS, 1, "cpu", timeout_s=5)
        with Watch(mesh, log_of=lambda rank: tmp_path / f"rank{rank}.log", grace_s=1) as watch:
            watch.tell_stages([mesh.rank])
            body(mesh, watch)

    pids = [fork_rank(rank, RANKS, tmp_path, watched) for rank in range(RANKS)]
    try:
        failed = dict(wait_for({pids[rank]: rank for rank in (0, 2)}, limit_s=60))
    finally:
        os.kill(pids[1], signal.SIGKILL)
        os.waitpid(pids[1], 0)
    assert failed == {0: "exit code 1", 2: "exit code 1"}
    said = (tmp_path / "rank0.log").read_text()
    assert "Where this rank was when it was ended" in said


@distributed(RANKS)
def test_ranks_that_end_at_different_times_miss_nobody() -> None:
    mesh = Mesh(RANKS, 1, "cpu", timeout_s=25)
    for _ in range(3):
        with Watch(mesh, log_of=lambda rank: Path(f"rank{rank}.log"), grace_s=30) as watch:
            if mesh.rank == 2:
                time.sleep(0.1)
        assert watch._local is None and not watch._told()
