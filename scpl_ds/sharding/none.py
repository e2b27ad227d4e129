"""``sharding: none``: plain torch. Every data-parallel rank holds the whole stage."""

from __future__ import annotations

from torch import nn

from scpl_ds.distributed.collectives import average_gradients, broadcast
from scpl_ds.sharding._base import trainable
from scpl_ds.sharding._torch import TorchBackend


class NoneBackend(TorchBackend):
    """No library around the module; gradients are averaged once a step.

    The easiest backend to debug, and the one the others are compared with.
    """

    def wrap(self, module: nn.Module) -> nn.Module:
        broadcast(module.to(self.device).state_dict().values(), self.mesh)
        return module

    def average(self) -> None:
        average_gradients([p for _, p in trainable(self.module)], self.mesh)
