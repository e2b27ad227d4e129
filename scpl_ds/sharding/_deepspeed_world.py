"""Making a stage the whole world that DeepSpeed sees.

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
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.world import environment
from scpl_ds.errors import ScplError

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
    known = torch.cuda.is_available() or "DS_ACCELERATOR" in os.environ
    # Or it looks for one when it is imported, and says that it found none.
    with environment(**({} if known else {"DS_ACCELERATOR": "cpu"})):
        import deepspeed
        import deepspeed.comm.comm as ds_comm

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls torch 2.13's collectives by their old names, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        # Compiled with g++ for a minute on first use, and only for inference_all_reduce.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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


def tell_device(device: torch.device) -> None:
    """Say the number of the GPU to ZeRO-3, which looks it up as LOCAL_RANK in its first steps too.

    Only to it: a process without a launcher has no such variable, and one left behind would be a
    launcher's to accelerate, and so to ``TrainingArguments``.
    """
    import deepspeed.runtime.zero.utils as zero_utils

    own: Any = SimpleNamespace(environ={"LOCAL_RANK": str(device.index or 0)})
    zero_utils.os = own


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
