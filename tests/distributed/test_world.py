"""The world of this process: a launcher's, the user's own, or none."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.distributed as dist

from scpl_ds.distributed.world import RankEnv, init_world
from tests.support import runs, tiny
from tests.support.distributed import distributed

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@pytest.mark.parametrize("sharding", ["none", "deepspeed"])
@distributed(2)
def test_a_world_that_the_script_made_is_taken_without_any_variable(sharding: str) -> None:
    """mp.spawn and init_process_group(rank=, world_size=): it said "1 x 1 need 1 ranks"."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    engine = runs.engine(2, sharding=sharding)
    assert engine.grid.stage_id == dist.get_rank() and engine.mesh.world_size == 2
    data = runs.batches()
    for _ in range(2):
        engine.train_batch(data)
    engine.drain()


@distributed(2)
def test_the_scripts_own_world_goes_before_stale_variables() -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1")
    del os.environ["LOCAL_RANK"]
    env = RankEnv.current()
    assert (env.rank, env.world_size, env.local_rank) == (dist.get_rank(), 2, dist.get_rank())


def test_an_address_without_a_rank_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A MASTER_ADDR left over from an earlier job made torch look for RANK: a bare ValueError."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    with tiny.own_world():
        init_world(RankEnv.current(), torch.device("cpu"), timeout_s=20)
        assert dist.get_world_size() == 1
        engine = runs.engine(2)
        engine.train_batch(itertools.islice(runs.batches(), 1))
