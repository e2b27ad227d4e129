"""A good recipe as a mapping, and variations of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

GOOD: dict[str, Any] = {
    "model": {"name_or_path": "demo"},
    "scpl": {"stages": 2, "objective": {"name": "supcon", "temperature": 0.2}},
    "deepspeed": {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 5.0e-5, "weight_decay": 0.01}},
    },
    "data": {"name": "demo", "max_length": 64},
    "train": {"num_train_epochs": 1},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with one dotted key set; None deletes it."""
    mapping = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    section: Any = mapping
    for part in parents:
        section = section.setdefault(part, {})
    if value is None:
        section.pop(last)
    else:
        section[last] = value
    return mapping


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path
