"""Run a test's body on forked gloo ranks: 0.1 s to start, no ports, the first failure is shown.

``@distributed(2)`` runs the test on two ranks; ``@distributed(lambda stages, dp: stages * dp)``
computes the number from the test's arguments. What a rank returns comes back to nobody: assert
inside. pytest fixtures work (they are made in the parent, before the fork).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib
import inspect
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT_S = 120
GROUP_TIMEOUT_S = 30


def distributed(ranks: int | Callable[..., int], *, limit_s: float = LIMIT_S) -> Callable[..., Any]:
    """Decorator: the body runs on every rank, inside an initialised gloo world."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(body)

        @functools.wraps(body)
        def test(*args: Any, **kwargs: Any) -> None:
            if callable(ranks):
                names = inspect.signature(ranks).parameters
                world = ranks(**{name: kwargs[name] for name in names})
            else:
                world = ranks
            run_ranks(world, functools.partial(body, *args, **kwargs), limit_s=limit_s)

        test.__signature__ = signature  # type: ignore[attr-defined]
        return pytest.mark.forks(test)

    return decorate


def run_ranks(world: int, body: Callable[[], None], *, limit_s: float = LIMIT_S) -> None:
    """Fork ``world`` ranks, run ``body`` on each, and fail with the *first* traceback of any.

    Tests that call this are marked ``forks``, so that they run first: a fork of a process in which
    DeepSpeed has run inherits the locks of threads that it does not inherit, and hangs.
    """
    ds_comm = sys.modules.get("deepspeed.comm.comm")
    assert getattr(ds_comm, "cdb", None) is None, "mark the test `forks`: it must come first"
    _import_what_ranks_use()
    with tempfile.TemporaryDirectory() as folder:
        pids = {fork_rank(rank, world, Path(folder), body): rank for rank in range(world)}
        failed = wait_for(pids, limit_s=limit_s)
        reports = sorted(
            (path.read_text() for path in Path(folder).glob("error-*")),
            key=lambda text: float(text.split("\n", 1)[0]),
        )
        if reports:
            pytest.fail(reports[0].split("\n", 1)[1], pytrace=False)
        if failed:
            pytest.fail(f"rank {failed[0][0]} ended with {failed[0][1]}", pytrace=False)


@functools.cache
def _import_what_ranks_use() -> None:
    """Once, before any fork: it takes every rank seconds. Importing starts no thread."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("deepspeed", "torch.distributed.fsdp"):
        importlib.import_module(name)


def fork_rank(rank: int, world: int, folder: Path, body: Callable[[], None]) -> int:
    """Start one rank; returns its pid. A failure is written to ``folder/error-<rank>``."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        with rank_world(rank, world, folder / "store"):
            try:
                body()
            except BaseException:
                # Before the others notice the closed connections and fail in turn.
                (folder / f"error-{rank}").write_text(
                    f"{time.monotonic()}\nrank {rank} of {world}:\n{traceback.format_exc()}"
                )
                raise
            dist.barrier()
        status = 0
    except BaseException:
        path = folder / f"error-{rank}"
        if not path.exists():
            path.write_text(
                f"{time.monotonic()}\nrank {rank} of {world}:\n{traceback.format_exc()}"
            )
    finally:
        os._exit(status)


@contextlib.contextmanager
def rank_world(rank: int, world: int, store: Path) -> Iterator[None]:
    """A gloo world over a file, with the variables a launcher sets."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="file", MASTER_PORT="0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=GROUP_TIMEOUT_S),
    )
    dist.barrier()  # a rank that leaves while a peer still connects makes that one fail
    yield
    dist.destroy_process_group()


@contextlib.contextmanager
def no_room(rank: int, limit: int = 32 * 1024) -> Iterator[None]:
    """On that rank no file can grow beyond ``limit`` bytes: writing larger ones really fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def wait_for(pids: dict[int, int], *, limit_s: float) -> list[tuple[int, str]]:
    """Wait for ranks; after the first failure give the others a moment, then end them by pid."""
    left, failed = dict(pids), []
    deadline = time.monotonic() + limit_s
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG) if left else (0, 0)
        if pid in left:
            rank = left.pop(pid)
            if status:
                code = os.waitstatus_to_exitcode(status)
                failed.append((rank, f"signal {-code}" if code < 0 else f"exit code {code}"))
                deadline = min(deadline, time.monotonic() + GROUP_TIMEOUT_S)
            continue
        if time.monotonic() > deadline:
            for pid, rank in left.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                failed.append((rank, f"nothing for {limit_s} s and was ended"))
            return failed
        time.sleep(0.005)
    return failed
