"""What is said when a disk takes no more."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from scpl_ds.errors import SaveError


@contextlib.contextmanager
def writing(path: Path, *, then: str) -> Iterator[None]:
    """Around what writes ``path``, a file or folder.

    Args:
        path: Named in the error.
        then: What is left, and what to do, in whole sentences.

    Raises:
        SaveError: It could not be written.
    """
    try:
        yield
    except Exception as error:
        if (why := _refusal(error)) is None:
            raise
        raise SaveError(f"{path} could not be written: {why}. {then}") from error


def _refusal(error: Exception) -> str | None:
    """What the system said; None where it was not the system."""
    if isinstance(error, shutil.Error):  # of many files, as (from, to, why)
        return str(error.args[0][0][-1])
    if isinstance(error, OSError):  # without a number it is transformers that says something
        return None if error.errno is None else str(error)
    # tokenizers has no exception of its own for what its Rust could not do.
    return str(error) if isinstance(error, SafetensorError) or type(error) is Exception else None
