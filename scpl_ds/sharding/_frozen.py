"""Of a stage that is not trained: its weights, on every data-parallel rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.distributed.collectives import broadcast
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import (
    DTYPES,
    MakeOptimizer,
    StageBackend,
    copy_on_cpu,
    holds_base,
)


class FrozenBackend(StageBackend):
    """Forward without gradient, whatever ``scpl.sharding`` is: there is nothing to shard but the
    weights, which every data-parallel rank holds whole."""

    optimizer = None

    def __init__(
        self,
        module: nn.Module,
        make_optimizer: MakeOptimizer,
        section: DeepSpeedSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        super().__init__(module, make_optimizer, section, mesh, device)
        # In fp32, as torch's backends keep weights; DeepSpeed's cast what enters themselves.
        module.to(device, None if holds_base(module) else torch.float32)
        broadcast(module.state_dict().values(), mesh)
        self._dtype = DTYPES[section.autocast or section.precision]

    @torch.no_grad()
    def forward(self, **inputs: Any) -> dict[str, Any]:
        half = self._dtype != torch.float32
        autocast = functools.partial(torch.autocast, self.device.type, dtype=self._dtype)
        with autocast() if half else contextlib.nullcontext():
            return self.module(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        raise AssertionError("a frozen stage does not go backward")

    def norm(self) -> Tensor:
        return torch.zeros((), device=self.device)

    def step(self, lr: float, *, clip_to: float | None = None) -> dict[str, Tensor]:
        return {}

    def discard(self) -> None:
        """Nothing to forget."""

    def parameters_by_name(
        self, names: Collection[str], *, keep: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        tensors = self.module.state_dict()
        return {n: copy_on_cpu(tensors[n]) for n in names if keep is None or n in keep}

    def optimizer_state(self, *, keep: Collection[str] | None = None) -> OptimizerState:
        return OptimizerState(0, {})

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Nothing to put back."""
