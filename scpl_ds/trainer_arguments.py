"""What every field of transformers' ``TrainingArguments`` becomes here."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from scpl_ds.problems import Problem, recipe_error
from scpl_ds.recipe import Recipe
from scpl_ds.recipe_files import read_mapping

WHERE = "TrainingArguments"


class Field(NamedTuple):
    """One field of ``TrainingArguments``."""

    kind: Literal["mapped", "free", "refused"]
    """``mapped``: honoured; ``free``: any value is right, there is nothing to honour; ``refused``:
    a value other than the default is an error."""
    text: str
    """Where it goes; why nothing depends on it; or what to do instead."""


def _fields(kind: Literal["mapped", "free", "refused"], table: str) -> dict[str, Field]:
    """``name name: text`` in every line."""
    found = {}
    for line in table.strip().splitlines():
        names, _, text = line.strip().partition(": ")
        found |= {name: Field(kind, text) for name in names.split()}
    return found


FIELDS: dict[str, Field] = {
    **_fields(
        "mapped",
        """
        output_dir: `train.output_dir`, the run folder
        run_name: `train.run_name`
        num_train_epochs max_steps learning_rate weight_decay: the same
        adam_beta1 adam_beta2 adam_epsilon max_grad_norm: the same; clipping is per stage
        per_device_train_batch_size per_device_eval_batch_size: the same
        gradient_accumulation_steps: the same
        lr_scheduler_type: the same, of `linear`, `cosine`, `constant`, `constant_with_warmup`
        warmup_steps: `train.warmup_steps`; below 1 a part of all steps
        warmup_ratio: `train.warmup_ratio`
        optim: AdamW for `adamw_torch`, `adamw_torch_fused` (both fused here); `sgd`, `adagrad`
        bf16: `deepspeed.torch_autocast` in bfloat16: weights stay fp32, as in Trainer
        fp16: `deepspeed.fp16`
        activation_checkpointing gradient_checkpointing: `train.gradient_checkpointing`
        activation_checkpointing_kwargs gradient_checkpointing_kwargs: only `use_reentrant: False`, which it always is
        torch_compile torch_compile_backend torch_compile_mode: the same, layer by layer
        logging_strategy logging_steps logging_first_step: `train.logging_steps`, `train.logging_first_step`
        disable_tqdm: `train.disable_tqdm`
        report_to: `trackers`: `wandb`, `tensorboard`, `mlflow`; console and `metrics.jsonl` always
        eval_strategy eval_steps eval_on_start: the same
        save_strategy save_steps save_total_limit: the same, but `save_strategy="best"`
        load_best_model_at_end metric_for_best_model greater_is_better: the same; numbers of `compute_metrics` too
        restore_callback_states_from_checkpoint: the same
        prediction_loss_only: evaluations keep no predictions and do not call `compute_metrics`
        seed data_seed: the same
        dataloader_num_workers: the same
        remove_unused_columns label_names: the same; `label_names` only `["labels"]`
        group_by_length train_sampling_strategy length_column_name: `train.group_by_length`; `random` or `group_by_length`
        ddp_timeout: `scpl.timeout_s`
        deepspeed: the recipe's `deepspeed` section, `"auto"` values filled in; may have an `scpl` block
        fsdp fsdp_config: `scpl.sharding: fsdp`, ZeRO 3, or 2 with `reshard_after_forward: False`
        use_cpu: needs CUDA_VISIBLE_DEVICES to be empty where there is a GPU
        """,
    ),
    **_fields(
        "free",
        """
        do_train do_eval do_predict resume_from_checkpoint local_rank: for scripts; Trainer does not read them either
        log_level log_level_replica log_on_each_node: of transformers' own log lines
        logging_nan_inf_filter: a loss that is NaN ends the run with an error
        project trackio_space_id trackio_bucket_id trackio_static_space_id: of trackio, which `report_to` refuses
        hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision: of `push_to_hub`, which is refused
        average_tokens_across_devices: a loss is the mean over its micro-batch, a step the mean over micro-batches and ranks
        dataloader_drop_last: training always leaves out the last, incomplete global batch of an epoch
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor: how data are read ahead is the loader's own
        dataloader_multiprocessing_context dataloader_in_order: the same; the order is always kept
        eval_accumulation_steps eval_use_gather_object: predictions leave the device after every micro-batch
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph: of a wrapper that is not used
        ddp_backend tf32: TrainingArguments acts on it itself
        enable_jit_checkpoint: SIGTERM and SIGUSR1 always leave a checkpoint
        use_cache: training keeps no cache
        """,
    ),
    **_fields(
        "refused",
        """
        lr_scheduler_kwargs: the schedules take none here; for warmup_stable_decay use a recipe (train.decay_ratio)
        optim_args optim_target_modules: write the optimizer with its parameters into args.deepspeed
        label_smoothing_factor: the model's own loss is used; put the smoothing into the model
        bf16_full_eval fp16_full_eval: an evaluation computes as training does
        use_liger_kernel liger_kernel_config: patch the model before you pass it
        neftune_noise_alpha: add the noise in a forward hook of the embedding, in the model you pass
        torch_empty_cache_steps: call torch.cuda.empty_cache() in a callback
        auto_find_batch_size: the batch size is part of the objective; `scpl-ds plan` predicts the memory
        include_num_input_tokens_seen: perf/tokens_per_s is logged
        eval_delay: start training without evaluation and go on with it
        eval_do_concat_batches: compute_metrics gets one EvalPrediction of the whole set
        include_for_metrics: compute_metrics gets predictions and label_ids
        batch_eval_metrics: compute_metrics gets one EvalPrediction of the whole set
        save_only_model: a checkpoint holds what a resumed run needs; save_model writes the model alone
        save_on_each_node: checkpoints need one file system that all ranks see
        push_to_hub: call save_model and upload the folder (huggingface_hub.upload_folder)
        ignore_data_skip: a resumed run goes on behind the last sample, at no cost
        full_determinism: call transformers.enable_full_determinism(seed) in the script
        accelerator_config: batches are not split or dispatched; leave it out
        parallelism_config: stages and data-parallel ranks are scpl.stages and scpl.pipeline_ranks
        debug: use `scpl-ds doctor` and train.profile of a recipe
        skip_memory_metrics: perf/peak_memory_gib is always logged
        """,
    ),
}  # fmt: skip
"""Field -> what becomes of it. A test goes over the fields of the installed transformers."""

_OPTIMIZERS = {
    "adamw_torch": "AdamW",
    "adamw_torch_fused": "AdamW",
    "sgd": "SGD",
    "adagrad": "Adagrad",
}
_TRACKERS = ("wandb", "tensorboard", "mlflow")
_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
_FSDP_FREE = ("min_num_params", "xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt", "version",
              "reshard_after_forward", "auto_wrap_policy", "transformer_layer_cls_to_wrap",
              "state_dict_type", "cpu_ram_efficient_loading")  # fmt: skip
"""Keys that say how FSDP wraps and saves, which is ours here, or that are read below."""


def table() -> str:
    """``FIELDS`` as a table for ``docs/from-trainer.md``, fields with the same text in one row."""
    rows: dict[Field, list[str]] = {}
    for name, field in FIELDS.items():
        rows.setdefault(field, []).append(f"`{name}`")
    said = {"mapped": "", "free": "any value: ", "refused": "refused: "}
    lines = [f"| {', '.join(names)} | {said[f.kind]}{f.text} |" for f, names in rows.items()]
    return "\n".join(["| argument | here |", "|---|---|", *lines])


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
    for variable, field in (("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_USE_FSDP", "fsdp")):
        asked = os.environ.get(variable, "false").lower() in ("1", "true", "yes")
        if asked and not getattr(args, field):
            message = (
                f"accelerate was started with {variable}=true, but args.{field} is not set: "
                f"give it there, and start accelerate without it"
            )
            problems.append(Problem(field, message))
    return problems


def _word(value: Any) -> str:
    """Of an enumeration its value."""
    return str(getattr(value, "value", value))


def mapping_of(
    args: TrainingArguments, scpl: Mapping[str, Any], model: Mapping[str, Any], data: Mapping[str, Any]
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
        whole = (args.fsdp_config or {}).get("reshard_after_forward", True)
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
        "train": _train(args, bool(deepspeed.get("scheduler"))),
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
    given: Any = args.deepspeed
    section = dict(given) if isinstance(given, Mapping) else read_mapping(Path(given))
    scpl = dict(section.pop("scpl", None) or {})
    for name in ("bf16", "fp16"):
        block = section.get(name)
        if isinstance(block, Mapping) and block.get("enabled") == "auto":
            section[name] = {**block, "enabled": bool(getattr(args, name))}
    section.setdefault("optimizer", _optimizer(args))
    return section, scpl


def _optimizer(args: TrainingArguments) -> dict[str, Any]:
    return {"type": _OPTIMIZERS[_word(args.optim)], "params": {}}


def _train(args: TrainingArguments, own_schedule: bool) -> dict[str, Any]:
    same = (
        "output_dir", "run_name", "num_train_epochs", "max_steps", "per_device_train_batch_size",
        "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "seed",
        "data_seed", "dataloader_num_workers", "disable_tqdm", "save_total_limit",
        "gradient_checkpointing", "torch_compile", "eval_on_start", "logging_first_step",
    )  # fmt: skip
    train = {name: getattr(args, name) for name in same}
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
