"""What a script hands to ``scpl_ds.Trainer``, looked at before anything is made of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from scpl_ds.data.demo import resolve_model_path
from scpl_ds.errors import DataError, PartitionError, RecipeError
from scpl_ds.partition._hf import model_class
from scpl_ds.partition.config import load_config
from scpl_ds.partition.lora import without_wrapper
from scpl_ds.partition.stage_module import PreTrainedModel
from scpl_ds.recipe import Recipe
from scpl_ds.recipe_fields import MADE_BY_A_SCRIPT

_TASKS = ("sequence-classification", "causal-lm")
INSTEAD = {
    "compute_loss": "put the loss into the model's forward, which the last stage learns from, or "
    "choose what the other stages learn with scpl.objective (docs/objectives.md)",
    "log": "use TrainerCallback.on_log, or a tracker",
}
"""Method of transformers' Trainer that people override -> what to do here."""


def refuse_others(others: Mapping[str, Any]) -> None:
    """Arguments of transformers' Trainer that have no place here, and what is no argument."""
    instead = {
        "compute_loss_func": INSTEAD["compute_loss"],
        "optimizers": "every stage makes its own optimizer: args.optim, or args.deepspeed",
        "optimizer_cls_and_kwargs": "every stage makes its own optimizer: args.optim, or "
        "args.deepspeed",
    }
    for name, value in others.items():
        if name not in instead:
            raise TypeError(f"Trainer() got an unexpected keyword argument '{name}'")
        if value is not None and value != (None, None):
            raise RecipeError(f"Trainer({name}=...) cannot be honoured: {instead[name]}.")


def check_data(name: str, dataset: Any) -> None:
    """
    Raises:
        DataError: It cannot be read by position.
    """
    if isinstance(dataset, Mapping) and not isinstance(dataset, Dataset):
        raise DataError(
            f"{name} is a dict of {len(dataset)}: give one data set, and call "
            "trainer.evaluate(other, metric_key_prefix=...) for the others."
        )
    if dataset is not None and not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"{name} is a {type(dataset).__name__}, a stream: it has no length and no positions, "
            "so it cannot be shuffled, or resumed, alike on all ranks. Make a map-style data set "
            "of it, or use a recipe with data.streaming (causal-lm)."
        )


def taken(model: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model object, out of its wrapper, and a recipe's ``model`` section that describes it."""
    whole = without_wrapper(model)
    if not isinstance(whole, PreTrainedModel):
        raise RecipeError(
            f"Trainer: a {type(model).__name__} is no Hugging Face model. For a list of layers use "
            "scpl_ds.initialize(model=scpl_ds.PipelineModule(...))."
        )
    if any(hasattr(parameter, "ds_id") for parameter in whole.parameters()):
        raise RecipeError(
            "Trainer: the model's weights are partitioned by DeepSpeed's zero.Init, because "
            "TrainingArguments(deepspeed=<ZeRO-3>) was made before it. Make the model first, or "
            "pass its name: Trainer(model='...'), of which every rank reads its stages only."
        )
    for task in _TASKS:
        try:
            fits = isinstance(whole, model_class(whole.config, task))
        except PartitionError:
            continue
        if fits:
            return whole, {"name_or_path": _origin(whole), "task": task}
    raise PartitionError(
        f"Trainer: a {type(whole).__name__} is neither a sequence classifier nor a causal language "
        "model of transformers. Use AutoModelForSequenceClassification or AutoModelForCausalLM."
    )


def _origin(whole: PreTrainedModel) -> str:
    """Where ``from_pretrained`` read the weights, or that they are of no folder or hub name: a
    model made of a config has the config's name, and random weights."""
    name = getattr(whole.config, "_name_or_path", "")
    read = any(getattr(p, "_is_hf_initialized", False) for p in whole.parameters())
    return name if name and read else MADE_BY_A_SCRIPT


def inputs_of(whole: PreTrainedModel | None, recipe: Recipe) -> list[str]:
    """What the model's forward takes."""
    if whole is not None:
        return list(inspect.signature(whole.forward).parameters)
    config = load_config(
        resolve_model_path(recipe.model.name_or_path), revision=recipe.model.revision
    )
    return list(inspect.signature(model_class(config, recipe.model.task).forward).parameters)
