"""Who failed first, told to every rank; no rank outlives the others for long."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from scpl_ds.distributed.board import own_connection
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import BoundaryError, OtherRankFailed, ScplError

log = logging.getLogger(__name__)

THREADS = "scpl-watch"
"""Name of the threads of a watch: Python must not end while one of them is outside it."""
GRACE_S = 12.0
"""From the first failure anywhere to the end of a rank that has not noticed by itself: it computes,
or waits in a collective that does not see a closed connection (NCCL)."""
_POLL_S = 0.5
_BEAT_S = 2.0
"""How often a rank says that it is there."""
_LEAST_S = 20.0
"""Shorter silences are no sign of anything, however small ``scpl.timeout_s`` is."""
_PATIENCE_S = 3.0
"""How long a rank that lost a neighbour waits to be told who failed first."""
_WITHOUT_LIMIT = datetime.timedelta(days=365)


class Failure(NamedTuple):
    """Why a rank stopped. ``kind``: ``own``, its own mistake; ``killed``, its process is gone and
    said nothing; ``silent``, it stands still; ``unsure``, it lost another rank, or says so."""

    rank: int
    kind: Literal["own", "killed", "silent", "unsure"]
    text: str


class Watch:
    """Around the work of one rank of a run: on every rank, from the same point on.

    Each rank has a connection to the next one (the last to the first) that closes with the process
    at its other end, and looks twice a second whether the rendezvous store holds a failure. A rank
    that fails says why there; one that is gone is told by the rank before it, and so is one that
    gives no sign of life for ``scpl.timeout_s`` (stopped, or its machine is off). A rank that
    stops because it lost a neighbour raises a ``BoundaryError`` that names the rank that failed
    first, and one that has not noticed ends ``grace_s`` later with exit code 1.

    Args:
        mesh: The ranks.
        log_of: Rank -> its log file, for messages.
        grace_s: See ``GRACE_S``.
    """

    def __init__(
        self, mesh: Mesh, *, log_of: Callable[[int], Path], grace_s: float = GRACE_S
    ) -> None:
        self._mesh, self._log_of, self._grace_s = mesh, log_of, grace_s
        self._alone = mesh.world_size == 1
        self._stages: list[Sequence[int]] = []
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._failed = threading.Event()
        self._local: Failure | None = None
        self._posted: BaseException | None = None
        self.token = uuid.uuid4().hex[:12]
        """Of this run, the same on every rank: a store outlives a run."""

    # -- the life of a watch ---------------------------------------------------------------

    def __enter__(self) -> Watch:
        if self._alone:
            return self
        mesh = self._mesh
        self.token = broadcast_object(mesh, self.token)
        self._store = own_connection(_get_default_store())
        # A group of its own: a timeout elsewhere poisons the connections of its group.
        self._group = mesh.new_group(None, backend="gloo")
        self._word = torch.zeros(1)
        arriving = dist.irecv(self._word, self._next, group=self._group)
        for work, given in ((self._listen, (arriving,)), (self._look, ())):
            thread = threading.Thread(target=work, args=given, name=THREADS, daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._part()
        elif isinstance(error, OtherRankFailed):
            self._closed.set()
        else:
            self._give_up(error)

    @property
    def _next(self) -> int:
        return (self._mesh.rank + 1) % self._mesh.world_size

    def tell_stages(self, stages: Sequence[int]) -> None:
        """Which stages this rank has, so that the others can name them (waits for all ranks)."""
        self._stages = gather_objects(self._mesh, list(stages))

    def tell(self, error: BaseException) -> None:
        """Let the others know at once why this rank stops, before it tidies up. Once an error."""
        if self._alone or isinstance(error, OtherRankFailed) or self._posted is error:
            return
        self._posted = error
        self._post(self._failure(error))

    def _failure(self, error: BaseException) -> Failure:
        text = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:500]
        return Failure(self._mesh.rank, "unsure" if _lost(error) else "own", text)

    def _part(self) -> None:
        """The work is done everywhere: nobody is to be missed any more."""
        self._closed.set()
        if self._alone:
            return
        previous = (self._mesh.rank - 1) % self._mesh.world_size
        with contextlib.suppress(RuntimeError):  # it has parted already
            dist.isend(torch.ones(1), previous, group=self._group).wait()  # pyright: ignore
        for thread in self._threads:  # Python must not end while one of them is outside it
            thread.join(self._grace_s)

    def _give_up(self, error: BaseException) -> None:
        self.tell(error)
        own = self._failure(error)
        first = self._wait_for_cause() if _lost(error) and not self._alone else None
        self._closed.set()
        if first is not None and first.rank != self._mesh.rank:
            raise BoundaryError(
                f"{self._name(self._mesh.rank)} stops: {self._describe(first)}"
            ) from error
        if self._stages:
            error.add_note(f"This is {self._name(self._mesh.rank)}; {self._where(own.rank)}.")
        if not isinstance(error, ScplError):  # those are told by whoever catches them
            log.error("%s failed: %s; %s", self._name(own.rank), own.text, self._where(own.rank))
            log.debug("traceback of the failure", exc_info=error)
        if self._mesh.rank == 0 and not self._alone:
            time.sleep(4 * _POLL_S)  # the store may end with this process

    # -- words in the store ----------------------------------------------------------------

    def _key(self, name: object) -> str:
        return f"scpl/failed/{self.token}/{name}"

    def _post(self, failure: Failure) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: nobody reads it
            number = self._store.add(self._key("count"), 1)
            self._store.set(self._key(number), json.dumps(failure))

    def _told(self) -> list[Failure]:
        """All failures so far, in the order they were told."""
        found: list[Failure] = []
        try:
            while self._store.check([self._key(len(found) + 1)]):
                found.append(Failure(*json.loads(self._store.get(self._key(len(found) + 1)))))
        except RuntimeError:
            if not found:
                found = [self._store_lost()]
        return found

    def _store_lost(self) -> Failure:
        text = "the rendezvous store is gone, which lives in it or in the launcher beside it"
        return Failure(0, "killed", text)

    def _wait_for_cause(self) -> Failure | None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            told = self._told()
            told += [self._local] if self._local is not None else []
            causes = [failure for failure in told if failure.kind != "unsure"]
            if causes or time.monotonic() > deadline:
                return causes[0] if causes else None
            time.sleep(_POLL_S / 10)

    # -- threads ---------------------------------------------------------------------------

    def _listen(self, arriving: Any) -> None:
        """Wait for the next rank's last word; none comes when its process is gone."""
        try:
            arriving.wait(_WITHOUT_LIMIT)
        except RuntimeError:
            if self._closed.is_set() or any(f.rank == self._next for f in self._told()):
                return
            self._local = Failure(self._next, "killed", "its process is gone")
            self._post(self._local)
            self._failed.set()

    def _look(self) -> None:
        pulse = _Pulse(self._store, self._key, self._mesh.rank, self._next)
        while not self._closed.wait(_POLL_S):
            if self._failed.is_set() or self._told():
                break
            if (silence := pulse.beat()) > max(self._mesh.timeout_s, _LEAST_S):
                text = f"it has given no sign of life for {silence:.0f} s"
                self._local = Failure(self._next, "silent", text)
                self._post(self._local)
                break
        # A rank that is tidying up after its own failure is let be.
        if self._closed.wait(self._grace_s) or self._posted is not None:
            return
        first = self._wait_for_cause() or next(iter(self._told()), None)
        if first is not None and not self._closed.is_set():
            self._end(first)

    def _end(self, first: Failure) -> None:
        """This rank is somewhere it cannot be called back from."""
        log.error(
            "%s is ended, %.0f s later: %s",
            self._name(self._mesh.rank), self._grace_s, self._describe(first),
        )  # fmt: skip
        with contextlib.suppress(OSError), self._log_of(self._mesh.rank).open("a") as file:
            file.write("Where this rank was when it was ended:\n")
            file.flush()
            faulthandler.dump_traceback(file)
        os._exit(1)

    # -- words for people ------------------------------------------------------------------

    def _name(self, rank: int) -> str:
        stages = self._stages[rank] if self._stages else []
        if not stages:
            return f"rank {rank}"
        return f"rank {rank} (stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))})"

    def _where(self, rank: int) -> str:
        path = self._log_of(rank)
        return f"its log is {path}" if path.exists() else "it had no log yet"

    def _describe(self, failure: Failure) -> str:
        where = self._where(failure.rank)
        if failure.kind == "killed":
            return (
                f"{self._name(failure.rank)} is no longer running and did not say why: "
                f"{failure.text}. It was killed (out of memory? `dmesg` tells) or crashed; {where}."
            )
        if failure.kind == "silent":
            return (
                f"{self._name(failure.rank)} stands still: {failure.text} (scpl.timeout_s). Its "
                f"process was stopped, or its machine is off or cut off; {where}."
            )
        return f"{self._name(failure.rank)} failed: {failure.text}; {where}."


class _Pulse:
    """Says that this rank is there, and how long the next one has not."""

    def __init__(self, store: Any, key: Callable[[object], str], rank: int, watched: int) -> None:
        self._store = store
        self._own, self._other = key(f"pulse/{rank}"), key(f"pulse/{watched}")
        self._beats, self._beat_at, self._silence_s, self._heard = 0, -math.inf, 0.0, b""

    def beat(self) -> float:
        """Seconds since the other was heard, of those in which this thread was running."""
        since = time.monotonic() - self._beat_at
        if since < _BEAT_S:
            return self._silence_s
        self._beats, self._beat_at = self._beats + 1, time.monotonic()
        if self._beats > 1:
            self._silence_s += min(since, 2 * _BEAT_S)  # not while it was itself suspended
        with contextlib.suppress(RuntimeError):  # the store is gone: told elsewhere
            self._store.set(self._own, str(self._beats))
            if self._store.check([self._other]) and (word := self._store.get(self._other)):
                self._silence_s *= word == self._heard
                self._heard = word
        return self._silence_s


def _lost(error: BaseException) -> bool:
    """Whether an error is what the loss of another rank looks like."""
    return isinstance(error, BoundaryError | dist.DistError) or type(error) is RuntimeError
