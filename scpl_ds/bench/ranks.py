"""Ranks of one measured system: forked from this process, idle in a pipe until they are told to
run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar, cast

import torch

from scpl_ds.bench import hosts
from scpl_ds.distributed.collectives import barrier
from scpl_ds.distributed.file_world import join_file_world
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.world import RankEnv
from scpl_ds.errors import ScplError
from scpl_ds.meter import MemoryWatch
from scpl_ds.timeline import Timeline

T = TypeVar("T")
WARM_UP_STEPS = 2
_PR_SET_PDEATHSIG = 1
_CPU = torch.device("cpu")


class System(Protocol):
    """What one rank of a system can do once it is built."""

    @property
    def timeline(self) -> Timeline | None: ...

    @property
    def bytes_sent(self) -> int | None:
        """To other ranks, since the beginning; None where nobody counts."""
        ...

    def run(self, steps: int) -> None:
        """Whole optimizer steps; at the end nothing of this rank's is on its way any more."""
        ...


Build = Callable[[Mesh, torch.device], System]


class Report(NamedTuple):
    """One run as one rank saw it."""

    began: float
    """Seconds of the monotonic clock, which all processes of a machine share."""
    ended: float
    totals: dict[str, float]
    """``Timeline.totals`` of the run; empty without a timeline."""
    bytes_sent: int | None
    peak_memory: int
    """Bytes beyond what the process had before the system was built, since then."""
    cpu_s: float
    """Seconds of processor time of all the process's threads."""


class World:
    """The ranks of one system. Use as a context manager: leaving it ends them.

    The parent must not have started threads (OpenMP's by a computation on several, DeepSpeed's):
    a fork inherits their locks but not the threads. What it has imported costs the ranks nothing.

    Args:
        name: For messages.
        build: Called on every rank, in the fork: makes the system, whose first steps then run
            unmeasured.
        ranks: Processes.
        data_parallel: Of them at the same place of the pipeline.
        threads: Of each rank.
        cores: Where each rank may run; None leaves it to the system.
        namespaces: Network namespaces, as many ranks in each; empty: the parent's.
        limit_s: A rank that says nothing for so long is ended, and the others with it.

    Raises:
        ScplError: A rank failed or was too slow; the text is what the first one said.
    """

    def __init__(
        self,
        name: str,
        build: Build,
        *,
        ranks: int,
        data_parallel: int = 1,
        threads: int = 1,
        cores: Sequence[Sequence[int]] | None = None,
        namespaces: Sequence[str] = (),
        limit_s: float = 300,
    ) -> None:
        self.name, self._limit_s = name, limit_s
        self._folder = tempfile.TemporaryDirectory(prefix="scpl-bench-")
        self._pipes: list[Connection] = []
        self._pids: list[int] = []
        folder = Path(self._folder.name)

        def body(rank: int, pipe: Connection) -> None:
            if cores is not None:
                os.sched_setaffinity(0, cores[rank])
            each = ranks // (len(namespaces) or 1)
            link = None
            if namespaces:
                link = Link(hosts.enter(namespaces[rank // each]), counts=rank % each == 0)
            torch.set_num_threads(threads)
            env, patience = RankEnv(rank, ranks, rank, ranks), limit_s / 2  # so that it says why
            join_file_world(env, folder / "store", timeout_s=patience)
            mesh = Mesh(ranks // data_parallel, data_parallel, _CPU, timeout_s=patience)
            _serve(pipe, mesh, build, link)

        try:
            for rank in range(ranks):
                pid, pipe = _fork(body, rank, folder / f"{rank}.log")
                self._pids.append(pid)
                self._pipes.append(pipe)
            self._answers()
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Of the ranks; empty once they are ended."""
        return list(self._pids)

    def run(self, steps: int) -> list[Report]:
        """Let all ranks run ``steps`` optimizer steps, from a barrier on; one report a rank."""
        self._signal(signal.SIGCONT)
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # gone: its end is found below
                pipe.send(steps)
        reports = self._answers()
        self._signal(signal.SIGSTOP)
        return reports

    def _signal(self, number: int) -> None:
        """Idle ranks are stopped: the threads of each gloo group look for work 100 times a second,
        which for all systems together took a fifth of a core."""
        for pid in self._pids:
            os.kill(pid, number)  # not reaped yet, so the number is still its own

    def close(self) -> None:
        """End the ranks; safe to call twice."""
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
            os.waitpid(pid, 0)
        for pipe in self._pipes:
            _parents_ends.discard(pipe)
            pipe.close()
        self._pids, self._pipes = [], []
        self._folder.cleanup()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self) -> list[Any]:
        """One answer of every rank, in rank order; on a failure all ranks are ended."""
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self._limit_s
        while len(answers) < len(self._pipes):
            silent = {p: r for r, p in enumerate(self._pipes) if r not in answers}
            ready = wait(list(silent), timeout=max(0.0, deadline - time.monotonic()))
            failures: list[tuple[float, str]] = []
            for pipe in ready:
                rank = silent[pipe]  # type: ignore[index]
                try:
                    when, error, answer = self._pipes[rank].recv()
                except (EOFError, OSError):
                    when, error, answer = float("inf"), self._last_words(rank), None
                if error is not None:
                    failures.append((when, f"rank {rank}: {error}"))
                answers[rank] = answer
            if not ready:
                ranks = ", ".join(map(str, sorted(silent.values())))
                failures = [(0.0, f"rank {ranks} said nothing for {self._limit_s:g} s; ended")]
            if failures:
                self.close()
                raise ScplError(min(failures)[1])
        return [answers[rank] for rank in sorted(answers)]

    def _last_words(self, rank: int) -> str:
        said = (Path(self._folder.name) / f"{rank}.log").read_text(errors="replace").strip()
        return f"its process ended without a word{': ...' + said[-300:] if said else ''}"


def in_a_fork(function: Callable[[], T]) -> T:
    """What ``function`` returns, computed in a process of its own (its threads stay there).

    Raises:
        ScplError: It failed.
    """
    ((_, answer),) = in_forks([function], jobs=1)
    if isinstance(answer, ScplError):
        raise answer
    return answer


def in_forks(
    functions: Sequence[Callable[[], T]], *, jobs: int
) -> Iterator[tuple[int, T | ScplError]]:
    """What each function returns, computed in a process of its own, up to ``jobs`` at a time; the
    number of the function beside it, in the order in which they end. One that failed gives its
    error. The processes end with the iterator."""
    waiting = list(enumerate(functions))[::-1]
    running: dict[Connection, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(prefix="scpl-bench-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number, function = waiting.pop()
                    log = Path(folder) / f"{number}.log"
                    pid, pipe = _fork(functools.partial(_answer_with, function), number, log)
                    running[pipe] = (number, pid)
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    number, pid = running.pop(pipe)
                    try:
                        _, error, answer = pipe.recv()
                    except (EOFError, OSError):
                        said = (Path(folder) / f"{number}.log").read_text(errors="replace").strip()
                        error = f"a forked process ended without a word: ...{said[-300:]}"
                        answer = None
                    finally:
                        _end(pid, pipe)
                    yield number, cast(T, answer) if error is None else ScplError(error)
        finally:
            for pipe, (_, pid) in running.items():
                _end(pid, pipe)


def _answer_with(function: Callable[[], Any], number: int, pipe: Connection) -> None:
    del number
    _answer(pipe, function())


def _end(pid: int, pipe: Connection) -> None:
    os.kill(pid, signal.SIGKILL)  # has answered, or is not to; not reaped yet
    os.waitpid(pid, 0)
    _parents_ends.discard(pipe)
    pipe.close()


_parents_ends: set[Connection] = set()
"""A fork closes these: as long as any process holds the other end of its pipe, it would not see
that the parent is gone."""


def _fork(body: Callable[[int, Connection], None], rank: int, log: Path) -> tuple[int, Connection]:
    """Start a process that runs ``body``; the error it ends with goes through its pipe."""
    here, there = Pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(body, rank, log, there, here)
    there.close()
    _parents_ends.add(here)
    return pid, here


def _child(
    body: Callable[[int, Connection], None],
    rank: int,
    log: Path,
    pipe: Connection,
    other_end: Connection,
) -> NoReturn:
    status = 1
    with contextlib.suppress(OSError, AttributeError):  # Linux: a stopped rank outlives nobody
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        for end in (other_end, *_parents_ends):
            end.close()
        # What libraries print belongs neither into the table nor between two lines of progress.
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        body(rank, pipe)
        status = 0
    except EOFError:
        pass  # the parent is gone
    except BaseException as error:
        traceback.print_exc()
        # Before the connections to the other ranks close and they fail in turn.
        with contextlib.suppress(OSError):
            pipe.send((time.monotonic(), f"{type(error).__name__}: {error}", None))
    finally:
        os._exit(status)


def _answer(pipe: Connection, answer: Any) -> None:
    pipe.send((time.monotonic(), None, answer))


class Link(NamedTuple):
    """The interface of a host."""

    name: str
    counts: bool
    """This rank reports what the host has sent; another rank of the host does not."""

    def bytes_sent(self) -> int:
        return hosts.bytes_out(self.name) if self.counts else 0


def _serve(pipe: Connection, mesh: Mesh, build: Build, link: Link | None) -> None:
    """``link``: whose bytes are counted; None: the system counts its own."""
    _touch_libraries()
    watch = MemoryWatch(_CPU)
    watch.restart()
    system = build(mesh, _CPU)
    system.run(WARM_UP_STEPS)
    barrier(mesh)
    _answer(pipe, None)

    def bytes_sent() -> int | None:
        return system.bytes_sent if link is None else link.bytes_sent()

    for steps in _orders(pipe):
        cpu_s, sent = time.process_time(), bytes_sent()
        barrier(mesh)
        if system.timeline is not None:
            system.timeline.restart()
        began = time.monotonic()
        system.run(steps)
        ended = time.monotonic()
        totals = {} if system.timeline is None else system.timeline.totals()
        if link is not None:
            barrier(mesh)  # the other ranks of the host have sent theirs, too
        now = bytes_sent()
        sent = None if now is None or sent is None else now - sent
        cpu_s = time.process_time() - cpu_s
        _answer(pipe, Report(began, ended, totals, sent, watch.peak(), cpu_s))


def _orders(pipe: Connection) -> Iterator[int]:
    while True:
        yield pipe.recv()  # blocks in the kernel: an idle system takes no processor time


def _touch_libraries() -> None:
    """Map what torch maps at its first use: a fork starts without the pages of libraries, and they
    are not the system's memory."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    layer(torch.randn(2, 16, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()
