"""Bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for i in ("", "i")
}


def parse_size(text: str) -> int:
    """``80GiB``, ``24 GB``, ``512MiB`` or a number of bytes, as bytes.

    Raises:
        ValueError: It is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise ValueError(
            f"must be a size such as 80GiB, 24GB, 512MiB or a number of bytes, got {text!r}"
        )
    return int(float(found[1]) * unit)


def show_size(size: int) -> str:
    """``1.52 GiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size} B"
