"""Processes that prepare batches, which outlive what asks a whole job to stop."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

_ASK_TO_STOP = {signal.SIGTERM, signal.SIGUSR1}


def in_processes(dataset: Dataset[Any], **options: Any) -> Iterator[Any]:
    """Iterate a ``DataLoader`` of these options, whose workers only their own rank ends.

    A batch system that pre-empts a job sends SIGTERM or SIGUSR1 to all of its processes. The rank
    then trains its step to the end and saves: a worker that left would fail that step.
    """
    loader = DataLoader(dataset, worker_init_fn=_heed_only_the_rank, **options)
    # Workers are forked with these signals blocked, so that none comes before the function above.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASK_TO_STOP)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_only_the_rank(worker: int) -> None:
    """In a worker, before it has a thread or reads a sample."""
    del worker
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASK_TO_STOP)
    threading.Thread(target=_end_with_the_rank, args=(_parent(),), daemon=True).start()


def _parent() -> int:
    rank = multiprocessing.parent_process()
    return os.getppid() if rank is None or rank.pid is None else rank.pid


def _end_with_the_rank(rank: int) -> None:
    # Not SIG_IGN: a rank that exits ends its workers by SIGTERM and then waits for them.
    while True:
        found = signal.sigwaitinfo(_ASK_TO_STOP)
        if found is not None and found.si_signo == signal.SIGTERM and found.si_pid == rank:
            os._exit(0)
