"""Every field of transformers' ``TrainingArguments``, and what becomes of it."""

# ruff: noqa: E501 - one line a field
from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["mapped", "free", "differs", "refused"]


class Field(NamedTuple):
    """One field of ``TrainingArguments``."""

    kind: Kind
    """``mapped``: honoured; ``free``: any value is right, there is nothing to honour; ``differs``:
    neither value is what is done; ``refused``: a value other than the default is an error."""
    text: str
    """Where it goes; why nothing depends on it; or what to do instead."""


def _fields(kind: Kind, table: str) -> dict[str, Field]:
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
        push_to_hub: `save_model` uploads what it has written, as in Trainer; `trainer.push_to_hub()` does so without it too
        hub_strategy: only `end`, which has to be set with `push_to_hub`
        hub_model_id hub_private_repo hub_revision hub_token: the same; the token is in no recipe and no checkpoint
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
        hub_always_push: of uploads during training, of which there are none
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
        "differs",
        """
        average_tokens_across_devices: whatever it says, a loss is the mean over the labelled tokens of its micro-batch, a step the mean over micro-batches and ranks; the same numbers only where all label equally many
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
        ignore_data_skip: a resumed run goes on behind the last sample, at no cost
        full_determinism: call transformers.enable_full_determinism(seed) in the script
        accelerator_config: batches are not split or dispatched; leave it out
        parallelism_config: stages and data-parallel ranks are scpl.stages and scpl.pipeline_ranks
        debug: use `scpl-ds doctor` and train.profile of a recipe
        skip_memory_metrics: perf/peak_memory_gib is always logged
        """,
    ),
}
"""Field -> what becomes of it. A test goes over the fields of the installed transformers."""


def table() -> str:
    """``FIELDS`` as a table for ``docs/from-trainer.md``, fields with the same text in one row."""
    rows: dict[Field, list[str]] = {}
    for name, field in FIELDS.items():
        rows.setdefault(field, []).append(f"`{name}`")
    said = {"mapped": "", "free": "any value: ", "differs": "differs: ", "refused": "refused: "}
    lines = [f"| {', '.join(names)} | {said[f.kind]}{f.text} |" for f, names in rows.items()]
    return "\n".join(["| argument | here |", "|---|---|", *lines])
