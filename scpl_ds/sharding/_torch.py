"""What the backends without DeepSpeed share: torch's autocast, gradient scaler and clipping."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import (
    DTYPES,
    MakeOptimizer,
    StageBackend,
    copy_beside,
    copy_on_cpu,
    load_plain_optimizer_state,
    plain_optimizer_state,
    set_lr,
    trainable,
)


class TorchBackend(StageBackend):
    """A stage trained by torch alone; subclasses say how it is spread over its ranks.

    ``bf16``, ``fp16`` and ``torch_autocast`` mean the same here: fp32 weights, gradients and
    optimizer state, and products computed in half precision (``torch.autocast``, as the ``bf16``
    and ``fp16`` of Hugging Face's Trainer).
    """

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        section: DeepSpeedSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        super().__init__(module, make_optimizer, section, mesh, device)
        self.wrapped = self.wrap(module)
        self.optimizer: torch.optim.Optimizer = make_optimizer(trainable(module))
        compute = section.autocast or section.precision
        self._dtype = DTYPES[compute]
        scaling = section.loss_scaling
        # Also where nothing is scaled: a scaler that is off passes everything through.
        self._scaler = torch.amp.GradScaler(
            device.type,
            enabled=compute == "fp16",
            init_scale=scaling.initial_scale,
            growth_interval=scaling.window,
        )
        self._skipped = 0
        self._norm: Tensor | None = None

    @abc.abstractmethod
    def wrap(self, module: nn.Module) -> nn.Module:
        """Put the module on the device and spread it over the stage's ranks."""

    @abc.abstractmethod
    def average(self) -> None:
        """After the last backward: make the gradients those of all data-parallel ranks."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Where the forward runs."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def forward(self, **inputs: Any) -> dict[str, Any]:
        with self.autocast():
            return self.wrapped(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._scaler.scale(loss / self.section.gradient_accumulation_steps).backward()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def norm(self) -> Tensor:
        self.average()
        self._scaler.unscale_(self.optimizer)
        self._norm = self.total_norm()
        return self._norm

    def step(self, lr: float, *, clip_to: float | None = None) -> dict[str, Tensor]:
        norm = self.norm() if clip_to is None or self._norm is None else self._norm
        self._norm = None
        limit = self.section.gradient_clipping if clip_to is None else clip_to
        if limit > 0:
            parameters = [p for _, p in trainable(self.module)]
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        set_lr(self.optimizer, lr)
        self._scaler.step(self.optimizer)
        metrics = {"grad_norm": norm}
        if self._scaler.is_enabled():
            metrics |= self._update_scale()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _update_scale(self) -> dict[str, Tensor]:
        before = self._scaler.get_scale()
        self._scaler.update()
        after = self._scaler.get_scale()
        self._skipped += after < before
        return {
            "loss_scale": torch.tensor(after),
            "skipped_steps": torch.tensor(float(self._skipped)),
        }

    def gradients(self) -> list[Tensor]:
        """What this rank has of the gradients of trainable parameters."""
        return [p.grad for _, p in trainable(self.module) if p.grad is not None]

    def total_norm(self) -> Tensor:
        """Norm of the averaged, unscaled gradients of the whole stage; 0-dim."""
        return torch.nn.utils.get_total_norm(self.gradients())

    # -- state, whole ----------------------------------------------------------------------

    def whole(self, tensor: Tensor) -> Tensor:
        """A parameter, buffer or moment in one piece (a collective of the stage)."""
        return tensor

    def beside(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """What this rank keeps of a moment, made of the whole."""
        return copy_beside(parameter, whole)

    def parameters_by_name(
        self, names: Collection[str], *, keep: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        tensors, found = self.module.state_dict(), {}
        for name in names:
            whole = self.whole(tensors[name])
            if keep is None or name in keep:
                found[name] = copy_on_cpu(whole)
        return found

    def optimizer_state(self, *, keep: Collection[str] | None = None) -> OptimizerState:
        state = plain_optimizer_state(self.module, self.optimizer, whole=self.whole, keep=keep)
        scale = self._scaler.get_scale() if self._scaler.is_enabled() else None
        return dataclasses.replace(state, loss_scale=scale)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        load_plain_optimizer_state(self.module, self.optimizer, state, beside=self.beside)
        if self._scaler.is_enabled() and state.loss_scale is not None:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": state.loss_scale})
