"""Writing a checkpoint: every rank its files, the coordinator the manifest and the name."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from scpl_ds.checkpoint_files import (
    MANIFEST,
    MODEL_FILES,
    OWN_FILES,
    Written,
    copy_files,
    replace_folder,
    seal,
    sync_file,
    take_files,
    write_tensors,
    write_text,
)
from scpl_ds.checkpoint_folders import name_latest, others
from scpl_ds.errors import SaveError
from scpl_ds.optim import OptimizerState

log = logging.getLogger(__name__)
FORMAT = 2
OPTIMIZER = ".optimizer.safetensors"


class Share(NamedTuple):
    """What one data-parallel rank writes of a stage: whole tensors, by their checkpoint names."""

    stage: int
    tensors: Mapping[str, Tensor]
    optimizer: OptimizerState
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        """How the names of its files begin."""
        share = f".part-{self.part + 1}-of-{self.parts}" if self.parts > 1 else ""
        return f"stage-{self.stage}{share}"


class Writer:
    """Writes one checkpoint; used as a context by every rank of the run.

    The coordinator makes the temporary folder before the others write, and moves it into place at
    the end. What fails on a rank is kept in ``failure`` and not raised: the others are still
    gathering tensors with it. The caller asks all ranks for theirs and then stops all of them.
    """

    def __init__(self, folder: Path, *, is_coordinator: bool) -> None:
        self._folder, self._coordinator = folder, is_coordinator
        self._partial = folder.with_name(f"{folder.name}.partial")
        self.failure: str | None = None
        """Why this rank could not write what it had to."""
        self.written: list[Written] = []
        """This rank's files."""

    def __enter__(self) -> Writer:
        if self._coordinator:
            self._attempt(self._make_folder)
        return self

    def _make_folder(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.remove()

    def remove(self) -> None:
        """Remove what is unfinished, on the coordinator."""
        if self._coordinator:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write_stage(self, share: Share) -> None:
        """Write one rank's share of a stage; nothing, once something has failed."""
        if share.tensors or share.part == 0:
            self._attempt(lambda: self._write_stage(share))

    def _write_stage(self, share: Share) -> None:
        state = share.optimizer
        moments = {
            f"{key}/{name}": tensor
            for key, by_name in state.moments.items()
            for name, tensor in by_name.items()
        }
        facts = {"step": str(state.step)}
        if state.loss_scale is not None:
            facts["loss_scale"] = str(state.loss_scale)
        for ending, tensors, about in (
            (".safetensors", share.tensors, {}),
            (OPTIMIZER, moments, facts),
        ):
            path = self._partial / f"{share.name}{ending}"
            self.written.append(write_tensors(path, tensors, about, self._partial))

    def write_own_files(self, stage: int, write: Callable[[Path], list[Path]]) -> None:
        """Let a backend write files of its own format; ``write`` gets the stage's folder and is
        called whatever has failed before: others of the stage wait for it."""
        folder = self._partial / OWN_FILES / f"stage-{stage}"
        try:
            paths = write(folder)
        except OSError as error:
            self.failure = self.failure or str(error)
        else:
            self._attempt(lambda: self.written.extend(take_files(paths, self._partial)))

    def finish(
        self,
        *,
        step: int,
        bounds: Sequence[int],
        client_state: Mapping[str, Any],
        save_latest: bool,
        model_files: Path | None = None,
        written: Iterable[Written] | None = None,
    ) -> None:
        """Write the manifest and move the checkpoint into place; called by the coordinator.

        ``model_files`` (config.json, tokenizer) is copied to ``model/``, which export needs.
        ``written``: the files of all ranks, where there are others.
        """
        files = list(self.written if written is None else written)

        def write() -> None:
            if model_files is not None:
                files.extend(copy_files(model_files, self._partial / MODEL_FILES, self._partial))
            files.sort(key=lambda file: file.name)
            manifest = {
                "format": FORMAT,
                "step": step,
                "bounds": list(bounds),
                "tensors": _where(files, of_optimizer=False),
                "moments": _where(files, of_optimizer=True),
                "bytes": {file.name: file.size for file in files},
                "checksums": {file.name: file.checksum for file in files},
                "client_state": dict(client_state),
            }
            write_text(self._partial / MANIFEST, seal(manifest))
            sync_file(self._partial)
            replace_folder(self._folder, self._partial)
            if save_latest:
                name_latest(self._folder)
            sync_file(self._folder.parent)

        self._attempt(write)

    def refuse(self, failures: Mapping[int, str]) -> None:
        """Stop the save if any rank failed: ``failures`` says why, by rank.

        Raises:
            SaveError: One did.
        """
        if not failures:
            return
        rank, reason = min(failures.items())
        more = f" (and {len(failures) - 1} other ranks)" if len(failures) > 1 else ""
        raise SaveError(
            f"{self._folder} was not saved: rank {rank}{more} could not write it: {reason}. "
            f"Nothing of it is kept. Make room or mend the disk, then resume.{others(self._folder)}"
        )

    def _attempt(self, work: Callable[[], None]) -> None:
        """Keep what goes wrong; do nothing where something has already gone wrong."""
        if self.failure is not None:
            return
        try:
            work()
        except (OSError, SafetensorError) as error:
            self.failure = str(error)
        except (TypeError, ValueError) as error:  # what JSON says
            self.failure = f"client_state must be plain JSON: {error}"

    @contextlib.contextmanager
    def failures_kept(self) -> Iterator[None]:
        """In a thread, where nobody sees an exception: any becomes this rank's ``failure``."""
        try:
            yield
        except BaseException as error:
            log.exception("writing %s failed", self._folder)
            self.failure = self.failure or f"{type(error).__name__}: {error}"
            self.remove()


def _where(files: Iterable[Written], *, of_optimizer: bool) -> dict[str, str]:
    return {
        name: file.name
        for file in files
        if file.name.endswith(OPTIMIZER) is of_optimizer
        for name in file.tensors
    }
