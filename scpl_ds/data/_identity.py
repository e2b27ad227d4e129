"""Whether tokenised samples are the ones that they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

_BLOCK = 2**20
_BLOCKS = 32
_DRAWN = 16


def checksum_of(columns: Mapping[str, np.ndarray], offsets: np.ndarray, labels: Any = None) -> str:
    """XXH3-64 of samples in their order, as 16 hexadecimal digits.

    It takes the length and the class of every sample; of the tokens all of a column of up to 32
    MiB, of a larger one as much at even distances, its beginning and its end among it. So files of
    any size are told apart in some hundredths of a second, and of a large one a few exchanged
    samples of the same length may go unseen.
    """
    digest = xxhash.xxh3_64()
    for name in sorted(columns):
        digest.update(name.encode())
        for block in _blocks(columns[name].reshape(-1)):
            digest.update(np.ascontiguousarray(block).data)
    for numbers in (offsets, () if labels is None else labels):
        digest.update(np.ascontiguousarray(numbers, dtype=np.int64).data)
    return digest.hexdigest()


def checksum_of_drawn(samples: Any) -> str | None:
    """Of some samples of a script's data set, at even distances; None where a sample is another
    one when it is read again (drawn transforms)."""
    chosen = np.unique(np.linspace(0, len(samples) - 1, _DRAWN).astype(np.int64)).tolist()
    once, again = (_digest([samples[place] for place in chosen]) for _ in range(2))
    return once if once == again else None


def _digest(samples: list[Any]) -> str:
    digest = xxhash.xxh3_64()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                digest.update(f"{name}:".encode())
                add(value[name])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} of:".encode())
            for item in value:
                add(item)
        elif isinstance(value, str | bytes | int | float):
            digest.update(f"{value!r},".encode())
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(value.tobytes())
        elif torch.is_tensor(value) and value.dtype != torch.bfloat16:
            add(value.detach().cpu().numpy())
        else:  # what it holds, nobody knows
            digest.update(f"{type(value).__name__},".encode())

    add(samples)
    return digest.hexdigest()


def _blocks(flat: np.ndarray) -> Iterator[np.ndarray]:
    size = _BLOCK // flat.itemsize
    if len(flat) <= _BLOCKS * size:
        yield flat
        return
    for start in np.linspace(0, len(flat) - size, _BLOCKS).astype(np.int64):
        yield flat[start : start + size]
