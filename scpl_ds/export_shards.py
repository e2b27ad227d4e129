"""A model's tensors into shards and an index, holding one shard at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from scpl_ds.checkpoint import write_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Of one file, unless asked otherwise; that of the hub."""
PIECE_BYTES = 256 * 2**20
"""Read at once: little beside a shard, enough that setting up a conversion does not count."""
_LAYER = re.compile(r".*?\.\d+(?=\.)")


def pieces(sizes: Mapping[str, int], limit: int = PIECE_BYTES) -> Iterator[list[str]]:
    """Names in order, up to ``limit`` bytes together; what a conversion may have to join, a layer
    or a module outside of the layers, stays together however large it is."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        layer = _LAYER.match(name)
        groups.setdefault(layer[0] if layer else name.rpartition(".")[0], []).append(name)
    piece: list[str] = []
    for group in groups.values():
        if piece and sum(sizes[name] for name in piece + group) > limit:
            yield piece
            piece = []
        piece += group
    if piece:
        yield piece


class Shards:
    """Writes ``model-00001-of-00003.safetensors`` and so on into ``out``, and their index;
    ``model.safetensors`` where one file is enough."""

    def __init__(self, out: Path, limit: int, about: Mapping[str, str]) -> None:
        self._out, self._limit, self._about = out, limit, dict(about)
        self._held: dict[str, Tensor] = {}
        self._files: list[list[str]] = []
        self._total = 0
        self.dtypes: set[str] = set()
        """Of all tensors, as a config.json names them."""

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors; those of a full shard are written and let go of."""
        for name, tensor in tensors.items():
            if self._held and _bytes([*self._held.values(), tensor]) > self._limit:
                self._write()
            self._held[name] = tensor
            self.dtypes.add(str(tensor.dtype).removeprefix("torch."))

    def finish(self) -> None:
        """Write what is left, the files' names, which say how many there are, and the index."""
        if self._held:
            self._write()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, 1):
            count = len(self._files)
            shard = WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._unnamed(number).rename(self._out / shard)
            weight_map |= dict.fromkeys(names, shard)
        metadata = {"total_size": self._total, **self._about}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self._out / INDEX, json.dumps(index, indent=2))

    def _write(self) -> None:
        self._files.append(list(self._held))
        path = self._unnamed(len(self._files))
        save_file(self._held, path, metadata={"format": "pt"})
        path.chmod(0o644)
        self._total += _bytes(self._held.values())
        self._held.clear()

    def _unnamed(self, number: int) -> Path:
        return self._out / f".shard-{number}"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
