"""Types of command-line arguments; importing them costs nothing."""

from __future__ import annotations

import argparse


def size(text: str) -> int:
    """Bytes of ``80GiB``."""
    from scpl_ds.memory_sizes import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def thresholds(text: str) -> tuple[float, ...]:
    """Numbers in (0, 1]."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"must be numbers in (0, 1], as in 0.8,0.9; got {text!r}")
    return values


def temperature(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
    return value


def patiences(text: str) -> tuple[int, ...]:
    """Counts with commas between them."""
    return tuple(ranks(part) for part in text.split(","))


def ranks(text: str) -> int:
    """A count."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def repository(text: str) -> str:
    """A name that the hub takes."""
    from scpl_ds import recipe_hub

    try:
        return recipe_hub.repository(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
