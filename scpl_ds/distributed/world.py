"""Who this process is, and the one process group everything else is made from."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from scpl_ds.distributed.slurm import variables_of_step
from scpl_ds.errors import RecipeError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class RankEnv:
    """Who this process is. Without a launcher or a world: one process, rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def current(cls) -> RankEnv:
        """The word of the world that the user's script made, or else of the launcher. What
        ``srun`` says is put into ``os.environ`` as others say it, where torch and DeepSpeed look.

        A script that made its own (``mp.spawn``, ``init_process_group(rank=, world_size=)``) need
        not have set any variable; those of the node are then guessed from the rank.

        Raises:
            RecipeError: There is no world, and the launcher set some variables but not others.
        """
        if not dist.is_initialized():
            os.environ.update(variables_of_step(os.environ))
            return cls.from_environ()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        return cls(rank, world_size, local_rank, _local_world_size(os.environ, world_size))

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> RankEnv:
        """Read the five variables that ``deepspeed``, ``torchrun`` and ``accelerate`` set.

        Raises:
            RecipeError: Some of them are set and others are missing, or one is not a number.
        """
        if "WORLD_SIZE" not in environ and "RANK" not in environ:
            return cls()
        missing = [name for name in _VARIABLES if name not in environ]
        if missing:
            raise RecipeError(
                f"The launcher set {', '.join(n for n in _VARIABLES if n in environ)} but not "
                f"{', '.join(missing)}. Start with `deepspeed` or `torchrun`, or unset them all "
                "to run in one process."
            )
        try:
            rank, world_size, local_rank = (int(environ[name]) for name in _VARIABLES[:3])
        except ValueError as error:
            raise RecipeError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from None
        return cls(rank, world_size, local_rank, _local_world_size(environ, world_size))


def _local_world_size(environ: Mapping[str, str], world_size: int) -> int:
    # torchrun says LOCAL_WORLD_SIZE, deepspeed says LOCAL_SIZE.
    return int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or world_size)


def pick_device(env: RankEnv) -> torch.device:
    """The GPU of this rank, or the CPU when there is none. Ranks share GPUs when there are too
    few."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", env.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def set_cpu_threads(env: RankEnv) -> None:
    """Share this node's cores among its ranks, unless OMP_NUM_THREADS says otherwise.

    Without it every rank starts as many threads as there are cores and they fight over them.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, (cores or 1) // max(1, env.local_world_size)))


def init_world(env: RankEnv, device: torch.device, *, timeout_s: float) -> None:
    """Set up ``torch.distributed`` for this process, unless the user's script did so already.

    One process without a launcher gets a world of one, with no port and no file.

    Args:
        timeout_s: Longest wait of any collective, in seconds.
    """
    if dist.is_initialized():
        return
    # NCCL makes its connections at the first use, so naming it is free where ranks share a GPU.
    has_nccl = device.type == "cuda" and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    timeout = datetime.timedelta(seconds=timeout_s)
    launched = "RANK" in os.environ or "WORLD_SIZE" in os.environ  # an address alone may be stale
    if env.world_size == 1 and not launched:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables for the length of a block (libraries that read the launcher's)."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def has_begun() -> bool:
    """Whether this process is part of a world."""
    return dist.is_initialized()


def shut_down() -> None:
    """Leave the world; safe to call twice. After an error the others notice the closed
    connections."""
    if dist.is_initialized():
        dist.destroy_process_group()
