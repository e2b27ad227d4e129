"""A recipe that does what transformers' ``TrainingArguments`` say."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from scpl_ds.problems import Problem, recipe_error
from scpl_ds.recipe import Recipe
from scpl_ds.recipe_files import read_mapping
from scpl_ds.recipe_hub import repository
from scpl_ds.trainer_export import destination_of
from scpl_ds.trainer_fields import FIELDS, Field

WHERE = "TrainingArguments"


_OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "sgd": "SGD",
    "adagrad": "Adagrad",
}
_UNREAD = {
    "sgd": ("adam_beta1", "adam_beta2", "adam_epsilon"),
    "adagrad": ("adam_beta1", "adam_beta2"),
}
"""Optimizer -> arguments that it has no use for; TrainingArguments always has them."""
_TRACKERS = ("wandb", "tensorboard", "mlflow")
_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_PRECISIONS = ("bf16", "fp16")
_FSDP_FREE = ("min_num_params", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "version",
              "reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap",
              "state_dict_type", "cpu_ram_efficient_loading")  # fmt: skip
"""Keys that say how FSDP wraps and saves, which is ours here, or that are read below."""


def problems_of_arguments(args: TrainingArguments) -> list[Problem]:
    """Every field with a value that cannot be honoured."""
    problems: list[Problem] = []
    for field in dataclasses.fields(args):
        known = FIELDS.get(field.name)
        value = getattr(args, field.name)
        if known is None:  # of a transformers that is newer than this table
            known = Field("refused", "scpl_ds does not know it yet")
        if known.kind == "refused" and not _is_default(field, value):
            problems.append(Problem(field.name, f"{value!r} cannot be honoured: {known.text}"))
    return problems + _values(args)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.name == "accelerator_config":
        return not isinstance(value, AcceleratorConfig) or value == _plain_accelerator()
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return value == default or not (value or default)


def _plain_accelerator() -> AcceleratorConfig:
    config = AcceleratorConfig()
    config.pop("use_configured_state", False)  # as TrainingArguments leaves it
    return config


def _values(args: TrainingArguments) -> list[Problem]:
    """Mapped fields with a value that is not there."""
    problems: list[Problem] = []

    def among(name: str, value: str, known: Any) -> None:
        if value not in known:
            problems.append(Problem(name, f"'{value}' is not among {', '.join(known)}"))

    among("optim", _word(args.optim), _OPTIMIZERS)
    among("lr_scheduler_type", _word(args.lr_scheduler_type), _SCHEDULES)
    among("save_strategy", _word(args.save_strategy), ("no", "steps", "epoch"))
    for name in args.report_to or ():
        among("report_to", str(name), _TRACKERS)
    sampling = getattr(args, "train_sampling_strategy", "random")
    among("train_sampling_strategy", _word(sampling), ("random", "group_by_length"))
    if args.push_to_hub:
        problems += _hub_problems(args)
    if args.label_names not in (None, ["labels"]):
        problems.append(
            Problem("label_names", f"{args.label_names} must be ['labels'], as models call them")
        )
    reentrant = args.gradient_checkpointing_kwargs or {}
    if reentrant not in ({}, {"use_reentrant": False}):
        problems.append(
            Problem("gradient_checkpointing_kwargs", f"{reentrant} must be use_reentrant: False")
        )
    other = [k for k in (args.fsdp_config or {}) if args.fsdp and k not in _FSDP_FREE]
    problems += [Problem(f"fsdp_config.{key}", "is not known here; remove it") for key in other]
    if args.use_cpu and torch.cuda.is_available():
        message = "True, but there is a GPU; start with CUDA_VISIBLE_DEVICES= in front"
        problems.append(Problem("use_cpu", message))
    for variable, field in (
        ("ACCELERATE_USE_DEEPSPEED", "deepspeed"),
        ("ACCELERATE_USE_FSDP", "fsdp"),
    ):
        asked = os.environ.get(variable, "false").lower() in ("1", "true", "yes")
        if asked and not getattr(args, field):
            message = (
                f"accelerate was started with {variable}=true, but args.{field} is not set: "
                f"give it there, and start accelerate without it"
            )
            problems.append(Problem(field, message))
    return problems + _precision_problems(args)


def _hub_problems(args: TrainingArguments) -> list[Problem]:
    problems: list[Problem] = []
    if (strategy := _word(args.hub_strategy)) != "end":
        message = (
            f"'{strategy}' cannot be honoured: nothing is uploaded during training. Set "
            "hub_strategy='end': save_model and push_to_hub upload the model"
        )
        problems.append(Problem("hub_strategy", message))
    where = "hub_model_id" if args.hub_model_id else "output_dir"
    try:
        repository(destination_of(args).repo_id)
    except ValueError as error:
        problems.append(Problem(where, f"push_to_hub: {error} Set hub_model_id='owner/name'"))
    return problems


def _precision_problems(args: TrainingArguments) -> list[Problem]:
    """``bf16`` or ``fp16`` where the file of ``deepspeed`` says another thing."""
    if not args.deepspeed:
        return []
    section = _given_section(args)
    written = {name for name in _PRECISIONS if _enabled(section.get(name)) is True}
    problems: list[Problem] = []
    for name in _PRECISIONS:
        if getattr(args, name) and (_enabled(section.get(name)) is False or written - {name}):
            message = (
                f"True, but args.deepspeed has {', '.join(sorted(written)) or f'{name} off'}: set "
                f"{name}.enabled to true or auto there and the other one to false, or leave the "
                "argument out"
            )
            problems.append(Problem(name, message))
    return problems


def _enabled(block: Any) -> Any:
    """Of a block of precision; None where there is none."""
    return block.get("enabled", False) if isinstance(block, Mapping) else None


def _word(value: Any) -> str:
    """Of an enumeration its value."""
    return str(getattr(value, "value", value))


def mapping_of(
    args: TrainingArguments,
    scpl: Mapping[str, Any],
    model: Mapping[str, Any],
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """A recipe that does what the arguments say.

    Steps that are a part of all steps, or an epoch, are not in it yet: see :func:`with_steps`.

    Args:
        args: Transformers' own.
        scpl: The ``scpl`` section, before that of ``args.deepspeed``.
        model: The ``model`` section.
        data: The ``data`` section.

    Raises:
        RecipeError: Every argument that cannot be honoured, at once.
    """
    if problems := problems_of_arguments(args):
        raise recipe_error(problems, WHERE)
    deepspeed, own_scpl = _deepspeed(args)
    scpl = {**own_scpl, **scpl}
    if args.fsdp and not args.deepspeed:
        scpl.setdefault("sharding", "fsdp")
        config: Any = args.fsdp_config or {}  # TrainingArguments has read the file by now
        whole = config.get("reshard_after_forward", True)
        stage = 2 if str(whole).lower() in ("false", "shard_grad_op") else 3
        deepspeed.setdefault("zero_optimization", {"stage": stage})
    elif not args.deepspeed:
        scpl.setdefault("sharding", "ddp")
    if args.ddp_timeout != _default(args, "ddp_timeout"):
        scpl.setdefault("timeout_s", args.ddp_timeout)
    trackers = [{"name": "console"}, *({"name": str(name)} for name in args.report_to or ())]
    return {
        "model": dict(model),
        "scpl": scpl,
        "deepspeed": deepspeed,
        "data": dict(data),
        "train": _train(
            args,
            str((deepspeed.get("optimizer") or {}).get("type", "AdamW")),
            bool(deepspeed.get("scheduler")),
        ),
        "trackers": trackers,
    }


def _default(args: TrainingArguments, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(args) if f.name == name)


def _deepspeed(args: TrainingArguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``deepspeed`` section, and what its file says in ``scpl``."""
    if not args.deepspeed:
        section: dict[str, Any] = {}
        if args.bf16:
            section["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if args.fp16:
            section["fp16"] = {"enabled": True}
        return section | {"optimizer": _optimizer(args)}, {}
    section = _given_section(args)
    scpl = dict(section.pop("scpl", None) or {})
    autocast = _enabled(section.get("torch_autocast"))
    for name in _PRECISIONS:
        block, asked = section.get(name), bool(getattr(args, name))
        if _enabled(block) == "auto":
            section[name] = {**block, "enabled": asked}  # pyright: ignore[reportGeneralTypeIssues]
        elif block is None and asked and not autocast:  # as accelerate does
            section[name] = {"enabled": True}
    section.setdefault("optimizer", _optimizer(args))
    return section, scpl


def _given_section(args: TrainingArguments) -> dict[str, Any]:
    """What ``args.deepspeed`` holds or names."""
    given: Any = args.deepspeed
    return dict(given) if isinstance(given, Mapping) else read_mapping(Path(given))


def _optimizer(args: TrainingArguments) -> dict[str, Any]:
    return {"type": _OPTIMIZERS[_word(args.optim)], "params": {}}


def _train(args: TrainingArguments, kind: str, own_schedule: bool) -> dict[str, Any]:
    """The ``train`` section, beside an optimizer of that kind."""
    same = (
        "output_dir", "run_name", "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
        "data_seed", "dataloader_num_workers", "disable_tqdm", "save_total_limit",
        "gradient_checkpointing", "torch_compile", "eval_on_start", "logging_first_step",
    )  # fmt: skip
    train = {name: getattr(args, name) for name in same}
    for name in _UNREAD.get(kind.lower(), ()):
        if train[name] == _default(args, name):  # what was asked for is refused by the recipe
            train.pop(name)
    train |= {
        "eval_strategy": _word(args.eval_strategy),
        "save_strategy": _word(args.save_strategy),
        "group_by_length": groups_by_length(args),
        "export": False,
    }
    if args.torch_compile:
        train["torch_compile_backend"] = args.torch_compile_backend
        train["torch_compile_mode"] = args.torch_compile_mode
    if args.load_best_model_at_end:
        for name in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
            train[name] = getattr(args, name)
    for what in ("eval", "save"):
        if train[f"{what}_strategy"] == "steps":
            steps = getattr(args, f"{what}_steps")
            # A part of all steps: one that fits any other, until the steps are known.
            train[f"{what}_steps"] = int(steps) if steps >= 1 else 1
    every = args.logging_steps
    train["logging_steps"] = int(every) if _logs_by_steps(args) else 1
    if not own_schedule:
        train["lr_scheduler_type"] = _word(args.lr_scheduler_type)
        warmup, ratio = args.warmup_steps or 0, getattr(args, "warmup_ratio", None)
        if 0 < warmup < 1:
            ratio, warmup = warmup, 0
        if warmup:
            train["warmup_steps"] = int(warmup)
        elif ratio:
            train["warmup_ratio"] = ratio
    return train


def groups_by_length(args: TrainingArguments) -> bool:
    sampling = getattr(args, "train_sampling_strategy", "random")
    return bool(getattr(args, "group_by_length", False)) or _word(sampling) == "group_by_length"


def _logs_by_steps(args: TrainingArguments) -> bool:
    return _word(args.logging_strategy) == "steps" and args.logging_steps >= 1


def with_steps(recipe: Recipe, args: TrainingArguments, total: int, epoch: int) -> Recipe:
    """The recipe with every number of steps, now that they are known.

    Args:
        recipe: Of :func:`mapping_of`.
        args: Transformers' own.
        total: Optimizer steps of the run.
        epoch: Optimizer steps of an epoch.
    """
    found: dict[str, int] = {}
    for what in ("eval", "save"):
        steps = getattr(args, f"{what}_steps")
        if _word(getattr(args, f"{what}_strategy")) == "steps" and 0 < steps < 1:
            found[f"{what}_steps"] = math.ceil(total * steps)
    if not _logs_by_steps(args):
        by = {"epoch": epoch, "no": total, "steps": math.ceil(total * args.logging_steps)}
        found["logging_steps"] = max(1, by[_word(args.logging_strategy)])
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=found)})
