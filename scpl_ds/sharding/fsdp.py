"""``sharding: fsdp``: torch's FSDP2. Every rank of a stage holds a share of its parameters,
gradients and optimizer state."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from scpl_ds.distributed.collectives import broadcast
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import RecipeError
from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import DTYPES
from scpl_ds.sharding._torch import TorchBackend


class FsdpBackend(TorchBackend):
    """Each layer of the stage is one FSDP unit; embeddings, heads and objective are another.

    Gradients are scattered on every micro-batch, so that no rank ever holds more than its share.
    ``zero_optimization.stage`` 3 frees whole parameters after the forward, 2 after the backward.

    ``bf16`` and ``fp16`` compute everything in half precision (weights, gradients and optimizer
    state stay fp32, as does the averaging); ``torch_autocast`` computes products only.

    A parameter that took no part in a step has a gradient of zeros here, as in DeepSpeed's ZeRO,
    also where no rank used it: weight decay and momentum go on.
    """

    @staticmethod
    def weights_dtype(section: DeepSpeedSection) -> None:
        """As in the file: made fp32 a layer at a time."""

    def wrap(self, module: nn.Module) -> nn.Module:
        section = self.section
        blocks = [block for block in _blocks(module) if next(block.parameters(), None) is not None]
        half = None if section.precision == "fp32" else DTYPES[section.precision]
        offload = OffloadPolicy()
        if section.offload("param"):
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        devices = DeviceMesh.from_group(self.mesh.dp_group, self.device.type)
        for part in (*blocks, module):
            self._make_private(part)
            policy = MixedPrecisionPolicy(
                param_dtype=half,
                reduce_dtype=torch.float32 if half else None,
                # The stage's own inputs hold labels, which must stay as they are.
                cast_forward_inputs=part is not module or not blocks,
            )
            try:
                unit = fully_shard(
                    part,
                    mesh=devices,
                    reshard_after_forward=section.zero_stage == 3,
                    mp_policy=policy,
                    offload_policy=offload,
                )
            except (ValueError, NotImplementedError, AssertionError) as error:
                raise RecipeError(
                    f"FSDP2 cannot shard {type(part).__name__}: {error} Change the model, or use "
                    "scpl.sharding: deepspeed, ddp or none."
                ) from error
            unit.set_force_sum_reduction_for_comms(True)  # gloo cannot average
        assert isinstance(module, FSDPModule)
        module.set_reduce_scatter_unused_params(True)  # or ranks that used others wait for ever
        self._half, self._under_way = half, False
        return module

    def _make_private(self, part: nn.Module) -> None:
        """Take a layer out of its file, as fp32, and make it that of the stage's first rank; its
        shards are cut next, so that one layer at a time is whole."""
        own = [p for p in part.parameters() if not isinstance(p, DTensor)]
        for parameter in own:
            parameter.data = parameter.data.to(self.device, torch.float32, copy=True)
        for buffer in part.buffers():
            buffer.data = buffer.data.to(self.device)
        broadcast([*own, *part.buffers()], self.mesh)

    def average(self) -> None:
        """Done, micro-batch by micro-batch."""

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return super().autocast() if self.section.autocast else contextlib.nullcontext()

    def forward(self, **inputs: Any) -> dict[str, Any]:
        hidden = inputs.get("hidden_states")
        if hidden is not None and self._half is not None:
            inputs["hidden_states"] = hidden.to(self._half)
        self._under_way = True
        return super().forward(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=last)
        self._under_way = False

    def discard(self) -> None:
        self._reshard()
        super().discard()

    def _reshard(self) -> None:
        """Back to shards after a forward that no backward followed (an error, or evaluation)."""
        if self._under_way:
            assert isinstance(self.module, FSDPModule)
            if hasattr(self.module, "reset_iter_state"):
                self.module.reset_iter_state()
            else:  # before torch 2.13
                for unit in self.module.modules():
                    if isinstance(unit, FSDPModule):
                        unit.reshard()
            self._under_way = False

    def total_norm(self) -> Tensor:
        shares = [_local(gradient) for gradient in self.gradients()]
        square = torch.nn.utils.get_total_norm(shares).double().square().to(self.device)
        dist.all_reduce(square, group=self.mesh.dp_group)
        return square.sqrt().float()

    # -- state, whole ----------------------------------------------------------------------

    def parameters_by_name(
        self, names: Collection[str], *, keep: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        self._reshard()
        return super().parameters_by_name(names, keep=keep)

    def optimizer_state(self, *, keep: Collection[str] | None = None) -> OptimizerState:
        self._reshard()
        return super().optimizer_state(keep=keep)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        self._reshard()
        super().load_optimizer_state(state)

    def whole(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DTensor):
            on_device: Any = tensor.detach().to(self.device)  # offloaded ones are on the CPU
            return on_device.full_tensor()
        return tensor

    def beside(self, parameter: Tensor, whole: Tensor) -> Tensor:
        moment = torch.zeros_like(parameter)
        self.put(moment, whole)
        return moment

    def put(self, target: Tensor, whole: Tensor) -> None:
        if isinstance(target, DTensor):
            # FSDP2 cuts the first dimension as torch.chunk does: the last shares may be smaller.
            share, rows = _local(target), whole.shape[0]
            first = min(rows, -(-rows // self.mesh.dp_size) * self.mesh.dp_rank)
            target, whole = share, whole.narrow(0, first, share.shape[0])
        super().put(target, whole)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of a stage; a module that has no such list is one unit."""
    return getattr(getattr(module, "body", None), "blocks", [])


def _local(tensor: Tensor) -> Tensor:
    with torch.no_grad():  # or it is a copy's view that autograd would follow
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor
