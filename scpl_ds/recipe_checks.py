"""What sections of a recipe ask of each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scpl_ds.ds_limits import base_limits
from scpl_ds.problems import Problem
from scpl_ds.recipe_scpl import ScplSection
from scpl_ds.recipe_sections import DataChoice, ModelSection, TrainSection

AFTER_LAYER = re.compile(r"accuracy_after_layer_(\d+)")
"""The number of a local head that classifies."""
_SCORES = {
    "sequence-classification": ("loss", "accuracy", "accuracy_after_layer_N of a local head"),
    "causal-lm": ("loss", "perplexity", "token_accuracy"),
}
"""Numbers of an evaluation, by task."""


def across(sections: Mapping[str, Any]) -> list[Problem]:
    """Problems between sections that are good by themselves; a missing one asks for nothing."""
    model: ModelSection | None = sections.get("model")
    data: DataChoice | None = sections.get("data")
    train: TrainSection = sections.get("train") or TrainSection()
    problems: list[Problem] = []
    if train.sample_prompts and model is not None and model.task != "causal-lm":
        message = f"model.task is '{model.task}', which gives classes, not text; remove the key"
        problems.append(Problem("train.sample_prompts", message))
    if train.sample_prompts and train.eval_strategy == "no":
        message = "are written at evaluations, and train.eval_strategy is no; remove one of the two"
        problems.append(Problem("train.sample_prompts", message))
    if train.sample_predictions and model is not None and model.task == "causal-lm":
        message = "is for classes; a causal-lm shows train.sample_prompts"
        problems.append(Problem("train.sample_predictions", message))
    if train.sample_predictions and train.eval_strategy == "no":
        message = "are of evaluations, and train.eval_strategy is no; remove one of the two"
        problems.append(Problem("train.sample_predictions", message))
    if train.push_to_hub and not train.export:
        message = "uploads the export, and train.export is false; remove one of the two"
        problems.append(Problem("train.push_to_hub", message))
    scpl: ScplSection | None = sections.get("scpl")
    if train.save_deepspeed_files and scpl is not None and scpl.sharding != "deepspeed":
        message = f"needs scpl.sharding: deepspeed, found {scpl.sharding}; remove the key"
        problems.append(Problem("train.save_deepspeed_files", message))
    if train.save_deepspeed_files and train.save_async:
        message = "cannot be written in the background; remove it or train.save_async"
        problems.append(Problem("train.save_deepspeed_files", message))
    own = getattr(getattr(data, "options", None), "own_metrics", False)
    if model is not None and train.best_metric is not None and not own:
        problems += _best(train.best_metric, model.task)
    if data is not None and getattr(data.options, "streaming", False):
        problems += _streaming(train, model)
    scpl, section = sections.get("scpl"), sections.get("deepspeed")
    if scpl is not None and section is not None and model is not None and model.lora is not None:
        problems += base_limits(model.lora.base_dtype, section, scpl.sharding)
    return problems


def _best(name: str, task: str) -> list[Problem]:
    known = _SCORES[task]
    if name in known or (task == "sequence-classification" and AFTER_LAYER.fullmatch(name)):
        return []
    message = f"'{name}' is not among the numbers of an evaluation of '{task}': {', '.join(known)}"
    return [Problem("train.metric_for_best_model", message)]


def _streaming(train: TrainSection, model: ModelSection | None) -> list[Problem]:
    problems: list[Problem] = []
    if model is not None and model.task != "causal-lm":
        message = (
            f"is for model.task: causal-lm; '{model.task}' has to know all labels before the first "
            "step. Remove the key"
        )
        problems.append(Problem("data.streaming", message))
    if train.max_steps < 0:
        message = "is needed with data.streaming: nobody knows how long a stream is"
        problems.append(Problem("train.max_steps", message))
    if train.group_by_length:
        message = "needs the lengths of all samples, which data.streaming does not know"
        problems.append(Problem("train.group_by_length", message))
    return problems
