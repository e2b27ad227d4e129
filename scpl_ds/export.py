"""From a checkpoint to an ordinary Hugging Face folder, and back into ``AutoModel`` to check it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoConfig

from scpl_ds import __version__
from scpl_ds.checkpoint import HEAD_PREFIX, Reader, write_text
from scpl_ds.errors import CheckpointError, RecipeError
from scpl_ds.partition._hf import auto_class, model_class
from scpl_ds.partition.loading import export_state_dict

MODEL_FILES = "model"
"""Folder inside a run and inside a checkpoint: config.json and the tokenizer's files."""
INDEX = "model.safetensors.index.json"
_WRITER = "scpl-ds"


def check_destination(out: Path, *, key: str) -> None:
    """Refuse a place where an export would destroy something: only an earlier export is replaced.

    Args:
        out: The folder to write.
        key: What the person set it with, for the message.

    Raises:
        RecipeError: There is a file, or a folder that holds anything else.
    """
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise RecipeError(f"{key}: {out} is a file; name a folder to write.")
    held = sorted(path.name for path in out.iterdir())
    if held and not _is_export(out):
        raise RecipeError(
            f"{key}: {out} is not empty and no earlier export (it holds {', '.join(held[:5])}"
            f"{', ...' if len(held) > 5 else ''}). It would be replaced; name another folder."
        )


def _is_export(folder: Path) -> bool:
    try:
        metadata = json.loads((folder / INDEX).read_text())["metadata"]
        return str(metadata["written_by"]).startswith(_WRITER)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def export_checkpoint(folder: Path, out: Path, *, task: str) -> Path:
    """Write ``out`` so that plain ``AutoModel...from_pretrained(out)`` gives the trained model.

    One safetensors file per stage and an index, read and written a stage at a time, under the names
    the architecture's checkpoints have. Local heads are training-only and stay behind. Needs no
    process group and no ``scpl_ds`` on the reading side. ``out`` appears whole or not at all.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged, or holds no config.
        RecipeError: ``out`` holds something that is no earlier export.
    """
    check_destination(out, key="export")
    reader = Reader(folder)
    source = folder / MODEL_FILES
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no {MODEL_FILES}/config.json, so it cannot be exported. Checkpoints of "
            "`scpl-ds train` have one; after engine.save_checkpoint pass model_files=."
        )
    config = AutoConfig.from_pretrained(source)
    names = [name for name in reader.names() if not name.startswith(HEAD_PREFIX)]
    files = sorted({reader.manifest["tensors"][name] for name in names})
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    weight_map: dict[str, str] = {}
    dtypes: set[str] = set()
    total = 0
    for number, file in enumerate(files, 1):
        own = [name for name in names if reader.manifest["tensors"][name] == file]
        tensors = export_state_dict(config, task, reader.tensors(own))
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, partial / shard, metadata={"format": "pt"})
        (partial / shard).chmod(0o644)
        weight_map |= dict.fromkeys(tensors, shard)
        dtypes |= {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    metadata = {"total_size": total, "written_by": f"{_WRITER} {__version__}"}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_text(partial / INDEX, json.dumps(index, indent=2))
    config.architectures = [model_class(config, task).__name__]
    config.dtype = dtypes.pop() if len(dtypes) == 1 else None
    config.save_pretrained(partial)
    if out.exists():
        old = out.with_name(f"{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
    return out


def load_exported(folder: Path, task: str) -> Any:
    """The exported model as anybody would load it, in eval mode."""
    from transformers.utils import logging as hf_logging

    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        return auto_class(task).from_pretrained(folder).eval()
    finally:
        if bar:
            hf_logging.enable_progress_bar()
