"""Every key DeepSpeed 0.19.8 reads from its config file, with the kind of value it takes.

DeepSpeed ignores a top-level key it does not know in silence; a recipe refuses it, and needs this
table for that without importing DeepSpeed (seconds). ``tests/unit/test_ds_config.py`` compares the
table with the installed DeepSpeed, so an upgrade that adds or drops a key fails there first.

Source: DeepSpeed 0.19.8, ``runtime/config.py``, ``runtime/constants.py`` and the pydantic models of
``runtime/zero``, ``runtime/precision_config.py``, ``monitor``, ``comm`` and ``compile``.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

Keys: TypeAlias = "dict[str, str | Keys]"
"""Key -> kind of value (``int float bool str list dict any``), or the keys of a nested section."""


def keys(**kinds: str | Keys) -> Keys:
    """``keys(int="a b", nested={...})`` -> ``{"a": "int", "b": "int", "nested": {...}}``."""
    table: Keys = {}
    for kind, names in kinds.items():
        if isinstance(names, dict):
            table[kind] = names
        else:
            table.update({name: kind for name in names.split()})
    return table


OFFLOAD_PARAM = keys(
    str="device nvme_path", int="buffer_count buffer_size max_in_cpu", bool="pin_memory"
)
OFFLOAD_OPTIMIZER = keys(
    str="device nvme_path",
    int="buffer_count",
    bool="pin_memory pipeline_read pipeline_write fast_init super_offload",
    float="ratio cpuadam_cores_perc",
)
ZENFLOW = keys(
    float="topk_ratio auto_ratio pt_reserved_cores_perc",
    str="select_strategy",
    any="select_interval update_interval",
    bool="overlap_step offload",
    int="full_warm_up_rounds steps_per_epoch",
)
LEAF_MODULE = keys(list="classes names name_suffixes")
ZERO = keys(
    int="stage reduce_bucket_size allgather_bucket_size sub_group_size zero_hpz_partition_size"
    " stage3_prefetch_bucket_size stage3_param_persistence_threshold"
    " stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance"
    " stage3_module_granularity_threshold",
    bool="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions"
    " overlap_comm compute_grad_norm load_from_fp32_weights elastic_checkpoint cpu_offload_param"
    " cpu_offload_use_pin_memory cpu_offload stage3_gather_16bit_weights_on_model_save"
    " stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential"
    " stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1"
    " round_robin_gradients parameter_alignment zero_quantized_weights"
    " zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear"
    " pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings"
    " enable_sanity_checks save_muon_momentum_buffer_in_memory",
    offload_param=OFFLOAD_PARAM,
    offload_optimizer=OFFLOAD_OPTIMIZER,
    zenflow=ZENFLOW,
    leaf_module=LEAF_MODULE,
)
BF16 = keys(
    bool="enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads"
    " bf16_optimizer_states"
)
FP16 = keys(
    bool="enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
    float="loss_scale",
    int="initial_scale_power loss_scale_window hysteresis min_loss_scale",
)
TORCH_AUTOCAST = keys(bool="enabled", str="dtype", list="lower_precision_safe_modules")
TENSORBOARD = keys(bool="enabled", str="output_path job_name")
CSV_MONITOR = keys(bool="enabled", str="output_path job_name")
WANDB = keys(bool="enabled", str="group team project")
COMET = keys(
    bool="enabled online",
    int="samples_log_interval",
    str="project workspace api_key experiment_name experiment_key mode",
)
COMMS_LOGGER = keys(bool="enabled prof_all verbose debug", list="prof_ops")
FLOPS_PROFILER = keys(
    bool="enabled detailed",
    float="recompute_fwd_factor",
    int="profile_step module_depth top_modules",
    str="output_file",
)
THROUGHPUT_TIMER = keys(bool="enabled synchronized")
ACTIVATION_CHECKPOINTING = keys(
    bool="partition_activations contiguous_memory_optimization synchronize_checkpoint_boundary"
    " profile cpu_checkpointing",
    int="number_checkpoints",
)
CHECKPOINT_WRITER = keys(
    str="type data_parallel",
    int="io_buffer_size io_multiplier",
    bool="io_buffer_double show_statistics decoupled",
)
CHECKPOINT = keys(
    str="tag_validation",
    bool="load_universal use_node_local_storage checkpoint_serialization",
    parallel_write=keys(bool="pipeline_stage"),
    writer=CHECKPOINT_WRITER,
)
DATA_TYPES = keys(str="grad_accum_dtype param_dtype buffer_dtype", any="keep_in_fp32_modules")
AIO = keys(
    int="block_size queue_depth intra_op_parallelism", bool="single_submit overlap_events use_gds"
)
COMPILE = keys(
    bool="deepcompile autoep_non_moe free_activation offload_activation"
    " offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log"
    " offload_parameters sync_before_reduce sync_after_reduce sync_before_allgather"
    " sync_after_allgather keep_int_input_tensors keep_all_input_tensors",
    int="free_activation_threshold",
    list="passes",
)
HYBRID_ENGINE = keys(
    bool="enabled release_inference_cache pin_parameters enable_cuda_graph",
    int="max_out_tokens inference_tp_size tp_gather_partition_size",
)
PIPELINE = keys(
    any="stages",
    str="partition",
    bool="seed_layers pipe_partitioned grad_partitioned",
    int="activation_checkpoint_interval",
)

# 'dict': sections that ds_checks.unsupported refuses whole; their keys are not looked at.
TOP: Keys = keys(
    int="train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps"
    " steps_per_print vocabulary_size sequence_parallel_size",
    float="gradient_clipping gradient_predivide_factor",
    bool="managed_gradient_accumulation dump_state disable_python_gc disable_allgather"
    " prescale_gradients zero_allow_untested_optimizer zero_force_ds_cpu_optimizer"
    " wall_clock_breakdown memory_breakdown use_data_before_expert_parallelism"
    " dataloader_drop_last",
    str="communication_data_type seq_parallel_communication_data_type gradient_allreduce_op"
    " log_level",
    dict="autotuning data_efficiency expert_parallel tensor_parallel weight_quantization"
    " datastates_ckpt",
    optimizer=keys(str="type", dict="params", bool="legacy_fusion"),
    scheduler=keys(str="type", dict="params"),
    zero_optimization=ZERO,
    bf16=BF16,
    bfloat16=BF16,
    fp16=FP16,
    torch_autocast=TORCH_AUTOCAST,
    tensorboard=TENSORBOARD,
    wandb=WANDB,
    csv_monitor=CSV_MONITOR,
    comet=COMET,
    comms_logger=COMMS_LOGGER,
    flops_profiler=FLOPS_PROFILER,
    timers=keys(throughput=THROUGHPUT_TIMER),
    activation_checkpointing=ACTIVATION_CHECKPOINTING,
    checkpoint=CHECKPOINT,
    data_types=DATA_TYPES,
    aio=AIO,
    compile=COMPILE,
    hybrid_engine=HYBRID_ENGINE,
    pipeline=PIPELINE,
)

_ADAM = keys(
    float="lr eps weight_decay",
    list="betas",
    bool="amsgrad bias_correction torch_adam adam_w_mode fp32_optimizer_states foreach",
)
OPTIMIZER_PARAMS: dict[str, Keys] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "sgd": keys(float="lr momentum dampening weight_decay", bool="nesterov foreach"),
    "adagrad": keys(float="lr lr_decay weight_decay initial_accumulator_value eps", bool="foreach"),
}
"""Lower-case optimizer type -> its parameters; those that ``optim.build_optimizer`` makes."""

OTHER_OPTIMIZERS = ("Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD")
"""Types that DeepSpeed knows and ``optim`` does not (yet)."""

REMOVED_OPTIMIZERS = ("onebitadam", "onebitlamb", "zerooneadam")
"""Lower-case types of older DeepSpeed releases that 0.19.8 no longer has."""

SCHEDULER_PARAMS: dict[str, Keys] = {
    "WarmupLR": keys(
        float="warmup_min_lr warmup_max_lr",
        int="warmup_num_steps last_batch_iteration",
        str="warmup_type",
    ),
    "WarmupDecayLR": keys(
        float="warmup_min_lr warmup_max_lr",
        int="total_num_steps warmup_num_steps last_batch_iteration",
        str="warmup_type",
    ),
    "WarmupCosineLR": keys(
        float="warmup_min_ratio cos_min_ratio",
        int="total_num_steps warmup_num_steps last_batch_iteration",
        str="warmup_type",
    ),
}
"""Scheduler type -> its parameters; exactly the types that ``optim`` computes."""

OTHER_SCHEDULERS = ("LRRangeTest", "OneCycle")
"""Types that DeepSpeed knows and ``optim`` does not (yet)."""

REMOVED = [
    "nebula",
    "compression_training",
    "amp",
    "quantize_training",
    "sparse_gradients",
    "eigenvalue",
    "sparse_attention",
    "elasticity",
    "graph_harvesting",
    "curriculum_learning",
    "progressive_layer_drop",
]
"""Top-level keys that older DeepSpeed releases read and 0.19.8 refuses."""

REMOVED_ZERO = ["mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"]

REMOVED_PATHS = (*REMOVED, *(f"zero_optimization.{key}" for key in REMOVED_ZERO))
"""The same as dotted paths. DeepSpeed refuses them even where they switch nothing on."""

ALIASES = {
    "learning_rate": "lr",
    "adam_epsilon": "eps",
    "epsilon": "eps",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "batch_size": "train_micro_batch_size_per_gpu",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "per_device_train_batch_size": "train_micro_batch_size_per_gpu",
    "grad_clip": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "accumulation_steps": "gradient_accumulation_steps",
    "warmup_steps": "warmup_num_steps",
    "total_steps": "total_num_steps",
    "zero": "zero_optimization",
    "lr_scheduler": "scheduler",
}
"""What people write -> DeepSpeed's key: names too far apart for a spelling comparison."""


class Fill(NamedTuple):
    """How a DeepSpeed key gets its value from the ``train`` section."""

    train_keys: tuple[str, ...]
    default: Any
    """Hugging Face's default: what ``"auto"`` means when ``train`` is silent."""


FILLS: dict[str, Fill] = {
    "train_micro_batch_size_per_gpu": Fill(("per_device_train_batch_size",), 8),
    "gradient_accumulation_steps": Fill(("gradient_accumulation_steps",), 1),
    "gradient_clipping": Fill(("max_grad_norm",), 1.0),
    "optimizer.params.lr": Fill(("learning_rate",), 5e-5),
    "optimizer.params.weight_decay": Fill(("weight_decay",), 0.0),
    "optimizer.params.betas": Fill(("adam_beta1", "adam_beta2"), [0.9, 0.999]),
    "optimizer.params.eps": Fill(("adam_epsilon",), 1e-8),
}
"""Dotted DeepSpeed key -> the ``train`` keys that mean the same, as transformers maps them."""

AUTO_DROPPED = (
    "train_batch_size",
    "bf16.enabled",
    "bfloat16.enabled",
    "fp16.enabled",
    "data_types.grad_accum_dtype",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
)
"""Keys whose ``"auto"`` means DeepSpeed's own default (for precision and offloading: off)."""
