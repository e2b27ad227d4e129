"""``sharding: ddp``: torch's DistributedDataParallel. Every rank holds the whole stage, and
gradients are averaged while the backward runs."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from scpl_ds.errors import RecipeError
from scpl_ds.sharding._base import trainable
from scpl_ds.sharding._torch import TorchBackend

# Renamed in torch 2.13. No other backend makes the ranks' buffers equal in every forward either.
_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


class DdpBackend(TorchBackend):
    """Faster than ``none`` where a stage has several ranks: messages go while gradients are still
    being computed. Every trainable parameter must get a gradient in the step's last micro-batch.
    """

    _done = 0
    """Micro-batches of this step that have had their backward."""
    _averaged = False

    def wrap(self, module: nn.Module) -> nn.Module:
        module.to(self.device)
        if self.mesh.dp_size == 1 or not trainable(module):
            return module
        parallel = DistributedDataParallel(
            module,
            process_group=self.mesh.dp_group,
            **_NO_BUFFER_SYNC,
            gradient_as_bucket_view=True,
        )
        parallel.register_comm_hook(self.mesh.dp_group, self._average_bucket)
        return parallel

    def _average_bucket(self, group, bucket):  # DDP refuses annotations that are strings
        # Buckets go in order, each when all its gradients are there: the last one means all.
        self._averaged |= bucket.is_last()
        return allreduce_hook(group, bucket)

    def forward(self, **inputs: Any) -> dict[str, Any]:
        if isinstance(self.wrapped, DistributedDataParallel):
            last = self._done == self.section.gradient_accumulation_steps - 1
            self.wrapped.require_backward_grad_sync = last
        return super().forward(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=last)
        self._done += 1

    def average(self) -> None:
        """Done by the last backward, if it reached every parameter.

        Raises:
            RecipeError: It did not.
        """
        if self.wrapped is not self.module and not self._averaged:
            raise _unused(self.module)

    def step(self, lr: float, *, clip_to: float | None = None) -> dict[str, Tensor]:
        metrics = super().step(lr, clip_to=clip_to)
        self._done, self._averaged = 0, False
        return metrics

    def close(self) -> None:
        self.wrapped = None  # it and its hook, which is ours, hold each other

    def discard(self) -> None:
        super().discard()
        self._done, self._averaged = 0, False


def _unused(module: nn.Module) -> RecipeError:
    names = [name for name, _ in trainable(module)]
    without = [name for name, p in trainable(module) if p.grad is None]
    which = f"{len(without)} of {len(names)}" if without else "some"
    listed = f" ({', '.join(without[:3])}{', ...' if len(without) > 3 else ''})" if without else ""
    return RecipeError(
        f"scpl.sharding: ddp: the last micro-batch of a step gave {which} trainable parameters no "
        f"gradient{listed}, and DistributedDataParallel waits for all of them. Freeze what is "
        "never used; or use scpl.sharding: none or fsdp, where a missing gradient counts as zeros."
    )
