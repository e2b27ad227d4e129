"""What a run writes into its folder before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds.partition.lora import save_config
from scpl_ds.trainer_words import own_generation_config, write_start

if TYPE_CHECKING:
    from scpl_ds.recipe import Recipe
    from scpl_ds.setup import Model
    from scpl_ds.trainer import Run


def write_model_files(run: Run, trained: list[str]) -> None:
    """``model/`` of the run folder, ``plan.txt`` and ``about.json``.

    Args:
        run: Not begun yet.
        trained: Names of the tensors that a run with adapters trains.
    """
    write_files(run.model, run.folder.model_files, run.data.tokenizer, run.recipe, trained)
    write_start(run)


def write_files(
    model: Model, folder: Path, tokenizer: Any, recipe: Recipe, trained: Sequence[str] = ()
) -> None:
    """What an export needs beside the weights."""
    asked = recipe.model
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    if asked.task == "causal-lm":
        own = own_generation_config(model, asked.revision)
        if own is not None:
            own.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if model.adapters is not None:
        save_config(
            model.adapters, folder, model.anatomy, trained,
            base=model.path, revision=asked.revision,
        )  # fmt: skip
    for config in getattr(model.whole, "peft_config", {}).values():  # without_wrapper: one
        config.save_pretrained(folder)
