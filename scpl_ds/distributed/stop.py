"""A step after which every rank stops, or does what was asked for, whoever was asked."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch.distributed.distributed_c10d import _get_default_store

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import BoundaryError

log = logging.getLogger(__name__)


class CommonStop:
    """Any rank may be asked to stop; all of them do so after the same step.

    Nobody waits for it: a rank that is asked says so in the rendezvous store, rank 0 answers with a
    step that no rank can have passed, and every rank looks there before it begins a step. No rank
    begins a step long before rank 0 has: later stages need what rank 0 sends, and data-parallel
    ranks each other's gradients.

    Args:
        mesh: The ranks.
        token: Of this run, the same on every rank.
        ahead: Steps that a rank may have begun more than rank 0 has done; at least 1.
    """

    def __init__(self, mesh: Mesh, *, token: str, ahead: int) -> None:
        self._mesh, self._ahead = mesh, max(1, ahead)
        self._store = _get_default_store()
        self._asked_key, self._at_key = f"scpl/stop/{token}/asked", f"scpl/stop/{token}/at"
        self._asked: str | None = None
        self._told = False
        self._at: int | None = None
        self.reason = ""
        """What the first rank that was asked was asked by."""

    def ask(self, reason: str) -> None:
        """Stop soon. Only keeps a note: a signal handler may call it."""
        self._asked = self._asked or reason

    def due(self, done: int) -> bool:
        """Whether this rank is to stop now, before step ``done + 1``. Every rank asks before each
        of its steps.

        Raises:
            BoundaryError: The store is gone, or the others stopped before.
        """
        try:
            self._agree(done)
        except RuntimeError as error:
            raise BoundaryError(
                f"rank {self._mesh.rank} could not ask the rendezvous store whether to stop after "
                f"step {done}: rank 0 or the launcher beside it is no longer running. "
                f"[{str(error).strip().splitlines()[0]}]"
            ) from error
        if self._at is not None and done > self._at:
            raise BoundaryError(
                f"rank {self._mesh.rank} has done step {done}, but the others stop after "
                f"{self._at} ({self.reason}): the ranks no longer run the same steps."
            )
        return self._at == done

    def _agree(self, done: int) -> None:
        if self._asked is not None and not self._told:
            self._told = True
            log.warning("%s on rank %d: the run will save and stop.", self._asked, self._mesh.rank)
            self._store.set(self._asked_key, f"{self._asked} on rank {self._mesh.rank}")
        if self._at is not None:
            return
        if self._mesh.rank == 0:
            if self._store.check([self._asked_key]):
                self.reason = self._store.get(self._asked_key).decode()
                self._at = done + self._ahead
                self._store.set(self._at_key, f"{self._at} {self.reason}")
                self._store.check([self._at_key])  # a set returns before the store has it
        elif self._store.check([self._at_key]):
            at, _, self.reason = self._store.get(self._at_key).decode().partition(" ")
            self._at = int(at)


class CommonRequests:
    """Any rank may ask for something (a save, an evaluation); all do it after the same step.

    As :class:`CommonStop`, again and again. What several ranks ask for, each a little later than
    the other, is done once or twice, but everywhere alike.

    Args:
        mesh: The ranks.
        token: Of this run, the same on every rank.
        ahead: As in :class:`CommonStop`; a single rank does at once what it is asked for.
    """

    def __init__(self, mesh: Mesh, *, token: str, ahead: int) -> None:
        self._mesh, self._ahead = mesh, max(1, ahead)
        self._store = _get_default_store()
        self._prefix, self._round = f"scpl/requests/{token}", 0
        self._mine: set[str] = set()
        self._told: set[str] = set()
        self._at: tuple[int, frozenset[str]] | None = None

    def ask(self, what: Collection[str]) -> None:
        """Ask for things, each a word."""
        self._mine |= set(what)

    def left(self) -> set[str]:
        """What this rank asked for and was not done: there are no more steps to agree on."""
        found, self._mine = self._mine, set()
        return found

    def due(self, done: int) -> frozenset[str]:
        """What is to be done now, after step ``done``. Every rank asks after each of its steps.

        Raises:
            BoundaryError: The store is gone, or the others have done it before.
        """
        if self._mesh.world_size == 1:
            found, self._mine = frozenset(self._mine), set()
            return found
        try:
            self._agree(done)
        except RuntimeError as error:
            raise BoundaryError(
                f"rank {self._mesh.rank} could not ask the rendezvous store what to do after step "
                f"{done}: rank 0 or the launcher beside it is no longer running. "
                f"[{str(error).strip().splitlines()[0]}]"
            ) from error
        if self._at is None or self._at[0] > done:
            return frozenset()
        at, found = self._at
        if at < done:
            raise BoundaryError(
                f"rank {self._mesh.rank} has done step {done}, but the others do what was asked "
                f"({' '.join(sorted(found))}) after {at}: the ranks no longer run the same steps."
            )
        # What rank 0 did not see in time is asked for again.
        self._mine -= found
        self._told, self._at, self._round = set(), None, self._round + 1
        return found

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{self._round}/{name}"

    def _agree(self, done: int) -> None:
        if self._at is None and self._mine - self._told:
            self._told |= self._mine
            key = self._key(f"rank{self._mesh.rank}")
            self._store.set(key, " ".join(sorted(self._told)))
            self._store.set(self._key("asked"), "")
        if self._at is not None:
            return
        if self._mesh.rank == 0:
            if self._store.check([self._key("asked")]):
                keys = [self._key(f"rank{rank}") for rank in range(self._mesh.world_size)]
                found = [self._store.get(key).decode() for key in keys if self._store.check([key])]
                what = frozenset(" ".join(found).split())
                self._at = (done + self._ahead, what)
                self._store.set(self._key("at"), f"{self._at[0]} {' '.join(sorted(what))}")
                self._store.check([self._key("at")])  # a set returns before the store has it
        elif self._store.check([self._key("at")]):
            at, *what = self._store.get(self._key("at")).decode().split()
            self._at = (int(at), frozenset(what))
