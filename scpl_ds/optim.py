"""Optimizer and LR schedule from a recipe: torch's own optimizers, and the LR as a pure function.

The learning rate is computed from the number of the optimizer step, never kept as state: all stages
agree on it without talking, a resumed run needs no scheduler to restore, and a stage that skips a
step (fp16 overflow) does not fall behind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.ds_config import DeepSpeedSection, SchedulerSpec
from scpl_ds.recipe_sections import TrainSection


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """An optimizer's memory, whole (not sharded) and by parameter name, the same for every
    backend."""

    step: int
    """Optimizer steps taken, for Adam's bias correction."""
    moments: dict[str, dict[str, Tensor]]
    """``{"exp_avg": {parameter name: tensor of the parameter's shape}, ...}``; fp32, on the CPU."""
    loss_scale: float | None = None
    """fp16's, as far as it has come; not how many steps it is from its next doubling."""


LrSchedule = Callable[[int], float]
"""Optimizer step, 0-based -> learning rate of that step divided by the optimizer's ``lr``."""

HF_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay")


HEAD = "objective."
"""How the names of a stage's local objective's parameters begin."""
LR_FACTOR = "lr_factor"
"""Key of a parameter group whose learning rate is so many times that of the run."""


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    section: DeepSpeedSection,
    *,
    lr: float = 1.0,
    head_lr: float = 1.0,
) -> torch.optim.Optimizer:
    """Torch's optimizer for the ``deepspeed.optimizer`` section.

    Two parameter groups: with weight decay, and without it for parameters of fewer than two
    dimensions (biases and norms), as transformers' Trainer does by name. Frozen parameters are left
    out; a group nobody is in does not exist. ``Adam`` means AdamW unless ``adam_w_mode: false``, as
    in DeepSpeed. Defaults are Hugging Face's: no weight decay, where torch's AdamW has 0.01, and
    the fused implementation (``foreach`` in the section chooses another).

    Args:
        named_parameters: Of one stage, its objective's head included.
        section: Says type and parameters.
        lr: Learning rate of all, relative to the run's. Groups of another rate than the run's are
            known to ``set_lr`` by ``lr_factor``.
        head_lr: Of the local objective's parameters (``objective.*``), relative to the others'.
            Anything but 1 puts them into groups of their own.

    Raises:
        ValueError: Nothing is trainable.
    """
    kind, params = section.optimizer
    options = _torch_options(kind, params)
    decay = float(options.pop("weight_decay", 0.0))
    trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
    if not trainable:
        raise ValueError("build_optimizer got no parameter that requires a gradient.")
    groups: list[dict[str, Any]] = []
    for of_head in (False, True):
        own = [p for n, p in trainable if (head_lr != 1.0 and n.startswith(HEAD)) == of_head]
        factor = lr * head_lr if of_head else lr
        more = {} if factor == 1.0 else {LR_FACTOR: factor}
        groups.append({"params": [p for p in own if p.ndim >= 2], "weight_decay": decay, **more})
        groups.append({"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, **more})
    return _CLASSES[_class_name(kind, params)]([g for g in groups if g["params"]], **options)


_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
}

_MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.SGD: (),
    torch.optim.Adagrad: ("sum",),
}
_MORE_MOMENTS = {"amsgrad": "max_exp_avg_sq", "momentum": "momentum_buffer"}
"""Option of a parameter group -> what it adds to the memory of each parameter."""


def moment_names(optimizer: torch.optim.Optimizer) -> frozenset[str] | None:
    """What torch's optimizer keeps for each parameter (``OptimizerState.moments``), also before its
    first step; None for an optimizer that ``build_optimizer`` does not make."""
    always = _MOMENTS.get(type(optimizer))
    if always is None:
        return None
    more = (_MORE_MOMENTS[k] for g in optimizer.param_groups for k in _MORE_MOMENTS if g.get(k))
    return frozenset((*always, *more))


_DEEPSPEED_ONLY = ("adam_w_mode", "torch_adam", "bias_correction", "fp32_optimizer_states")


def _class_name(kind: str, params: dict[str, Any]) -> str:
    if kind == "adam" and params.get("adam_w_mode") is not False:
        return "adamw"
    return kind


def _torch_options(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    options = {k: v for k, v in params.items() if k not in _DEEPSPEED_ONLY and v is not None}
    if kind in ("adam", "adamw") and "foreach" not in options:
        options["fused"] = True  # one pass, and no temporaries as large as the parameters
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    return options


def lr_schedule(section: DeepSpeedSection, train: TrainSection, total_steps: int) -> LrSchedule:
    """The run's LR schedule: ``deepspeed.scheduler`` if there is one, else ``train``'s.

    Args:
        section: For the scheduler and the learning rate that its factors are relative to.
        train: For ``lr_scheduler_type`` (``linear`` unless set) and warm-up.
        total_steps: Optimizer steps of the whole run.

    Returns:
        Step -> factor of ``section.lr``.
    """
    warmup = warmup_steps(train, total_steps)
    if section.scheduler is not None:
        return deepspeed_schedule(section.scheduler, section.lr, total_steps, warmup)
    kind = train.lr_scheduler_type or "linear"
    decay = round(total_steps * train.decay_ratio)
    return lambda step: lr_factor(
        step, total_steps, kind=kind, warmup_steps=warmup, decay_steps=decay
    )


def needs_total_steps(spec: SchedulerSpec) -> bool:
    """Whether a schedule ends with the run, and nothing in it says when that is."""
    return spec.type != "WarmupLR" and spec.params.get("total_num_steps") in (None, "auto")


def warmup_steps(train: TrainSection, total_steps: int) -> int:
    """``train.warmup_steps``, or ``train.warmup_ratio`` of all steps, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil(total_steps * (train.warmup_ratio or 0.0))


def lr_factor(
    step: int,
    total_steps: int,
    *,
    kind: str = "linear",
    warmup_steps: int = 0,
    decay_steps: int = 0,
) -> float:
    """Factor of the peak learning rate in Hugging Face's schedules.

    Args:
        step: Optimizer step, 0-based.
        total_steps: Optimizer steps of the whole run.
        kind: ``linear`` and ``cosine`` fall to 0 at ``total_steps``; ``constant`` ignores warm-up.
        warmup_steps: Steps of linear rise from 0.
        decay_steps: Of ``warmup_stable_decay``: the last steps, in which it falls to 0 linearly.

    Raises:
        ValueError: Unknown ``kind``.

    Source:
        transformers 5.23, ``optimization.py``, ``get_scheduler``; equal to it in the tests.
    """
    if kind not in HF_SCHEDULES:
        raise ValueError(f"kind must be one of {', '.join(HF_SCHEDULES)}, got {kind!r}.")
    if kind == "constant":
        return 1.0
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "warmup_stable_decay":
        return min(1.0, max(0.0, (total_steps - step) / max(1, decay_steps)))
    left = max(1, total_steps - warmup_steps)
    if kind == "linear":
        return max(0.0, (total_steps - step) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / left)))


def deepspeed_schedule(
    spec: SchedulerSpec, lr: float, total_steps: int, warmup: int = 0
) -> LrSchedule:
    """DeepSpeed's ``WarmupLR``, ``WarmupDecayLR`` or ``WarmupCosineLR`` as a pure function.

    Missing or ``"auto"``: ``warmup_max_lr`` is the optimizer's ``lr`` and ``total_num_steps`` the
    run's length. ``warmup_num_steps: auto`` is ``warmup``; missing, it is DeepSpeed's 1000.

    Args:
        spec: Type and parameters as written in the recipe.
        lr: The optimizer's learning rate, which the factor is relative to. With 0 it stays 0.
        total_steps: Optimizer steps of the whole run.
        warmup: From the ``train`` section; 0 where it is silent.

    Source:
        DeepSpeed 0.19.8, ``runtime/lr_schedules.py``. DeepSpeed moves its schedule after each step
        and starts at -1, so step n uses what the formula gives for n - 1. Equal to it in the tests.
    """
    params = {k: v for k, v in spec.params.items() if v is not None and v != "auto"}
    total = int(params.get("total_num_steps", total_steps))
    default_ramp = warmup if spec.params.get("warmup_num_steps") == "auto" else 1000
    ramp_steps = max(2, int(params.get("warmup_num_steps", default_ramp)))
    log_ramp = params.get("warmup_type", "log") == "log"

    def ramp(done: int) -> float:
        return math.log(done + 1) / math.log(ramp_steps) if log_ramp else done / ramp_steps

    if spec.type == "WarmupCosineLR":
        low = float(params.get("warmup_min_ratio", 0.0))
        floor = float(params.get("cos_min_ratio", 0.0001))

        def cosine(step: int) -> float:
            done = step - 1
            if done < 0:
                return 0.0
            if done < ramp_steps:
                return low + (1.0 - low) * ramp(done)
            progress = min(1.0, (done - ramp_steps + 1) / max(1, total - ramp_steps))
            return max(0.0, floor + (1.0 - floor) * (1.0 + math.cos(math.pi * progress)) / 2)

        return cosine

    low_lr = float(params.get("warmup_min_lr", 0.0))
    high_lr = float(params.get("warmup_max_lr", lr))

    def warmup_then(step: int) -> float:
        done = step - 1
        if done < 0:
            gamma = 0.0
        elif done < ramp_steps:
            gamma = ramp(done)
        elif spec.type == "WarmupDecayLR":
            gamma = max(0.0, (total - done) / max(1.0, total - ramp_steps))
        else:
            gamma = 1.0
        return (low_lr + (high_lr - low_lr) * gamma) / lr if lr else 0.0

    return warmup_then
