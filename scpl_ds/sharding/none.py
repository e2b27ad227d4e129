"""``sharding: none``: plain torch. Every data-parallel rank holds the whole stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scpl_ds.distributed.collectives import average_gradients
from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import (
    StageBackend,
    load_plain_optimizer_state,
    plain_optimizer_state,
    set_lr,
)


class NoneBackend(StageBackend):
    """No library around the module; gradients are averaged once a step, in one message.

    The easiest backend to debug, and the one the others are compared with.
    """

    def forward(self, **inputs: Any) -> dict[str, Any]:
        return self.module(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.section.gradient_accumulation_steps).backward()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> Tensor | None:
        average_gradients([p for p in self.module.parameters() if p.requires_grad], self.mesh)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        limit = self.section.gradient_clipping
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else float("inf"))
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def parameters_by_name(self) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in self.module.state_dict().items()
        }

    def optimizer_state(self) -> OptimizerState:
        return plain_optimizer_state(self.module, self.optimizer)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        load_plain_optimizer_state(self.module, self.optimizer, state)
