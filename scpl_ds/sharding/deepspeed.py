"""``sharding: deepspeed``: one DeepSpeed engine per stage, the stage being DeepSpeed's whole world.

DeepSpeed takes the world group for granted in many places. Instead of teaching each of them about
stages, ``deepspeed.comm`` is given a communicator whose world *is* the data-parallel group of this
rank's stages. ``torch.distributed`` stays global, for the boundaries and for the user's scripts.
See docs/decisions/0001-a-stage-is-deepspeeds-world.md; tests/distributed/test_deepspeed_world.py
fails when a DeepSpeed release changes under it.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.world import environment
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import ScplError
from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import (
    StageBackend,
    check_moments,
    load_plain_optimizer_state,
    plain_optimizer_state,
    set_lr,
)

# Which argument of each collective is a rank: DeepSpeed counts inside the stage, torch globally.
_ROOT = {
    "reduce": "dst", "broadcast": "src", "broadcast_object_list": "src", "gather": "dst",
    "scatter": "src", "send": "dst", "recv": "src", "isend": "dst", "irecv": "src",
}  # fmt: skip
# Positional arguments of DeepSpeed 0.19.8's torch backend (comm/torch.py). Its methods are wrapped
# without functools.wraps, so inspect.signature cannot tell; a test compares with the source.
COLLECTIVES = {
    "all_reduce": "tensor op group async_op",
    "inference_all_reduce": "tensor op group",
    "all_reduce_coalesced": "tensors op group async_op",
    "reduce": "tensor dst op group async_op",
    "reduce_scatter": "output input_list op group async_op",
    "broadcast": "tensor src group async_op",
    "broadcast_object_list": "object_list src group device",
    "all_gather": "tensor_list tensor group async_op",
    "all_gather_into_tensor": "output_tensor input_tensor group async_op",
    "all_gather_base": "output_tensor input_tensor group async_op",
    "all_gather_coalesced": "output_tensors input_tensors group async_op",
    "all_gather_object": "object_list obj group",
    "reduce_scatter_tensor": "output_tensor input_tensor op group async_op",
    "all_to_all_single": "output input output_split_sizes input_split_sizes group async_op",
    "all_to_all": "output_tensor_list input_tensor_list group async_op",
    "gather": "tensor gather_list dst group async_op",
    "scatter": "tensor scatter_list src group async_op",
    "barrier": "group async_op device_ids",
    "monitored_barrier": "group timeout wait_all_ranks",
    "send": "tensor dst group tag",
    "recv": "tensor src group tag",
    "isend": "tensor dst group tag",
    "irecv": "tensor src group tag",
}


def stage_world(mesh: Mesh) -> None:
    """Make ``deepspeed.comm`` see this rank's data-parallel group as the world.

    Installed once per process; all stages of a rank share one group, because they share their
    data-parallel ranks.

    Raises:
        ScplError: This DeepSpeed's communicator lacks a method we redirect.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for one, and says so
    import deepspeed
    import deepspeed.comm.comm as ds_comm

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Compiled with g++ for a minute on first use, and only for inference_all_reduce.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # read all over DeepSpeed, also in one process
    if getattr(ds_comm.cdb, "scpl_world", dist.group.WORLD) is not dist.group.WORLD:
        # The world DeepSpeed was started in is gone (a second run of one process), but it keeps
        # that world's groups in module globals and has no way to let go of them.
        ds_comm.cdb = None
        importlib.reload(deepspeed.utils.groups)
    if ds_comm.cdb is None:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    base: Any = ds_comm.cdb
    if getattr(base, "scpl_stage_group", None) is mesh.dp_group:
        return
    ds_comm.cdb = _stage_communicator(getattr(base, "scpl_whole_world", base), mesh)


def _stage_communicator(base: Any, mesh: Mesh) -> Any:
    kind, stage_group, stage_ranks = type(base), mesh.dp_group, mesh.stage_ranks

    def is_world(group: Any) -> bool:
        return group is None or group is dist.group.WORLD

    class StageCommunicator(kind):
        """DeepSpeed's own torch backend, with the stage in the place of the world."""

        scpl_stage_group = stage_group
        scpl_world = dist.group.WORLD
        scpl_whole_world = base

        def get_rank(self, group: Any = None) -> int:
            return dist.get_rank(stage_group if is_world(group) else group)

        def get_world_size(self, group: Any = None) -> int:
            return dist.get_world_size(stage_group if is_world(group) else group)

        def get_world_group(self) -> Any:
            return stage_group

        def new_group(self, ranks: Sequence[int]) -> Any:
            whole = [stage_ranks[r] for r in ranks]
            # Only the stage's ranks come here, so the others must not be waited for.
            return mesh.new_group(whole, use_local_synchronization=True)

        def get_global_rank(self, group: Any, group_rank: int) -> int:
            whole = dist.get_global_rank(stage_group if is_world(group) else group, group_rank)
            return stage_ranks.index(whole)

        def destroy_process_group(self, group: Any = None) -> None:
            """Ours to destroy, in distributed/world.py."""

    def redirect(name: str) -> None:
        original, positions = getattr(kind, name), COLLECTIVES[name].split()

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = {**dict(zip(positions, args, strict=False)), **kwargs}
            if is_world(arguments.get("group")):
                arguments["group"] = stage_group
            root = _ROOT.get(name)
            if root is not None:
                arguments[root] = stage_ranks[arguments.get(root) or 0]
            return original(self, **arguments)

        setattr(StageCommunicator, name, call)

    for name in COLLECTIVES:
        if not hasattr(kind, name):
            raise ScplError(
                f"deepspeed.comm has no {name} any more, so a stage cannot be its world. Install "
                "the DeepSpeed named in constraints.txt."
            )
        redirect(name)
    communicator = object.__new__(StageCommunicator)
    communicator.__dict__.update(base.__dict__)
    return communicator


class DeepSpeedBackend(StageBackend):
    """A stage inside a DeepSpeed engine: ZeRO-0 and ZeRO-1 in fp32.

    The learning rate is set from our own step count before every step, so that stages cannot
    drift apart, and ``gradient_clipping`` is always written out (DeepSpeed's own default is 1.0).
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        section: DeepSpeedSection,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        super().__init__(module, optimizer, section, mesh, device)
        stage_world(mesh)
        import deepspeed

        # DeepSpeed takes LOCAL_RANK for the number of the GPU: not so where ranks share one, or see
        # only their own. And it compares groups with the launcher's WORLD_SIZE.
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        with environment(WORLD_SIZE=str(mesh.dp_size), RANK=str(mesh.dp_rank)):
            self.engine: Any = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=section.engine_config(mesh.dp_size),
                dist_init_required=False,
            )[0]

    @property
    def _sharded(self) -> bool:
        return self.section.zero_stage > 0

    def forward(self, **inputs: Any) -> dict[str, Any]:
        return self.engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # Said every time: DeepSpeed's own count would stay off for ever after a discarded step.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self, lr: float) -> Tensor | None:
        norm = None
        set_lr(self.engine.optimizer, lr)
        if not self._sharded:  # DeepSpeed keeps no norm in fp32 without ZeRO
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        return norm if norm is None or torch.is_tensor(norm) else torch.tensor(float(norm))

    def discard(self) -> None:
        self.engine.zero_grad()
        if self._sharded:
            zero = self.engine.optimizer
            zero.zero_grad()
            for group in zero.averaged_gradients:  # in place: parameters hold on to this dict
                zero.averaged_gradients[group] = None

    def parameters_by_name(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        result = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            whole = None
            if self._sharded and isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                whole = safe_get_full_fp32_param(tensor)
            result[name] = (tensor if whole is None else whole).detach().to("cpu", copy=True)
        return result

    def close(self) -> None:
        self.engine.destroy()  # its hooks keep it, and all it holds, alive for ever

    def load_parameters(self, tensors: Any) -> None:
        from deepspeed.utils import safe_set_full_fp32_param

        super().load_parameters(tensors)
        if self._sharded:
            for name, parameter in self.module.named_parameters():
                if name in tensors and parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, tensors[name].to(parameter.device).float())

    def optimizer_state(self) -> OptimizerState:
        if not self._sharded:
            return plain_optimizer_state(self.module, self.engine.optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        shards = self.engine.optimizer.optimizer.state
        entries = [entry for entry in shards.values() if entry]
        if not entries:
            return OptimizerState(0, {})
        _link_states(self.engine.optimizer)
        step = max(int(entry.get("step", 0)) for entry in entries)
        keys = [k for k, v in entries[0].items() if torch.is_tensor(v) and v.dim() > 0]
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in keys}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                for key in keys:
                    whole = safe_get_full_optimizer_state(parameter, key)
                    assert whole is not None, f"DeepSpeed has no {key} for {name}"
                    moments[key][name] = whole.detach().to("cpu", copy=True)
        return OptimizerState(step, moments)

    def load_optimizer_state(self, state: OptimizerState) -> None:
        if not self._sharded:
            load_plain_optimizer_state(self.module, self.engine.optimizer, state)
            return
        check_moments(self.optimizer, state)
        if not state.moments:
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.engine.optimizer
        for group in zero.optimizer.param_groups:
            for flat in group["params"]:
                entry = {key: torch.zeros_like(flat) for key in state.moments}
                zero.optimizer.state[flat] = {"step": torch.tensor(float(state.step)), **entry}
        _link_states(zero)
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            for key, by_name in state.moments.items():
                if name in by_name:
                    whole = by_name[name].to(parameter.device).float()
                    safe_set_full_optimizer_state(parameter, whole, key)


def _link_states(zero: Any) -> None:
    """Point every parameter at its piece of the flat optimizer state.

    DeepSpeed does so after the first step of the *first* parameter group, when the others have no
    state yet, and never again; a restored state it does not know of at all.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
