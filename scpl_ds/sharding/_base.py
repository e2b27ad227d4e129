"""What a sharding backend does for one stage: run it, train it, and give its state back by name."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import CheckpointError
from scpl_ds.optim import OptimizerState, moment_names


class StageBackend(abc.ABC):
    """One stage's module over the data-parallel ranks that share it.

    A new backend is one file with a subclass and one line in ``registry.py``. Nothing in it may
    wait for another stage: every collective runs in ``mesh.dp_group``.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        section: DeepSpeedSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        """
        Args:
            module: The stage; its forward returns a dict with a scalar ``loss``.
            optimizer: Over the module's trainable parameters; the backend may wrap it.
            section: The recipe's ``deepspeed`` section, with nothing left to fill in.
        """
        self.module, self.optimizer = module, optimizer
        self.section, self.mesh, self.device = section, mesh, device

    @abc.abstractmethod
    def forward(self, **inputs: Any) -> dict[str, Any]:
        """The module's forward, through whatever the backend puts around it."""

    @abc.abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients, scaled by 1 / gradient_accumulation_steps.

        ``last``: it is the step's last micro-batch; a backend may begin to average gradients.
        """

    @abc.abstractmethod
    def step(self, lr: float) -> Tensor | None:
        """After the last backward of a step: average the gradients over the data-parallel ranks,
        clip, update, forget them; returns the norm before clipping."""

    @abc.abstractmethod
    def discard(self) -> None:
        """Forget the gradients of a step that will not be finished."""

    @abc.abstractmethod
    def parameters_by_name(self) -> dict[str, Tensor]:
        """Whole fp32 parameters and persistent buffers, on the CPU (a collective of the stage)."""

    @abc.abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """Whole optimizer state on the CPU (a collective of the stage)."""

    @abc.abstractmethod
    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Put back what ``optimizer_state`` gave; parameters without an entry start from zero."""

    def close(self) -> None:  # noqa: B027 - most have nothing else that holds on to it
        """Let go of the module and its memory; nothing is asked of this backend afterwards."""

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set parameters and buffers by name; names that are absent keep their value."""
        with torch.no_grad():
            for name, target in self.module.state_dict(keep_vars=True).items():
                if name in tensors:
                    target.copy_(tensors[name])


def set_lr(optimizer: Any, lr: float) -> None:
    """Give every parameter group its learning rate for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def plain_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The state of an unsharded torch optimizer, by parameter name."""
    step, moments = 0, {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key == "step":
                step = max(step, int(value))
            elif torch.is_tensor(value):
                moments.setdefault(key, {})[name] = value.detach().to("cpu", copy=True)
    return OptimizerState(step, moments)


def check_moments(optimizer: torch.optim.Optimizer, state: OptimizerState) -> None:
    """Refuse the memory of another optimizer; an empty one (no step taken yet) fits all.

    Raises:
        CheckpointError: ``optimizer`` keeps something else than ``state`` holds.
    """
    found, kept = frozenset(state.moments), moment_names(optimizer)
    if not found or kept is None or found == kept:
        return
    raise CheckpointError(
        f"the checkpoint's optimizer state has {_listed(found)}, but {type(optimizer).__name__} "
        f"keeps {_listed(kept)} as set up here: it is of another optimizer. Use the optimizer of "
        "the run that saved it, or load_checkpoint(..., load_optimizer_states=False)."
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = sorted(names) or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def load_plain_optimizer_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: OptimizerState
) -> None:
    """Inverse of ``plain_optimizer_state``."""
    check_moments(optimizer, state)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        if id(parameter) not in trained:
            continue
        if not any(name in by_name for by_name in state.moments.values()):
            continue  # a head that starts afresh: with an old step count it would leap
        entry: dict[str, Any] = {"step": torch.tensor(float(state.step))}
        for key, by_name in state.moments.items():
            whole = by_name.get(name)
            entry[key] = (
                torch.zeros_like(parameter)
                if whole is None
                else whole.to(parameter.device, parameter.dtype, copy=True)
            )
        optimizer.state[parameter] = entry
