"""One checkpoint layout for all backends, keyed by Hugging Face's parameter names.

::

    checkpoint-200/
      manifest.json                    step, cut, which tensor is in which file, sizes of the files
      stage-0.safetensors              parameters, persistent buffers, local head
      stage-0.optimizer.safetensors    "<moment>/<parameter name>", whole, fp32
      model/                           config.json and tokenizer: what an export needs beside it
    latest                             "checkpoint-200"

A checkpoint is written into a folder of another name, synced, and renamed: a kill at any moment
leaves the previous one whole. Nothing in it is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scpl_ds.checkpoint_damage import damage_of, is_file_name
from scpl_ds.errors import CheckpointError
from scpl_ds.optim import OptimizerState

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST, LATEST = "manifest.json", "latest"
HEAD_PREFIX = "scpl_heads."


class Writer:
    """Writes one checkpoint; used as a context by every rank of the run.

    The coordinator makes the temporary folder before the others write (a barrier of the caller's
    lies in between) and moves it into place at the end.
    """

    def __init__(self, folder: Path, *, is_coordinator: bool) -> None:
        self._folder, self._coordinator = folder, is_coordinator
        self._partial = folder.with_name(f"{folder.name}.partial")

    def __enter__(self) -> Writer:
        if self._coordinator:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._coordinator:
            shutil.rmtree(self._partial, ignore_errors=True)

    def write_stage(
        self, index: int, tensors: Mapping[str, Tensor], optimizer: OptimizerState
    ) -> None:
        """Write one stage's files; called by one rank per stage."""
        moments = {
            f"{key}/{name}": tensor
            for key, by_name in optimizer.moments.items()
            for name, tensor in by_name.items()
        }
        _write(self._partial / f"stage-{index}.safetensors", tensors, {})
        facts = {"step": str(optimizer.step)}
        if optimizer.loss_scale is not None:
            facts["loss_scale"] = str(optimizer.loss_scale)
        _write(self._partial / f"stage-{index}.optimizer.safetensors", moments, facts)

    def finish(
        self,
        *,
        step: int,
        bounds: Sequence[int],
        client_state: Mapping[str, Any],
        save_latest: bool,
        model_files: Path | None = None,
    ) -> None:
        """Write the manifest and move the checkpoint into place; called by the coordinator.

        ``model_files`` (config.json, tokenizer) is copied to ``model/``, which export needs.
        """
        if model_files is not None:
            shutil.copytree(model_files, self._partial / "model")
        tensors, moments, sizes = {}, {}, {}
        for path in sorted(self._partial.glob("*.safetensors")):
            sizes[path.name] = path.stat().st_size
            target = moments if path.name.endswith(".optimizer.safetensors") else tensors
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    target[name] = path.name
        manifest = {
            "format": FORMAT,
            "step": step,
            "bounds": list(bounds),
            "tensors": tensors,
            "moments": moments,
            "bytes": sizes,
            "client_state": dict(client_state),
        }
        write_text(self._partial / MANIFEST, json.dumps(manifest, indent=1))
        replace_folder(self._folder, self._partial)
        _sync_folder(self._folder.parent)
        if save_latest:
            write_text(self._folder.parent / LATEST, self._folder.name)


class Reader:
    """Reads a checkpoint by tensor name, whatever stages wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"{folder} is not a complete checkpoint (no {MANIFEST}): the save was interrupted, "
                f"or it is something else.{_others(folder)}"
            )
        try:
            manifest = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:  # not JSON, or not even text
            raise CheckpointError(f"{path} is damaged: {error}.{_others(folder)}") from None
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{path} is damaged: it holds no mapping.{_others(folder)}")
        self.manifest: dict[str, Any] = manifest
        if self.manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {self.manifest.get('format')!r}; this version of "
                f"scpl_ds reads format {FORMAT}."
            )
        if (wrong := damage_of(manifest)) is not None:
            raise CheckpointError(f"{path} is damaged: {wrong}.{_others(folder)}")
        for name, size in self.manifest["bytes"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise CheckpointError(
                    f"{folder / name} has {'no' if found is None else found} bytes, the manifest "
                    f"says {size}: the checkpoint is damaged or half copied.{_others(folder)}"
                )

    def require_layers(self, count: int) -> None:
        """Refuse the checkpoint of a longer model, whose first layers would fit by name and shape.

        Raises:
            CheckpointError: It does not hold ``count`` layers.
        """
        found = self.manifest["bounds"][-1]
        if found != count:
            raise CheckpointError(
                f"{self.folder} is of another model: it has {found} layers, this one {count}. Use "
                "the model it was saved from."
            )

    def names(self) -> list[str]:
        """Every tensor of the checkpoint, local heads included, optimizer state not."""
        return list(self.manifest["tensors"])

    def tensors(
        self, names: Iterable[str], shapes: Mapping[str, Sequence[int]] | None = None
    ) -> dict[str, Tensor]:
        """The tensors of those names. A local head that is missing is left out, and said so:
        the checkpoint was cut at other layers, and the head starts afresh.

        Raises:
            CheckpointError: A tensor of the model is missing or has another shape.
        """
        where = self.manifest["tensors"]
        wanted = list(names)
        missing = [name for name in wanted if name not in where]
        heads = [name for name in missing if name.startswith(HEAD_PREFIX)]
        if len(heads) < len(missing):
            lost = [name for name in missing if name not in heads]
            raise CheckpointError(
                f"{self.folder} is of another model: it has no '{lost[0]}'"
                f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}; it holds {len(where)} "
                f"tensors such as '{next(iter(where), 'none')}'. Use the model it was saved from."
            )
        if heads:
            log.warning(
                "%s has no local head for %s (it was cut at layers %s): it starts afresh.",
                self.folder, heads[0].split(".")[1].replace("_", " "), self.manifest["bounds"],
            )  # fmt: skip
        result = _read(self.folder, {n: (where[n], n) for n in wanted if n in where})
        for name, tensor in result.items():
            if shapes is not None and tuple(tensor.shape) != tuple(shapes[name]):
                raise CheckpointError(
                    f"{self.folder} is of another model: '{name}' is {list(tensor.shape)} there "
                    f"and {list(shapes[name])} here. Use the model and num_labels of the run."
                )
        return result

    def optimizer_state(self, names: Iterable[str]) -> OptimizerState:
        """Step count and moments of those parameters; parameters without any are left out."""
        wanted, where = set(names), self.manifest["moments"]
        places = {}
        parts = {f for name, f in self.manifest["tensors"].items() if name in wanted}
        files = [part.replace(".safetensors", ".optimizer.safetensors") for part in sorted(parts)]
        for key, file in where.items():
            name = key.partition("/")[2]
            if name in wanted:
                places[key] = (file, key)
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in _read(self.folder, places).items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = tensor
        facts = [self._facts(file) for file in files]
        # Of several stages the smallest: the one that none of them overflowed with.
        scale = min((scale for _, scale in facts if scale is not None), default=None)
        return OptimizerState(max((step for step, _ in facts), default=0), moments, scale)

    def _facts(self, file: str) -> tuple[int, float | None]:
        """Steps of an optimizer and its loss scale."""
        with _opened(self.folder / file) as opened:
            facts = opened.metadata() or {}
            scale = facts.get("loss_scale")
            return int(facts.get("step", 0)), None if scale is None else float(scale)


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
                f"There is no checkpoint {folder}: no such folder.{_others(folder)}"
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


def _latest(folder: Path) -> Path | None:
    file = folder / LATEST
    name = file.read_text(errors="replace").strip() if file.is_file() else ""
    return folder / name if is_file_name(name) else None


def _complete(folder: Path) -> Path | None:
    """``folder`` if it is complete, or the checkpoint that it was about to replace."""
    if (folder / MANIFEST).is_file():
        return folder
    old = _aside(folder)
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


def prune(folder: Path, keep: int | None) -> None:
    """Remove the oldest complete checkpoints beyond ``keep``; never the one ``latest`` names.

    A run that went back to an early checkpoint has a latest that is not of the highest step.
    """
    if keep is None:
        return
    named = _latest(folder)
    others = [path for path in completed(folder) if path != named]
    spared = keep if named is None else keep - 1
    for path in others[: max(0, len(others) - spared)]:
        shutil.rmtree(path)
        shutil.rmtree(_aside(path), ignore_errors=True)


def replace_folder(folder: Path, new: Path) -> None:
    """Give ``new`` the name ``folder``; what had it before is kept aside until that is done."""
    old = _aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where ``folder`` lies while another takes its name; a kill in that moment leaves it there."""
    return folder.with_name(f".{folder.name}.old")


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt", **metadata})
    path.chmod(0o644)  # safetensors writes 0600
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _read(folder: Path, places: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
    by_file: dict[str, list[tuple[str, str]]] = {}
    for name, (file, key) in places.items():
        by_file.setdefault(file, []).append((name, key))
    result: dict[str, Tensor] = {}
    for file, entries in by_file.items():
        with _opened(folder / file) as opened:
            result |= {name: opened.get_tensor(key) for name, key in entries}
    return result


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    # A header that was changed may hold anything.
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. The checkpoint is damaged.{_others(path.parent)}"
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _others(folder: Path) -> str:
    complete = [path for path in completed(folder.parent) if path != folder]
    if not complete:
        return ""
    return (
        f"\nLatest complete checkpoint: {complete[-1]}. "
        f"Resume with train.resume_from_checkpoint={complete[-1]}"
    )
