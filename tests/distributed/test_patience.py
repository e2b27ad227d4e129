"""Waiting for a rank whose work has no length known beforehand: tokenising, exporting, scoring."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.errors import DataError, OtherRankFailed
from scpl_ds.setup import together
from tests.support.distributed import distributed, fork_rank, wait_for

pytestmark = pytest.mark.forks

TIMEOUT_S = 1.5
LONG_S = 2 * TIMEOUT_S  # has to pass for real: what is tested is that nobody minds


@pytest.mark.parametrize("slow", [0, 1])
@distributed(3)
def test_work_longer_than_the_timeout_ends_no_run(slow: int) -> None:
    """Tokenising, or exporting and scoring at the end, used to meet the collectives' timeout."""
    mesh = Mesh(3, 1, "cpu", timeout_s=TIMEOUT_S)

    def work() -> int:
        if mesh.rank == slow:
            time.sleep(LONG_S)
        return mesh.rank

    assert together(mesh, work) == mesh.rank


@distributed(2)
def test_a_long_wait_is_told_and_for_whom(caplog: pytest.LogCaptureFixture) -> None:
    mesh = Mesh(2, 1, "cpu", timeout_s=TIMEOUT_S)
    if mesh.rank == 0:
        time.sleep(LONG_S)
    with caplog.at_level("WARNING"):
        wait_for_all(mesh)
    if mesh.rank == 1:
        assert "still waiting for rank 0" in caplog.text


@distributed(2)
def test_a_problem_found_after_a_long_time_is_told_by_its_rank() -> None:
    mesh = Mesh(2, 1, "cpu", timeout_s=TIMEOUT_S)

    def work() -> None:
        if mesh.rank == 0:
            time.sleep(LONG_S)
            raise DataError("no such column")

    with pytest.raises(DataError if mesh.rank == 0 else OtherRankFailed):
        together(mesh, work)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_killed_at_its_work_ends_the_others_at_once(tmp_path: Path, victim: int) -> None:
    """The timeout is an hour: it is not what ends them."""

    def body() -> None:
        mesh = Mesh(3, 1, "cpu", timeout_s=3600)
        if dist.get_rank() == victim:
            time.sleep(TIMEOUT_S)  # the others wait by now
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_all(mesh)

    pids = {fork_rank(rank, 3, tmp_path, body): rank for rank in range(3)}
    began = time.monotonic()
    failed = dict(wait_for(pids, limit_s=60))
    assert time.monotonic() - began < 20
    assert failed == {rank: "signal 9" if rank == victim else "exit code 1" for rank in range(3)}
    for rank in {0, 1, 2} - {victim}:
        said = (tmp_path / f"error-{rank}").read_text()
        assert "BoundaryError" in said and "is no longer running" in said
