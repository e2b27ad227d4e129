"""One checkpoint layout for all backends, keyed by Hugging Face's parameter names.

::

    checkpoint-200/
      manifest.json                    step, cut, which tensor is in which file, sizes and checksums
      stage-0.safetensors              parameters, persistent buffers, local head
      stage-0.optimizer.safetensors    "<moment>/<parameter name>", whole, fp32
      model/                           config.json and tokenizer: what an export needs beside it
      deepspeed/                       DeepSpeed's own files, where they were asked for; never read
    latest                             "checkpoint-200", and the checksum of that

Where a stage has several data-parallel ranks each writes a share of its tensors, whole ones, into
``stage-0.part-1-of-2.safetensors`` and so on. A checkpoint is written into a folder of another
name, synced, and renamed: a kill at any moment leaves the previous one whole. Every file is checked
against its checksum before a tensor of it is used. Nothing in it is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from scpl_ds.checkpoint_damage import damage_of
from scpl_ds.checkpoint_files import (
    LATEST,
    MANIFEST,
    MODEL_FILES,
    OWN_FILES,
    checksum,
    replace_folder,
    share_out,
    unseal,
    write_text,
)
from scpl_ds.checkpoint_folders import (
    completed,
    name_latest,
    others,
    prune,
    remove,
    resolve,
    sweep,
)
from scpl_ds.checkpoint_write import FORMAT, OPTIMIZER, Share, Writer
from scpl_ds.errors import CheckpointError
from scpl_ds.optim import OptimizerState

__all__ = [
    "HEAD_PREFIX", "LATEST", "MANIFEST", "Reader", "Share", "Writer", "completed",
    "name_latest", "prune", "remove",
    "replace_folder", "resolve", "share_out", "stage_of", "sweep", "write_text",
]  # fmt: skip
log = logging.getLogger(__name__)
HEAD_PREFIX = "scpl_heads."
_FIRST_FORMAT = 1
"""Without checksums, and one file a stage."""


def stage_of(file: str) -> str:
    """The stage that wrote a file, whichever share of it."""
    return file.partition(".")[0]


class Reader:
    """Reads a checkpoint by tensor name, whatever stages wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checked: set[str] = set()
        self.manifest: dict[str, Any] = _manifest(folder)
        self.identity: str = self.manifest.get("checksum", "")
        """The manifest's checksum, and so one of all that the checkpoint holds."""
        for name, size in self.manifest["bytes"].items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else None
            if found != size:
                raise CheckpointError(
                    f"{folder / name} has {'no' if found is None else found} bytes, the manifest "
                    f"says {size}: the checkpoint is damaged or half copied.{others(folder)}"
                )

    def verify(
        self, *, with_optimizer: bool = True, share: int = 0, shares: int = 1
    ) -> Collection[str]:
        """Compare files with their checksums: all that are read, or one of ``shares`` of them that
        are about as large.

        Returns:
            What was compared, for :meth:`trust` of the other ranks.

        Raises:
            CheckpointError: A file is not what was written.
        """
        sizes = {
            name: self.manifest["bytes"][name]
            for name in self.manifest.get("checksums", {})
            if (with_optimizer or not name.endswith(OPTIMIZER))
            and not name.startswith(f"{OWN_FILES}/")
        }
        own = [name for name, owner in share_out(sizes, shares).items() if owner == share]
        for name in own:
            self._check(name)
        return own

    def verify_model_files(self) -> None:
        """Compare what lies in ``model/`` with its checksums.

        Raises:
            CheckpointError: A file is not what was written.
        """
        for name in self.manifest["bytes"]:
            if name.startswith(f"{MODEL_FILES}/"):
                self._check(name)

    def trust(self, files: Iterable[str]) -> None:
        """Take files as checked: another rank has compared them."""
        self._checked.update(files)

    def _check(self, name: str) -> None:
        """Compare a file with its checksum, once; the first format has none."""
        wanted = self.manifest.get("checksums", {}).get(name)
        if wanted is None or name in self._checked:
            return
        try:
            found = checksum(self.folder / name)
        except OSError as error:
            found = str(error)
        if found != wanted:
            raise CheckpointError(
                f"{self.folder / name} is damaged: its checksum is {found}, the manifest says "
                f"{wanted}. It was changed after it was written.{others(self.folder)}"
            )
        self._checked.add(name)

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

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of tensors, sorted by stage and by their order in the files; reads headers only."""
        wanted, where, sizes = set(names), self.manifest["tensors"], {}
        for file in sorted({where[name] for name in wanted}):
            with self._opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name in wanted:
                        part = opened.get_slice(name)
                        sizes[name] = math.prod(part.get_shape()) * _width(part.get_dtype())
        return sizes

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
        result = self._read({n: (where[n], n) for n in wanted if n in where})
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
        files = [part.removesuffix(".safetensors") + OPTIMIZER for part in sorted(parts)]
        for key, file in where.items():
            name = key.partition("/")[2]
            if name in wanted:
                places[key] = (file, key)
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._read(places).items():
            moment, _, name = key.partition("/")
            moments.setdefault(moment, {})[name] = tensor
        facts = [self._facts(file) for file in files]
        # Of several stages the smallest: the one that none of them overflowed with.
        scale = min((scale for _, scale in facts if scale is not None), default=None)
        return OptimizerState(max((step for step, _ in facts), default=0), moments, scale)

    def _facts(self, file: str) -> tuple[int, float | None]:
        """Steps of an optimizer and its loss scale."""
        with self._opened(file) as opened:
            facts = opened.metadata() or {}
            scale = facts.get("loss_scale")
            return int(facts.get("step", 0)), None if scale is None else float(scale)

    def _read(self, places: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        by_file: dict[str, list[tuple[str, str]]] = {}
        for name, (file, key) in places.items():
            by_file.setdefault(file, []).append((name, key))
        result: dict[str, Tensor] = {}
        for file, entries in by_file.items():
            with self._opened(file) as opened:
                result |= {name: opened.get_tensor(key) for name, key in entries}
        return result

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        self._check(file)
        path = self.folder / file
        try:
            with safe_open(path, "pt") as opened:
                yield opened
        # A header that was changed may hold anything.
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}. The checkpoint is damaged.{others(self.folder)}"
            ) from error


def _width(dtype: str) -> int:
    """Bytes of an element, of a type as safetensors names it: BF16, F8_E4M3, BOOL."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it was written.

    Raises:
        CheckpointError: There is none, or it is not.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a complete checkpoint (no {MANIFEST}): the save was interrupted, "
            f"or it is something else.{others(folder)}"
        )

    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{path} is damaged: {why}.{others(folder)}")

    data = path.read_bytes()
    whole = unseal(data)
    if whole is False:
        raise damaged("its checksum is not that of its text")
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:  # not JSON, or not even text
        raise damaged(str(error)) from None
    if not isinstance(manifest, dict):
        raise damaged("it holds no mapping")
    number = manifest.get("format")
    if number not in (_FIRST_FORMAT, FORMAT):
        raise CheckpointError(
            f"{folder} has checkpoint format {number!r}; this version of scpl_ds reads formats "
            f"{_FIRST_FORMAT} and {FORMAT}. Use the version that wrote it.{others(folder)}"
        )
    if (wrong := damage_of(manifest)) is not None:
        raise damaged(wrong)
    if number != _FIRST_FORMAT and whole is None:
        raise damaged("it bears no checksum")
    return manifest
