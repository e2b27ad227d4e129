"""A world of ranks that meet in a file: no launcher, no port."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import torch.distributed as dist

from scpl_ds.distributed.world import RankEnv


def join_file_world(env: RankEnv, store: Path, *, timeout_s: float) -> None:
    """Make this process rank ``env.rank`` of a gloo world, with the variables a launcher sets.

    Returns once all ranks are connected: one that left earlier would make its peers fail.

    Args:
        store: A file that does not exist yet, the same for all ranks of this world only.
        timeout_s: Longest wait of any collective, in seconds.
    """
    os.environ.update(
        RANK=str(env.rank), WORLD_SIZE=str(env.world_size), LOCAL_RANK=str(env.local_rank),
        LOCAL_WORLD_SIZE=str(env.local_world_size), MASTER_ADDR="file", MASTER_PORT="0",
    )  # fmt: skip
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=env.rank,
        world_size=env.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    dist.barrier()
