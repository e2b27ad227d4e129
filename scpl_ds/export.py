"""From a checkpoint to an ordinary Hugging Face folder, and back into ``AutoModel`` to check it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from scpl_ds import __version__
from scpl_ds.checkpoint import HEAD_PREFIX, Reader, replace_folder, stage_of, write_text
from scpl_ds.checkpoint_damage import scpl_of
from scpl_ds.checkpoint_disk import writing
from scpl_ds.errors import CheckpointError, RecipeError
from scpl_ds.export_card import write_card
from scpl_ds.export_shards import INDEX, SHARD_BYTES, Shards, pieces
from scpl_ds.partition._hf import auto_class, model_class, one_line
from scpl_ds.partition.loading import export_state_dict, tied_weights
from scpl_ds.partition.lora import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    export_adapter,
    is_adapter,
    load_adapted,
)

MODEL_FILES = "model"
"""Folder inside a run and inside a checkpoint: config.json and the tokenizer's files."""
HEADS_FILE = "scpl_heads.safetensors"
HEADS_CONFIG = "scpl_heads.json"
"""Local heads beside an export, for ``EarlyExitModel``: transformers does not read them."""
_WRITER = "scpl-ds"
_WRITTEN = {"written_by": f"{_WRITER} {__version__}"}


def check_destination(out: Path, *, key: str) -> None:
    """Refuse a place where an export would destroy something: only an earlier export is replaced.

    Args:
        out: The folder to write.
        key: What the person set it with, for the message.

    Raises:
        RecipeError: There is a file, or a folder that holds anything else, or no folder can be
            made.
    """
    if Path.cwd().is_relative_to(out.resolve()):
        raise RecipeError(f"{key}: {out} is the folder you are in, or holds it; name a new one.")
    if not os.path.lexists(out):
        nearest = next(p for p in out.absolute().parents if os.path.lexists(p))
        if not nearest.is_dir():
            raise RecipeError(f"{key}: {nearest} is a file, not a folder; name another place.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RecipeError(f"{key}: {nearest} is not writable; name another place.")
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
        if (folder / ADAPTER_WEIGHTS).is_file():
            with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
                metadata = file.metadata()
        else:
            metadata = json.loads((folder / INDEX).read_text())["metadata"]
        return str(metadata["written_by"]).startswith(_WRITER)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def export_checkpoint(
    folder: Path,
    out: Path,
    *,
    task: str,
    merge: bool = False,
    max_shard_size: int = SHARD_BYTES,
    result: Mapping[str, Any] | None = None,
    left: str | None = None,
) -> Path:
    """Write ``out`` so that plain ``AutoModel...from_pretrained(out)`` gives the trained model.

    Safetensors files of at most ``max_shard_size`` bytes (or one larger tensor) and an index, under
    the names the architecture's checkpoints have; no more than one of them is in memory. Local
    heads lie beside in files of their own, which transformers does not read. Needs no process group
    and no ``scpl_ds`` on the reading side. ``out`` appears whole or not at all.

    Of a run with ``model.lora`` it is an adapter, for ``PeftModel.from_pretrained(base, out)``, or
    with ``merge`` the whole model with the adapter added to its weights, which needs its memory.

    ``result`` is what ``export_card.write_card`` says scores from; ``left`` what is said to be left
    where it cannot be written, if not ``folder``.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged, or holds no config.
        RecipeError: ``out`` holds something that is no earlier export, or there is no adapter to
            merge.
        SaveError: The disk is full or refuses.
    """
    check_destination(out, key="export")
    reader = Reader(folder)
    source = folder / MODEL_FILES
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no {MODEL_FILES}/config.json, so it cannot be exported. Checkpoints of "
            "`scpl-ds train` have one; after engine.save_checkpoint pass model_files=."
        )
    reader.verify_model_files()
    try:
        AutoConfig.from_pretrained(source)
    except Exception as error:  # OSError, ValueError, KeyError or TypeError: as it is damaged
        raise CheckpointError(f"{source}/config.json is damaged: {one_line(error)}.") from error
    adapted = (source / ADAPTER_CONFIG).is_file()
    _check_kind(reader, source / ADAPTER_CONFIG)
    if merge and not adapted:
        raise RecipeError(
            f"export --merge: {folder} has no {MODEL_FILES}/{ADAPTER_CONFIG}, so it is of a run "
            "without model.lora, whose export is a whole model. Leave --merge out."
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    again = f"`scpl-ds export {folder} {out} --task {task}{' --merge' if merge else ''}`"
    kept = f"Nothing of it is kept; {folder} is whole. Make room or mend the disk, then {again}."
    try:
        with writing(out, then=left or kept):
            shutil.copytree(source, partial)
            if adapted:
                _write_adapter(reader, partial)
            else:
                _write_model(reader, partial, task, max_shard_size)
            if merge:
                _merge(partial, task, max_shard_size)
            _write_heads(reader, partial)
            write_card(partial, reader.manifest, task, None if merge else result)
            replace_folder(out, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _check_kind(reader: Reader, config: Path) -> None:
    """Refuse adapters without the file that says of what, and the file without adapters."""
    names = [name for name in reader.names() if not name.startswith(HEAD_PREFIX)]
    parts = [name for name in names if is_adapter(name)]
    if parts and not config.is_file():
        raise CheckpointError(
            f"{reader.folder} holds adapters ({len(parts)} of {len(names)} tensors, as "
            f"'{parts[0]}') but no {MODEL_FILES}/{ADAPTER_CONFIG}, so it cannot be exported. Write "
            "it with PeftModel.save_pretrained into the folder that engine.save_checkpoint gets as "
            f"model_files=, or put it into {config.parent}."
        )
    if config.is_file() and not parts:
        raise CheckpointError(
            f"{reader.folder} has {MODEL_FILES}/{ADAPTER_CONFIG}, but none of its {len(names)} "
            "tensors is of an adapter, so it cannot be exported as one. If it is a whole model, "
            "leave that file out of the folder that engine.save_checkpoint gets as model_files=."
        )


def _write_model(reader: Reader, out: Path, task: str, max_shard_size: int) -> None:
    """Weights, index and config.json into ``out``, which holds the run's config and tokenizer."""
    config = AutoConfig.from_pretrained(out)
    where = reader.manifest["tensors"]
    names = [name for name in where if not name.startswith(HEAD_PREFIX)]
    _untie(config, task, where)
    shards = Shards(out, max_shard_size, _WRITTEN)
    for piece in pieces(reader.sizes(names)):
        shards.add(export_state_dict(config, task, reader.tensors(piece)))
    shards.finish()
    _write_config(config, task, out, shards)


def _write_adapter(reader: Reader, out: Path) -> None:
    names = [name for name in reader.names() if not name.startswith(HEAD_PREFIX)]
    tensors = export_adapter(reader.tensors(names))
    save_file(tensors, out / ADAPTER_WEIGHTS, metadata={"format": "pt", **_WRITTEN})
    (out / ADAPTER_WEIGHTS).chmod(0o644)


def _merge(out: Path, task: str, max_shard_size: int) -> None:
    """Make of the adapter in ``out`` the whole model."""
    config = AutoConfig.from_pretrained(out)
    merged = load_adapted(out, task, config, merge=True).state_dict()
    tied = tied_weights(config, task)
    shards = Shards(out, max_shard_size, _WRITTEN)
    shards.add(export_state_dict(config, task, {n: t for n, t in merged.items() if n not in tied}))
    shards.finish()
    _write_config(config, task, out, shards)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (out / name).unlink()


def _write_config(config: PretrainedConfig, task: str, out: Path, shards: Shards) -> None:
    config.architectures = [model_class(config, task).__name__]
    config.dtype = next(iter(shards.dtypes)) if len(shards.dtypes) == 1 else None
    config.save_pretrained(out)


def _write_heads(reader: Reader, out: Path) -> None:
    """The local heads, and what ``EarlyExitModel`` must know of them, if a recipe says it."""
    scpl = scpl_of(reader.manifest)
    names = [name for name in reader.manifest["tensors"] if name.startswith(HEAD_PREFIX)]
    objective = scpl.get("objective")
    if not names or objective is None or scpl.get("lookahead"):
        return
    tensors = reader.tensors(names)
    heads = {name.removeprefix(HEAD_PREFIX): tensor for name, tensor in tensors.items()}
    save_file(heads, out / HEADS_FILE)
    (out / HEADS_FILE).chmod(0o644)
    facts = {"bounds": reader.manifest["bounds"], "objective": objective}
    write_text(out / HEADS_CONFIG, json.dumps(facts, indent=2))


def _untie(config: PretrainedConfig, task: str, where: Mapping[str, str]) -> None:
    """Clear ``tie_word_embeddings`` where the two matrices were trained by different stages.

    ``where``: tensor name -> a file of its stage.
    """
    apart = [
        (target, source)
        for target, source in tied_weights(config, task).items()
        if target in where
        and source in where
        and stage_of(where[target]) != stage_of(where[source])
    ]
    if apart:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False


def load_exported(folder: Path, task: str) -> Any:
    """The exported model as anybody would load it, in eval mode; with an adapter in its base."""
    from transformers.utils import logging as hf_logging

    bar = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        if (folder / ADAPTER_CONFIG).is_file():
            config = AutoConfig.from_pretrained(folder)
            return load_adapted(folder, task, config).eval()
        return auto_class(task).from_pretrained(folder).eval()
    finally:
        if bar:
            hf_logging.enable_progress_bar()
