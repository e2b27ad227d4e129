"""What a run writes into its folder before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scpl_ds.partition.config import GenerationConfig, generation_config
from scpl_ds.partition.lora import save_config
from scpl_ds.trainer_words import plan_text

if TYPE_CHECKING:
    from scpl_ds.setup import Model
    from scpl_ds.trainer import Run


def own_generation_config(model: Model, revision: str | None) -> GenerationConfig | None:
    """How the model generates, if it says so."""
    if model.whole is not None:
        return model.whole.generation_config
    return generation_config(model.path, revision=revision)


def write_model_files(run: Run, trained: list[str]) -> None:
    """``model/``, with what an export needs beside the weights, and ``plan.txt``.

    Args:
        run: Not begun yet.
        trained: Names of the tensors that a run with adapters trains.
    """
    model, asked, folder = run.model, run.recipe.model, run.folder.model_files
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    if asked.task == "causal-lm":
        own = own_generation_config(model, asked.revision)
        if own is not None:
            own.to_json_file(folder / "generation_config.json")
    if run.data.tokenizer is not None:
        run.data.tokenizer.save_pretrained(folder)
    if model.adapters is not None:
        save_config(
            model.adapters, folder, model.anatomy, trained,
            base=model.path, revision=asked.revision,
        )  # fmt: skip
    run.folder.plan.write_text(plan_text(run) + "\n")
