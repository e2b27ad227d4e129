"""Hidden states in fewer bytes on their way to the next stage: ``scpl.boundary_dtype``.

No gradient passes a boundary, so a rounded activation is all that the next stage ever knows: it
learns from what it will see again, and nobody's backward has to undo the rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CODES: dict[str, tuple[torch.dtype, bool]] = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "fp8": (torch.float8_e4m3fn, True),
    "int8": (torch.int8, True),
}
"""Name -> dtype on the way, and whether each row (the last dimension) is scaled to its range."""
NAMES = tuple(_CODES)


class Coded(NamedTuple):
    """Hidden states as they travel."""

    values: Tensor
    """[..., D] in the coded dtype."""
    scale: Tensor | None
    """float32 [..., 1], by which a row of fp8 or int8 is to be multiplied."""


def encode(hidden_states: Tensor, name: str) -> Coded:
    """Round [..., D] to ``name`` (one of ``NAMES``).

    fp16 saturates at its largest number, but keeps an infinity. fp8 (e4m3) and int8 divide each row
    by its largest magnitude first; a row of zeros stays one, and a row with a NaN or an infinity
    becomes NaN: it is not hidden.
    """
    dtype, scaled = _CODES[name]
    if not scaled:
        if dtype == torch.float16:
            limit = torch.finfo(dtype).max
            finite = hidden_states.isfinite()
            hidden_states = torch.where(finite, hidden_states.clamp(-limit, limit), hidden_states)
        return Coded(hidden_states.to(dtype), None)
    rows = hidden_states.float()
    largest = torch.iinfo(dtype).max if dtype == torch.int8 else torch.finfo(dtype).max
    peak = rows.abs().amax(dim=-1, keepdim=True)  # [..., 1]
    scale = torch.where(peak > 0, peak / largest, torch.ones_like(peak))
    scale = torch.where(peak.isfinite(), scale, torch.full_like(scale, torch.nan))
    values = (rows / scale).nan_to_num(0.0).clamp(-largest, largest)
    return Coded((values.round() if dtype == torch.int8 else values).to(dtype), scale)


def decode(coded: Coded, dtype: torch.dtype) -> Tensor:
    """What ``encode`` left, in the dtype the hidden states had."""
    if coded.scale is None:
        return coded.values.to(dtype)
    return (coded.values.float() * coded.scale).to(dtype)


def round_trip(hidden_states: Tensor, name: str | None) -> Tensor:
    """What the next stage would receive."""
    if name is None:
        return hidden_states
    return decode(encode(hidden_states, name), hidden_states.dtype)
