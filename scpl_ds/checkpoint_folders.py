"""Which folder is meant by a checkpoint: the one named, the latest, the last complete; which go."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from scpl_ds.checkpoint_files import LATEST, MANIFEST, aside, sealed_name, unsealed_name, write_text
from scpl_ds.errors import CheckpointError

log = logging.getLogger(__name__)
_GONE = ".gone"


def resolve(folder: Path, tag: str | None = None) -> Path:
    """The checkpoint meant by a folder: itself, its ``tag``, or the one its ``latest`` names.

    Where ``latest`` names none that is complete, it is the complete one of the highest step, and a
    warning says so.

    Raises:
        CheckpointError: There is none.
    """
    if tag is not None:
        folder = folder / tag
    if not folder.exists():
        kept = _complete(folder)
        if kept is None:
            raise CheckpointError(
                f"There is no checkpoint {folder}: no such folder.{others(folder)}"
            )
        return kept
    if tag is not None or _is_checkpoint(folder):
        return folder
    named = _latest(folder)
    whole = None if named is None else _complete(named)
    if whole is not None:
        return whole
    complete = completed(folder)
    if not complete:
        raise CheckpointError(
            f"No checkpoint in {folder}: it has no complete checkpoint-N folder. Name the run "
            "folder or a checkpoint in it; to train from the start, leave out "
            "train.resume_from_checkpoint."
        )
    if named is not None:
        log.warning(
            "%s is missing or incomplete; %s is the last complete one.", named, complete[-1]
        )
    return complete[-1]


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one checkpoint, complete or not, rather than a run with several."""
    return (folder / MANIFEST).is_file() or any(folder.glob("stage-*.safetensors"))


def name_latest(folder: Path) -> None:
    """Make ``folder`` the one that ``latest`` beside it names."""
    write_text(folder.parent / LATEST, sealed_name(folder.name))


def _latest(folder: Path) -> Path | None:
    """What ``latest`` names.

    Raises:
        CheckpointError: It is not what was written.
    """
    file = folder / LATEST
    if not file.is_file():
        return None
    name = unsealed_name(file.read_bytes())
    if name is None:
        raise CheckpointError(
            f"{file} is damaged: it is not the name that was written.{others(file)}\n"
            f"Or write the name of the checkpoint you mean into {file}, in one line."
        )
    return folder / name


def _complete(folder: Path) -> Path | None:
    """``folder`` if it is complete, or the checkpoint that it was about to replace."""
    if (folder / MANIFEST).is_file():
        return folder
    old = aside(folder)
    if not (old / MANIFEST).is_file():
        return None
    log.warning("%s was being replaced when the save was interrupted: using %s.", folder, old)
    return old


def completed(folder: Path) -> list[Path]:
    """Complete ``checkpoint-N`` folders below ``folder``, oldest step first. One that was about to
    be replaced by another of its step counts if that one never came."""
    found: dict[int, Path] = {}
    for prefix, suffix in ((".checkpoint-", ".old"), ("checkpoint-", "")):
        for path in folder.glob(f"{prefix}*{suffix}/{MANIFEST}"):
            step = path.parent.name.removeprefix(prefix).removesuffix(suffix)
            if step.isdigit():
                found[int(step)] = path.parent
    return [found[step] for step in sorted(found)]


def prune(folder: Path, keep: int | None, *, spare: Collection[Path] = ()) -> None:
    """Remove the oldest complete checkpoints beyond ``keep``; never the one ``latest`` names, nor
    those of ``spare``, which count.

    A run that went back to an early checkpoint has a latest that is not of the highest step.
    """
    if keep is None:
        return
    complete = completed(folder)
    held = {path for path in (_latest(folder), *spare) if path in complete}
    free = [path for path in complete if path not in held]
    for path in free[: max(0, len(free) - max(0, keep - len(held)))]:
        _remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint that ``latest`` may name: then it names the one of the highest step that
    stays, or there is no ``latest``."""
    named = _latest(checkpoint.parent)
    if named is not None and named.name == checkpoint.name:
        left = [path for path in completed(checkpoint.parent) if path.name != checkpoint.name]
        if left:
            name_latest(left[-1])
        else:
            (checkpoint.parent / LATEST).unlink()
    _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    gone = checkpoint.with_name(f".{checkpoint.name}{_GONE}")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)  # first: half removed, it would pass for whole
    shutil.rmtree(gone)
    shutil.rmtree(aside(checkpoint), ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what interrupted saves and removals left: for the one run that writes here."""
    for pattern in ("checkpoint-*.partial", f".checkpoint-*{_GONE}"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def others(folder: Path) -> str:
    """The end of a message: the latest complete checkpoint beside ``folder``, if there is one."""
    complete = [path for path in completed(folder.parent) if path != folder]
    if not complete:
        return ""
    return (
        f"\nLatest complete checkpoint: {complete[-1]}. "
        f"Resume with train.resume_from_checkpoint={complete[-1]}"
    )
