"""What DeepSpeed could do and this package refuses, by name. The one place to lift a limit."""

from __future__ import annotations

from collections.abc import Mapping
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
    ("zero_force_ds_cpu_optimizer", (False,), "it is for offloading, which is planned"),
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
)
"""What DeepSpeed's own engine does: path, the key below it that switches it on, its default."""


def unsupported(section: DeepSpeedSection, sharding: str) -> list[Problem]:
    """Everything in a section that is not possible here, or would do nothing.

    Args:
        section: A section whose keys were found good.
        sharding: Name of the backend (``scpl.sharding``).
    """
    config, problems = section.filled, list[Problem]()

    def refuse(path: str, reason: str) -> None:
        problems.append(Problem(dotted("deepspeed", path), reason))

    zero = config.get("zero_optimization") or {}
    stage = section.zero_stage
    if stage in (2, 3):
        refuse("zero_optimization.stage", f"ZeRO stage {stage} is planned; use stage 0 or 1")
    if stage == 1 and sharding == "none":
        refuse(
            "zero_optimization.stage",
            "scpl.sharding 'none' keeps the whole optimizer state on every rank; use stage 0, or "
            "scpl.sharding: deepspeed",
        )
    if stage and section.optimizer.type == "adagrad":
        refuse(
            "optimizer.type",
            "Adagrad does not work with ZeRO: DeepSpeed rebuilds it with one parameter group, "
            "which loses the weight decay of each. Use zero_optimization.stage: 0, or another "
            "optimizer",
        )
    for key, value in zero.items():
        offload = isinstance(value, Mapping) and key.startswith("offload_")
        if (offload and value.get("device") not in (None, "none")) or (
            key in ("cpu_offload", "cpu_offload_param", "zenflow") and value
        ):
            refuse(f"zero_optimization.{key}", "offloading is planned; remove this key")
        elif (key == "zero_hpz_partition_size" and value not in (None, 1)) or (
            key.startswith("zero_quantized_") and value
        ):
            refuse(f"zero_optimization.{key}", "ZeRO++ is planned; remove this key")
    for key in ("bf16", "bfloat16", "fp16", "torch_autocast"):
        if lookup(config, f"{key}.enabled"):
            refuse(key, "mixed precision is planned; train in fp32 (enabled: false)")
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
        ("data_types.grad_accum_dtype", (None, "fp32")),
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
        if sharding == "none" and value is not None and value != idle:
            refuse(
                path,
                f"{show(value)} has no effect with scpl.sharding: none, which runs no DeepSpeed "
                "engine; remove the key, or use scpl.sharding: deepspeed",
            )
    activation = config.get("activation_checkpointing") or {}
    if any(activation.values()):
        refuse("activation_checkpointing", "is planned; remove this section")
    return problems
