"""What DeepSpeed could do and this package refuses, by name. The one place to lift a limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from scpl_ds.ds_checks import lookup
from scpl_ds.problems import Problem, dotted, show

if TYPE_CHECKING:
    from scpl_ds.ds_config import DeepSpeedSection

_WHOLE_SECTIONS = [
    "autotuning",
    "data_efficiency",
    "expert_parallel",
    "tensor_parallel",
    "weight_quantization",
    "hybrid_engine",
    "compile",
    "datastates_ckpt",
]

_MONITORS = {
    "wandb": "use trackers: [{name: wandb}]",
    "csv_monitor": "metrics.jsonl in the run folder always has all metrics",
    "tensorboard": "remove it",
    "comet": "remove it",
}

_WITHOUT_EFFECT = (
    ("checkpoint.tag_validation", ("warn",), "checkpoints are not DeepSpeed's"),
    ("checkpoint.use_node_local_storage", (False,), "checkpoints are not DeepSpeed's"),
    ("checkpoint.checkpoint_serialization", (True,), "checkpoints are not DeepSpeed's"),
    ("checkpoint.parallel_write.pipeline_stage", (False,), "checkpoints are not DeepSpeed's"),
    ("checkpoint.writer", ({},), "checkpoints are not DeepSpeed's"),
    ("zero_force_ds_cpu_optimizer", (False,), "the optimizer is always torch's"),
)
"""Path, the values that ask for nothing, why the others would do nothing."""

_ENGINE_ONLY = (
    ("flops_profiler", "enabled", False),
    ("comms_logger", "enabled", False),
    ("communication_data_type", "", None),
    ("prescale_gradients", "", False),
    ("gradient_predivide_factor", "", 1.0),
    ("wall_clock_breakdown", "", False),
    ("memory_breakdown", "", False),
    ("dump_state", "", False),
    ("disable_allgather", "", False),
    ("timers", "", None),
    ("aio", "", None),
)
"""What DeepSpeed's own engine does: path, the key below it that switches it on, its default."""


TORCH_BACKENDS = ("none", "ddp", "fsdp")
_DEEPSPEED_SCALER = {
    "loss_scale": 0,
    "hysteresis": 1,
    "consecutive_hysteresis": False,
    "min_loss_scale": None,
    "auto_cast": False,
    "fp16_master_weights_and_grads": False,
}
"""What torch's gradient scaler cannot be told, and what it does."""

_DEEPSPEED_DTYPES = (
    "bf16.immediate_grad_update",
    "bf16.check_grad_overflow",
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "data_types.param_dtype",
    "data_types.buffer_dtype",
    "data_types.keep_in_fp32_modules",
)
AUTOCAST_DTYPES = ("bfloat16", "float16", "bf16", "fp16")

Refuse = Callable[[str, str], None]


def unsupported(section: DeepSpeedSection, sharding: str) -> list[Problem]:
    """Everything in a section that is not possible here, or would do nothing.

    Args:
        section: A section whose keys were found good.
        sharding: Name of the backend (``scpl.sharding``).
    """
    config, problems = section.filled, list[Problem]()

    def refuse(path: str, reason: str) -> None:
        problems.append(Problem(dotted("deepspeed", path), reason))

    _sharding_limits(section, sharding, refuse)
    zero = config.get("zero_optimization") or {}
    for key, value in zero.items():
        if key in ("cpu_offload", "cpu_offload_param", "zenflow") and value:
            way = "use offload_optimizer and offload_param" if key != "zenflow" else "remove it"
            refuse(f"zero_optimization.{key}", f"is not supported; {way}")
        elif (key == "zero_hpz_partition_size" and value not in (None, 1)) or (
            key.startswith("zero_quantized_") and value
        ):
            refuse(f"zero_optimization.{key}", "ZeRO++ is planned; remove this key")
    _precision_limits(section, sharding, refuse)
    if "pipeline" in config:
        refuse(
            "pipeline",
            "is for DeepSpeed's own PipelineEngine; set scpl.stages, scpl.partition and "
            "scpl.pipeline_ranks instead",
        )
    for key, way in _MONITORS.items():
        if lookup(config, f"{key}.enabled"):
            refuse(key, f"would start one monitor per stage; {way}")
    for key in _WHOLE_SECTIONS:
        block = config.get(key)
        if block and not (isinstance(block, Mapping) and block.get("enabled") is False):
            refuse(key, "does not work with stages that train on their own; remove this section")
    for key, allowed in (
        ("sequence_parallel_size", (None, 1)),
        ("managed_gradient_accumulation", (None, True)),
        ("gradient_allreduce_op", (None, "mean")),
        ("checkpoint.load_universal", (None, False)),
        ("dataloader_drop_last", (None, True)),
        ("optimizer.legacy_fusion", (None, False)),
        ("optimizer.params.bias_correction", (None, True)),
        ("optimizer.params.fp32_optimizer_states", (None, True)),
        ("scheduler.params.last_batch_iteration", (None, -1)),
    ):
        value = lookup(config, key)
        if value not in allowed:
            refuse(key, f"{show(value)} is not supported; use {allowed[1]!r} or remove the key")
    for path, idle, why in _WITHOUT_EFFECT:
        value = lookup(config, path)
        if value is not None and (value.lower() if isinstance(value, str) else value) not in idle:
            refuse(path, f"{show(value)} has no effect: {why}; remove the key")
    for path, switch, idle in _ENGINE_ONLY:
        value = lookup(config, dotted(path, switch))
        if sharding in TORCH_BACKENDS and value is not None and value != idle:
            refuse(
                path,
                f"{show(value)} has no effect with scpl.sharding: {sharding}, which runs no "
                "DeepSpeed engine; remove the key, or use scpl.sharding: deepspeed",
            )
    activation = config.get("activation_checkpointing") or {}
    if any(activation.values()):
        refuse(
            "activation_checkpointing",
            "is for models that call DeepSpeed's own checkpoint function; set "
            "train.gradient_checkpointing: true, or PipelineModule's "
            "activation_checkpoint_interval, and remove this section",
        )
    return problems


def base_limits(base_dtype: str | None, section: DeepSpeedSection, sharding: str) -> list[Problem]:
    """Why frozen weights cannot be held as ``model.lora.base_dtype`` asks."""
    computed = section.autocast or section.precision
    if base_dtype is None:
        return []
    if base_dtype == "nf4" and sharding not in ("none", "ddp"):
        message = (
            f"nf4 weights are packed and cannot be shared out or moved by scpl.sharding: {sharding}"
            "; use none or ddp, or bfloat16"
        )
        return [Problem("model.lora.base_dtype", message)]
    if sharding == "deepspeed":  # its own type is that of all weights
        computed = section.precision
    if computed != "bf16":
        with_what = f"with scpl.sharding: {sharding} this run computes in {computed}"
        if sharding == "deepspeed" and section.autocast:
            with_what = "DeepSpeed's torch_autocast keeps all weights in fp32"
        message = f"{base_dtype} weights are computed with in bf16, but {with_what}; set"
        return [Problem("model.lora.base_dtype", f"{message} deepspeed.bf16.enabled: true")]
    return []


def _sharding_limits(section: DeepSpeedSection, sharding: str, refuse: Refuse) -> None:
    """ZeRO stages and offloading that a backend cannot do."""
    zero, stage = section.filled.get("zero_optimization") or {}, section.zero_stage
    offloads = {what: section.offload(what) for what in ("optimizer", "param")}
    if sharding in ("none", "ddp"):
        if stage:
            refuse(
                "zero_optimization.stage",
                f"scpl.sharding '{sharding}' keeps everything on every rank; use stage 0, or "
                f"scpl.sharding: deepspeed{' or fsdp' if stage > 1 else ''}",
            )
    elif sharding == "fsdp":
        if stage < 2:
            refuse(
                "zero_optimization.stage",
                f"is {stage}, but scpl.sharding 'fsdp' shards parameters, gradients and optimizer "
                "state; use 2 (whole parameters stay between forward and backward, "
                "reshard_after_forward false), 3 (they do not), or scpl.sharding: ddp",
            )
        for key, value in zero.items():
            if key != "stage" and not key.startswith("offload_") and value is not None:
                refuse(f"zero_optimization.{key}", "has no effect with scpl.sharding: fsdp")
        for what in ("param", "optimizer"):
            for key, value in (zero.get(f"offload_{what}") or {}).items():
                if key not in ("device", "pin_memory") and value is not None:
                    path = f"zero_optimization.offload_{what}.{key}"
                    refuse(path, "has no effect with scpl.sharding: fsdp")
        if set(offloads.values()) not in ({None}, {"cpu"}):
            refuse(
                "zero_optimization",
                "FSDP2 offloads parameters, gradients and optimizer state together, to the CPU: "
                "write offload_optimizer and offload_param with device: cpu, or neither",
            )
    elif sharding == "deepspeed" and stage and section.optimizer.type == "adagrad":
        refuse(
            "optimizer.type",
            "Adagrad does not work with ZeRO: DeepSpeed rebuilds it with one parameter group, "
            "which loses the weight decay of each. Use zero_optimization.stage: 0, or another "
            "optimizer",
        )
    if sharding != "fsdp":
        for what, least in (("optimizer", 1), ("param", 3)):
            if offloads[what] and stage < least:
                refuse(
                    f"zero_optimization.offload_{what}",
                    f"needs zero_optimization.stage: {least}{' or more' if least < 3 else ''} and "
                    f"scpl.sharding: deepspeed (or fsdp), but stage is {stage}",
                )


def _precision_limits(section: DeepSpeedSection, sharding: str, refuse: Refuse) -> None:
    """Precisions that a backend cannot do, or that DeepSpeed 0.19.8 does wrong."""
    config, precision = section.filled, section.precision
    accumulate = lookup(config, "data_types.grad_accum_dtype")
    if precision != "fp32" and section.autocast:
        refuse("torch_autocast", f"and {precision} are two kinds of mixed precision; keep one")
    if lookup(config, "fp16.enabled") and (
        lookup(config, "bf16.enabled") or lookup(config, "bfloat16.enabled")
    ):
        refuse("fp16", "and bf16 are both enabled; keep one")
    if precision == "fp32" and accumulate not in (None, "fp32"):
        refuse("data_types.grad_accum_dtype", f"{accumulate} needs bf16 or fp16")
    written = lookup(config, "torch_autocast.dtype")
    if section.autocast and str(written or "bfloat16") not in AUTOCAST_DTYPES:
        known = ", ".join(AUTOCAST_DTYPES)
        refuse("torch_autocast.dtype", f"must be one of {known}, got {show(written)}")
    if sharding == "deepspeed":
        if section.autocast == "fp16":
            refuse(
                "torch_autocast.dtype",
                "DeepSpeed 0.19.8 clips gradients by a norm that still has the loss scale in it; "
                "use bfloat16, fp16: {enabled: true}, or scpl.sharding: ddp or fsdp",
            )
        if precision != "fp32" and section.zero_stage == 0:
            why = (
                "never scales the loss (but divides the gradients)"
                if precision == "fp16"
                else "accumulates gradients in bf16"
            )
            refuse(
                precision,
                f"DeepSpeed 0.19.8 without ZeRO {why}; use zero_optimization.stage: 1, which "
                "costs no more, or scpl.sharding: ddp",
            )
        return
    if sharding not in TORCH_BACKENDS:
        return
    if accumulate not in (None, "fp32"):
        refuse(
            "data_types.grad_accum_dtype",
            f"{accumulate}: scpl.sharding '{sharding}' accumulates in fp32; remove the key",
        )
    modules = lookup(config, "torch_autocast.lower_precision_safe_modules")
    if section.autocast and modules is not None:
        refuse(
            "torch_autocast.lower_precision_safe_modules",
            f"has no effect with scpl.sharding: {sharding}; remove it",
        )
    for path in _DEEPSPEED_DTYPES:
        if lookup(config, path) not in (None, False):
            refuse(path, f"has no effect with scpl.sharding: {sharding}; remove it")
    if precision == "fp16":
        for key, idle in _DEEPSPEED_SCALER.items():
            value = lookup(config, f"fp16.{key}")
            if value is not None and value != idle:
                refuse(
                    f"fp16.{key}",
                    f"{show(value)}: scpl.sharding '{sharding}' scales with torch's GradScaler, "
                    "which has no such setting; remove the key, or use scpl.sharding: deepspeed",
                )
