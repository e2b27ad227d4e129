"""Saving and opening a checkpoint with all ranks: all of them succeed, or all say why not."""

from __future__ import annotations

import dataclasses
import functools
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scpl_ds import checkpoint
from scpl_ds.checkpoint import Reader, Share, Writer
from scpl_ds.checkpoint_files import OWN_FILES, Written
from scpl_ds.distributed.board import Board
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.errors import BoundaryError, CheckpointError
from scpl_ds.stage import Stage

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.05
_AT_EXIT_S = 30.0
"""How long a script that has ended waits for what other ranks write."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the coordinator adds to the ranks' files."""

    step: int
    bounds: Sequence[int]
    client_state: Mapping[str, Any]
    save_latest: bool
    model_files: Path | None
    on_saved: Callable[[Path], None] | None
    """Called on the coordinator once the checkpoint is in place."""
    own_files: bool = False
    """The backends' own files too; not in the background."""


class Saves:
    """This rank's part in the checkpoints of a run; at most one is being written."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._background: _Background | None = None

    def save(
        self, stages: Sequence[Stage], folder: Path, facts: Facts, *, background: bool
    ) -> None:
        """Write a checkpoint (waits for all ranks); in the background, once all that it holds has
        been copied.

        Raises:
            CheckpointError: A rank could not write it, or the one before.
        """
        self.wait()
        with Writer(folder, is_coordinator=self._mesh.rank == 0) as writer:
            _agree(self._mesh, writer)
            if background:
                shares = [stage.share() for stage in stages]
                self._background = _Background(self._mesh, writer, folder, facts, shares)
                return
            for stage in stages:
                writer.write_stage(stage.share())
                if facts.own_files:
                    write, tag = stage.write_own_files, f"global_step{facts.step}"
                    writer.write_own_files(stage.index, functools.partial(write, tag=tag))
            files = _agree(self._mesh, writer)
            if facts.own_files and not any(f.name.startswith(OWN_FILES) for f in files):
                raise ValueError("deepspeed_files needs scpl.sharding: deepspeed.")
            if self._mesh.rank == 0:
                _finish(writer, folder, facts, files)
            _agree(self._mesh, writer)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written in the background (all ranks call it).

        Raises:
            CheckpointError: A rank could not write it.
        """
        if self._background is None:
            return
        try:
            self._background.wait()
        except BoundaryError:
            raise  # `settle` may still bring it to its end
        except BaseException:
            self._background = None
            raise
        self._background = None

    def settle(self, limit_s: float) -> None:
        """Give what is being written in the background at most so long to end."""
        if self._background is not None:
            self._background.settle(limit_s)


class _Background:
    """One checkpoint on its way to the disk. Ranks tell the coordinator's thread through the store
    what they have written: a collective would get between those of the training."""

    def __init__(
        self, mesh: Mesh, writer: Writer, folder: Path, facts: Facts, shares: list[Share]
    ) -> None:
        self._mesh, self._writer, self._folder, self._facts = mesh, writer, folder, facts
        self._shares = shares
        self._board = Board(f"save/{folder}")
        self._own_part, self._everybody = threading.Event(), threading.Event()
        # No daemon: a script that ends without waiting for it keeps its checkpoint.
        self._thread = threading.Thread(target=self._run, name="scpl-save")
        self._thread.start()

    def wait(self) -> None:
        self._own_part.wait()
        wait_for_all(self._mesh)  # ends where a rank died; the coordinator's thread would not
        self._everybody.set()
        self._thread.join()
        _agree(self._mesh, self._writer)

    def settle(self, limit_s: float) -> None:
        self._thread.join(limit_s)

    def _run(self) -> None:
        writer = self._writer
        with writer.failures_kept():
            while self._shares:
                writer.write_stage(self._shares.pop(0))
            if self._mesh.rank > 0:
                files = [dataclasses.asdict(file) for file in writer.written]
                self._board.leave(self._mesh.rank, [writer.failure, files])
        self._own_part.set()
        if self._mesh.rank == 0:
            with writer.failures_kept():
                self._finish()

    def _finish(self) -> None:
        peers, last_look, left_s = range(1, self._mesh.world_size), False, _AT_EXIT_S
        while (words := self._board.take(peers)) is None:
            if last_look:  # a rank could not even say that it failed; it will, in `wait`
                return self._writer.remove()
            last_look = self._everybody.wait(_LOOK_EVERY_S)
            if not threading.main_thread().is_alive():  # nobody will come to `wait`
                left_s -= _LOOK_EVERY_S
                last_look = left_s < 0
        files = list(self._writer.written)
        for failure, written in words.values():
            files += [Written(**file) for file in written]
            if failure is not None:
                return self._writer.remove()
        _finish(self._writer, self._folder, self._facts, files)


def _finish(writer: Writer, folder: Path, facts: Facts, files: Iterable[Written]) -> None:
    writer.finish(
        step=facts.step,
        bounds=facts.bounds,
        client_state=facts.client_state,
        save_latest=facts.save_latest,
        model_files=facts.model_files,
        written=files,
    )
    if writer.failure is not None:
        writer.remove()
    elif facts.on_saved is not None:
        try:
            facts.on_saved(folder)
        except OSError as error:  # the checkpoint is in place: what cannot be tidied up stays
            log.warning(
                "%s is saved, but not all that comes after could be done: %s", folder, error
            )


def _agree(mesh: Mesh, writer: Writer) -> list[Written]:
    """The files of all ranks, if none of them has failed (waits)."""
    wait_for_all(mesh)
    found = gather_objects(mesh, (writer.failure, writer.written))
    failures = {rank: why for rank, (why, _) in enumerate(found) if why is not None}
    if failures:
        writer.remove()
        wait_for_all(mesh)  # nobody is told before it is gone
        writer.refuse(failures)
    return [file for _, files in found for file in files]


def open_checkpoint(mesh: Mesh, folder: Path, tag: str | None, *, with_optimizer: bool) -> Reader:
    """The checkpoint that is meant, whole and undamaged: each rank compares a share of its files
    that its machine reads with their checksums, before any of them loads a tensor (waits for all
    ranks). All must see the same checkpoint.

    Raises:
        CheckpointError: On every rank, where one of them found something wrong.
    """
    hosts = gather_objects(mesh, socket.gethostname())
    here = [rank for rank, host in enumerate(hosts) if host == hosts[mesh.rank]]
    reader, error, files, which = None, None, [], None
    try:
        reader = Reader(checkpoint.resolve(folder, tag))
        which = (reader.folder.name, reader.identity)
        files = reader.verify(
            with_optimizer=with_optimizer, share=here.index(mesh.rank), shares=len(here)
        )
    except CheckpointError as found:
        error = found
    wait_for_all(mesh)
    outcomes = gather_objects(mesh, (None if error is None else str(error), which, files))
    for rank, (why, other, _) in enumerate(outcomes):
        if why is not None:
            raise CheckpointError(why if rank == 0 else f"rank {rank} found: {why}") from error
        if other != (first := outcomes[0][1]):
            same_name = "another " * (other[0] == first[0])
            raise CheckpointError(
                f"Ranks see different checkpoints in {folder}: rank 0 on {hosts[0]} found "
                f"{first[0]}, rank {rank} on {hosts[rank]} {same_name}{other[0]}. The folder must "
                "be one that all machines share, or hold the same copy on each."
            )
    assert reader is not None
    # Only what was read on this machine: another has its own disk, or its own copy of a page.
    reader.trust(name for rank in here for name in outcomes[rank][2])
    return reader
