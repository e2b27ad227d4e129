"""The ``deepspeed`` section of a recipe: DeepSpeed's own keys, checked, filled and read by name.

The section is the vocabulary for batch sizes, optimizer, LR schedule, clipping, precision and ZeRO
stage whatever the sharding backend is. Importing this module needs neither torch nor DeepSpeed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

from scpl_ds.ds_checks import check_keys, check_values, drop, hint, lookup, put
from scpl_ds.ds_keys import AUTO_DROPPED, FILLS, OPTIMIZER_PARAMS, REMOVED_PATHS
from scpl_ds.ds_limits import unsupported
from scpl_ds.errors import RecipeError
from scpl_ds.problems import recipe_error

__all__ = ["BatchSizes", "DeepSpeedSection", "OptimizerSpec", "SchedulerSpec", "unsupported"]

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]


class BatchSizes(NamedTuple):
    """``global_batch = micro_batch x accumulation x data-parallel ranks``, in samples."""

    micro_batch: int
    """Samples of one forward on one rank: the rows a contrastive objective compares."""
    accumulation: int
    """Micro-batches per optimizer step."""
    global_batch: int


class OptimizerSpec(NamedTuple):
    type: str
    """Lower case: ``adamw adam sgd adagrad``."""
    params: dict[str, Any]
    """Concrete values under DeepSpeed's names; ``lr`` is always there."""


class LossScaling(NamedTuple):
    initial_scale: float
    window: int
    """Steps without an overflow after which the scale is doubled."""


class SchedulerSpec(NamedTuple):
    type: str
    """``WarmupLR WarmupDecayLR WarmupCosineLR``."""
    params: dict[str, Any]
    """As written; a missing or ``"auto"`` value is known only with the run's length (``optim``)."""


@dataclasses.dataclass(frozen=True)
class DeepSpeedSection:
    """A checked ``deepspeed`` section, with what ``train`` says about the same things.

    Make one with :meth:`from_mapping`; the constructor does not check.
    """

    raw: dict[str, Any]
    """As the user wrote it (numbers mended), for writing the recipe back."""
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Values of the ``train`` keys in :data:`FILLS`; only those that were set."""

    @classmethod
    def from_mapping(
        cls,
        mapping: Mapping[str, Any],
        *,
        train: Mapping[str, Any] | None = None,
        sharding: str = "deepspeed",
        where: str = "the deepspeed config",
    ) -> DeepSpeedSection:
        """Check ``mapping`` and wrap it.

        Args:
            mapping: DeepSpeed's config file as a mapping.
            train: Hugging Face names and values that fill absent and ``"auto"`` keys.
            sharding: The backend that will run it, for what that one cannot do.
            where: Name of the file, for the message.

        Raises:
            RecipeError: Lists every unknown key, wrong value, conflict and unsupported feature.
        """
        raw = mend_numbers(mapping)
        problems = check_keys(raw)
        section = cls(raw, {k: v for k, v in (train or {}).items() if v is not None})
        if not problems:
            problems = check_values(section) + unsupported(section, sharding)
        if problems:
            raise recipe_error(problems, where)
        section.warn_of_defaults()
        return section

    @cached_property
    def filled(self) -> dict[str, Any]:
        """Every ``"auto"`` replaced and ``train``'s values put in; batch sizes not derived yet."""
        config = _without_none(self.raw)
        for path in AUTO_DROPPED:
            if lookup(config, path) == "auto":
                drop(config, path)
        for path in (*REMOVED_PATHS, "optimizer.params.max_grad_norm"):
            drop(config, path)  # checked: they ask for nothing, or for the same as another key
        optimizer = config.setdefault("optimizer", {})
        optimizer.setdefault("type", "AdamW")
        known = OPTIMIZER_PARAMS.get(str(optimizer["type"]).lower(), {})
        optimizer.setdefault("params", {})
        for path, fill in FILLS.items():
            head, _, name = path.rpartition(".")
            if head and name not in known:
                continue
            written = lookup(config, path)
            hinted = hint(path, self.train)
            if written in (None, "auto"):
                derived = path == "train_micro_batch_size_per_gpu" or (
                    path == "gradient_accumulation_steps" and "train_batch_size" in config
                )
                if hinted is not None:
                    put(config, path, hinted)
                elif written == "auto" or not derived:
                    put(config, path, copy.copy(fill.default))
                else:
                    drop(config, path)
        return config

    def warn_of_defaults(self) -> None:
        """Say on rank 0 that nobody wrote down the micro-batch, which decides what is trained."""
        path = "train_micro_batch_size_per_gpu"
        silent = lookup(self.raw, path) == "auto" and hint(path, self.train) is None
        if silent and os.environ.get("RANK", "0") == "0":
            log.warning(
                "deepspeed.%s is 'auto' and train.per_device_train_batch_size is not set: it is "
                "Hugging Face's %d. A contrastive objective compares these rows, so write it down.",
                path, FILLS[path].default,
            )  # fmt: skip

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward on one rank; changes what a contrastive objective computes."""
        return int(self.filled["train_micro_batch_size_per_gpu"])

    @property
    def train_batch_size(self) -> int | None:
        """Samples per optimizer step over all dp ranks, if written down."""
        size = self.filled.get("train_batch_size")
        return None if size is None else int(size)

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step.

        Raises:
            RecipeError: Only ``train_batch_size`` is given, so it depends on the number of
                data-parallel ranks: use :meth:`batch`.
        """
        steps = self.filled.get("gradient_accumulation_steps")
        if steps is None and self.train_batch_size is not None:
            raise RecipeError(
                "deepspeed.gradient_accumulation_steps: not written, and train_batch_size "
                f"{self.train_batch_size} gives it only with the number of data-parallel ranks."
            )
        return int(steps or 1)

    def batch(self, dp_size: int) -> BatchSizes:
        """The batch arithmetic for ``dp_size`` data-parallel ranks per stage.

        Raises:
            RecipeError: ``train_batch_size`` is not micro-batch x accumulation x ``dp_size``.
        """
        micro, total = self.micro_batch_size, self.train_batch_size
        steps = self.filled.get("gradient_accumulation_steps")
        if total is None:
            steps = int(steps or 1)
            return BatchSizes(micro, steps, micro * steps * dp_size)
        if steps is None:
            steps = max(1, total // (micro * dp_size))
        if micro * int(steps) * dp_size != total:
            raise RecipeError(
                f"deepspeed.train_batch_size: {total} is not train_micro_batch_size_per_gpu "
                f"{micro} x gradient_accumulation_steps {steps} x {dp_size} data-parallel "
                f"rank{'s' if dp_size > 1 else ''} = {micro * int(steps) * dp_size}. "
                "Drop train_batch_size, or change one of the others."
            )
        return BatchSizes(micro, int(steps), total)

    @property
    def optimizer(self) -> OptimizerSpec:
        """Type and concrete parameters; AdamW with Hugging Face's defaults when unset."""
        block = self.filled["optimizer"]
        return OptimizerSpec(str(block["type"]).lower(), dict(block["params"]))

    @property
    def lr(self) -> float:
        """Peak learning rate of the optimizer."""
        return float(self.optimizer.params["lr"])

    @property
    def scheduler(self) -> SchedulerSpec | None:
        """DeepSpeed's LR schedule, or None: then ``train.lr_scheduler_type`` decides."""
        block = self.filled.get("scheduler")
        return SchedulerSpec(block["type"], dict(block.get("params") or {})) if block else None

    @property
    def gradient_clipping(self) -> float:
        """Largest gradient norm of one stage; 0 is off. DeepSpeed's default is 1.0, not off."""
        return float(self.filled["gradient_clipping"])

    @property
    def zero_stage(self) -> int:
        return int(self.filled.get("zero_optimization", {}).get("stage") or 0)

    @property
    def precision(self) -> Precision:
        if lookup(self.filled, "fp16.enabled"):
            return "fp16"
        bf16 = lookup(self.filled, "bf16.enabled") or lookup(self.filled, "bfloat16.enabled")
        return "bf16" if bf16 else "fp32"

    @property
    def autocast(self) -> Literal["bf16", "fp16"] | None:
        """What ``torch_autocast`` computes products in; None where it is off."""
        block = self.filled.get("torch_autocast") or {}
        if not block.get("enabled"):
            return None
        return "fp16" if str(block.get("dtype")) in ("fp16", "float16") else "bf16"

    @property
    def loss_scaling(self) -> LossScaling:
        """``fp16``'s dynamic loss scale, with DeepSpeed's defaults."""
        block = self.filled.get("fp16") or {}
        power = block.get("initial_scale_power")
        return LossScaling(
            2.0 ** int(16 if power is None else power), int(block.get("loss_scale_window") or 1000)
        )

    def offload(self, what: Literal["optimizer", "param"]) -> str | None:
        """``cpu`` or ``nvme`` if ``zero_optimization.offload_<what>`` asks for it."""
        device = lookup(self.filled, f"zero_optimization.offload_{what}.device")
        return None if device in (None, "none") else str(device)

    def with_zero_stage(self, stage: int) -> DeepSpeedSection:
        """The same section with another ZeRO stage."""
        raw = copy.deepcopy(self.raw)
        put(raw, "zero_optimization.stage", stage)
        return DeepSpeedSection(raw, self.train)

    def at(self, dp_size: int) -> DeepSpeedSection:
        """The same section with nothing left to fill in or derive, for ``dp_size`` dp ranks.

        Raises:
            RecipeError: The batch sizes do not fit ``dp_size``.
        """
        return DeepSpeedSection(self.resolve(dp_size))

    def resolve(self, dp_size: int) -> dict[str, Any]:
        """The section with every value concrete, clipping and batch sizes written out.

        Raises:
            RecipeError: The batch sizes do not fit ``dp_size``.
        """
        sizes = self.batch(dp_size)
        config = copy.deepcopy(self.filled)
        config["train_micro_batch_size_per_gpu"] = sizes.micro_batch
        config["gradient_accumulation_steps"] = sizes.accumulation
        config["train_batch_size"] = sizes.global_batch
        return config

    def engine_config(self, dp_size: int, *, parameters: int) -> dict[str, Any]:
        """:meth:`resolve` for ``deepspeed.initialize(optimizer=...)`` with an optimizer of ours.

        Without ``optimizer`` and ``scheduler``: a scheduler inside DeepSpeed would skip a step
        whenever its engine skips one, and the stages' learning rates would drift apart. What is
        not written gets a value that suits a stage: gradients accumulate in fp32, buckets are no
        larger than the stage (DeepSpeed allocates 5e8 elements), and ``F.linear`` is left alone in
        the whole process.

        Args:
            dp_size: Data-parallel ranks.
            parameters: How many numbers the stage's parameters hold.
        """
        config = self.resolve(dp_size)
        config.pop("optimizer", None)
        config.pop("scheduler", None)
        # Torch's SGD and Adagrad shard like AdamW does; DeepSpeed only asks to be told.
        config["zero_allow_untested_optimizer"] = True
        config["zero_force_ds_cpu_optimizer"] = False
        if self.zero_stage == 0:
            config["gradient_clipping"] = 0.0  # clipped by the backend, which needs the norm
            return config
        zero = config["zero_optimization"]
        zero.setdefault("reduce_bucket_size", min(500_000_000, parameters))
        if self.zero_stage == 3:
            zero.setdefault("memory_efficient_linear", False)
            zero.setdefault("stage3_prefetch_bucket_size", min(50_000_000, parameters))
        if self.precision != "fp32" and lookup(config, "data_types.grad_accum_dtype") is None:
            put(config, "data_types.grad_accum_dtype", "fp32")
        return config


def _without_none(value: Any) -> Any:
    """A deep copy without the keys whose value is null: DeepSpeed's default, as if not written."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return copy.deepcopy(value)


def mend_numbers(value: Any) -> Any:
    """A deep copy in which ``"1e-4"`` is a number: PyYAML reads it as text, unlike ``1.0e-4``."""
    if isinstance(value, Mapping):
        return {str(k): mend_numbers(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mend_numbers(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value
