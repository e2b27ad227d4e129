"""Whether a manifest is one that a save can have written, before anything in it is used."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

_CONTENT = {
    "step": int, "bounds": list, "tensors": dict, "moments": dict, "bytes": dict,
    "client_state": dict,
}  # fmt: skip
"""What a manifest holds, beside ``format``; a list is not empty."""
_LONGEST_NAME = 255


def damage_of(manifest: Mapping[str, Any]) -> str | None:
    """What cannot have been saved, in words; None: nothing.

    Names of files are names in the checkpoint's folder: a manifest that names others would have
    them read.
    """
    for key, kind in _CONTENT.items():
        value = manifest.get(key)
        if not isinstance(value, kind) or value == []:
            return f"'{key}' is missing or not a {kind.__name__}"
    if not _is_count(manifest["step"]):
        return f"'step' is {manifest['step']!r}"
    bounds = manifest["bounds"]
    if not all(map(_is_count, bounds)) or any(a >= b for a, b in itertools.pairwise(bounds)):
        return f"'bounds' are no ascending layers: {str(bounds)[:100]}"
    files = manifest["bytes"]
    for name, size in files.items():
        if not is_file_name(name) or not _is_count(size):
            return f"'bytes' has {name[:60]!r}: {str(size)[:60]}"
    for key in ("tensors", "moments"):
        for name, file in manifest[key].items():
            if not isinstance(file, str) or file not in files:
                return (
                    f"'{key}' has {name[:60]!r} in {str(file)[:60]!r}, which is none of its files"
                )
    if not _is_count(number := manifest["client_state"].get("batch_id", 0)):
        return f"'client_state.batch_id' is {str(number)[:60]!r}"
    return None


def scpl_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's ``scpl`` section where `scpl-ds train` saved; else nothing: ``client_state`` may
    be a script's own."""
    recipe = manifest["client_state"].get("recipe")
    section = recipe.get("scpl") if isinstance(recipe, dict) else None
    return section if isinstance(section, dict) else {}


def task_of(manifest: Mapping[str, Any]) -> str | None:
    """``model.task`` of the recipe where `scpl-ds train` saved."""
    recipe = manifest["client_state"].get("recipe")
    model = recipe.get("model") if isinstance(recipe, dict) else None
    task = model.get("task") if isinstance(model, dict) else None
    return task if task in ("sequence-classification", "causal-lm") else None


def is_file_name(name: str) -> bool:
    """Whether it is that of a file in a folder, or in one below it; nothing above or absolute."""
    path = PurePath(name)
    return (
        bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        and "\0" not in name
        and all(len(part.encode(errors="replace")) <= _LONGEST_NAME for part in path.parts)
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
