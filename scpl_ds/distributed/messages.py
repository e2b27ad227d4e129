"""What a message is made of: a header that says what it is, then tensors behind each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scpl_ds.errors import BoundaryError

HEADER_LIMIT = 4096
_LENGTH = 8  # bytes, little-endian, before the text of the header
_ALIGN = 64  # every tensor starts on a cache line, so that a view of any dtype is legal
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip

Layout = list[list[Any]]
"""Name, dtype, shape, first byte and number of bytes of every tensor of a payload."""


def lay_out(tensors: Mapping[str, Tensor]) -> Layout:
    """Where each tensor goes in the payload.

    Raises:
        BoundaryError: A dtype that cannot travel.
    """
    layout: Layout = []
    offset = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise BoundaryError(
                f"'{name}' is {tensor.dtype}, which cannot cross a stage boundary. "
                f"Convert it to one of {', '.join(_DTYPES)}."
            )
        nbytes = tensor.numel() * tensor.element_size()
        layout.append([name, dtype, list(tensor.shape), offset, nbytes])
        offset = aligned(offset + nbytes)
    return layout


def size_of(layout: Sequence[Sequence[Any]]) -> int:
    """Bytes of the payload."""
    return aligned(layout[-1][3] + layout[-1][4]) if layout else 0


def aligned(nbytes: int) -> int:
    """The next multiple at which a tensor may start."""
    return -(-nbytes // _ALIGN) * _ALIGN


def fill(payload: Tensor, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors into ``payload`` (uint8 [bytes], any device), without waiting."""
    for (_, _, _, start, nbytes), tensor in zip(layout, tensors.values(), strict=True):
        if nbytes:
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            payload[start : start + nbytes].copy_(flat, non_blocking=True)


def views(payload: Tensor, layout: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """The tensors of a payload, sharing its memory."""
    return {
        name: payload[start : start + nbytes].view(_DTYPES[dtype]).reshape(shape)
        for name, dtype, shape, start, nbytes in layout
    }


def write_header(header: Mapping[str, Any]) -> Tensor:
    """Its bytes, padded so that a payload may follow.

    Raises:
        BoundaryError: It is too long.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > HEADER_LIMIT:
        raise BoundaryError(
            f"The header of a micro-batch takes {len(text)} bytes, more than {HEADER_LIMIT}: "
            "it carries too many tensors. Drop columns that no stage needs."
        )
    framed = len(text).to_bytes(_LENGTH, "little") + text
    return torch.frombuffer(bytearray(framed.ljust(aligned(len(framed)))), dtype=torch.uint8)


def read_header(message: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The header at the start of ``message`` (uint8 on the CPU), and what follows it."""
    length = int.from_bytes(message[:_LENGTH].numpy().tobytes(), "little")
    text = message[_LENGTH : _LENGTH + length].numpy().tobytes()
    return json.loads(text), message[aligned(_LENGTH + length) :]
