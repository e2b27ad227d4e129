"""DeepSpeed as it is: over the whole world, with nothing of ours in its communication."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from scpl_ds.baselines._base import Job
from scpl_ds.distributed.world import environment


def config(job: Job, *, micro_batch_size: int, accumulation: int, zero_stage: int) -> Any:
    """DeepSpeed's config: fp32 weights, no clipping, nothing compiled, nothing printed.

    Args:
        job: For the device: only on a GPU can ZeRO's messages run beside the backward.
        micro_batch_size: Samples of one forward of one rank.
        accumulation: Micro-batches of a step.
        zero_stage: 0, 1 or 3.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # 1.0 unless written
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": job.device.type == "cuda",
        },
        "zero_allow_untested_optimizer": True,  # torch's own, fused
        "steps_per_print": 10**9,
    }


class WholeWorld:
    """Every rank of the job as DeepSpeed's world, while it is needed.

    A run of ours in the same process makes a stage DeepSpeed's world, and an engine of DeepSpeed's
    leaves its groups in module globals. So each rival keeps its own, and puts them in place for the
    length of ``building`` and ``training`` only.
    """

    _kept: tuple[Any, dict[str, Any]]

    @contextlib.contextmanager
    def building(self, job: Job) -> Iterator[Any]:
        """Around the making of an engine; gives ``deepspeed``."""
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it looks for one, and says so
        import deepspeed
        import deepspeed.comm.comm as ds_comm

        deepspeed.utils.logger.setLevel(logging.WARNING)
        # DeepSpeed 0.19.8 calls torch 2.13's collectives by their old names, in every step.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        if not torch.cuda.is_available():
            # Compiled with g++ for a minute on first use, and only for inference_all_reduce.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if ds_comm.cdb is None:
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        groups: Any = deepspeed.utils.groups
        before = ds_comm.cdb, _data(groups)
        ds_comm.cdb = getattr(ds_comm.cdb, "scpl_whole_world", ds_comm.cdb)
        importlib.reload(groups)  # as if it had just been imported
        try:
            # It takes LOCAL_RANK for the number of the GPU, and prints its layers and memory.
            with (
                environment(LOCAL_RANK=str(job.device.index or 0)),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                yield deepspeed
            self._kept = ds_comm.cdb, _data(groups)
        finally:
            _put(*before)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around every step."""
        import deepspeed
        import deepspeed.comm.comm as ds_comm

        before = ds_comm.cdb, _data(deepspeed.utils.groups)
        _put(*self._kept)
        try:
            yield
        finally:
            self._kept = ds_comm.cdb, _data(deepspeed.utils.groups)
            _put(*before)


def _data(module: Any) -> dict[str, Any]:
    """The globals of a module that are neither code nor Python's own."""
    return {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("__") or callable(value) or inspect.ismodule(value))
    }


def _put(communicator: Any, group_globals: dict[str, Any]) -> None:
    import deepspeed
    import deepspeed.comm.comm as ds_comm

    ds_comm.cdb = communicator
    for name, value in group_globals.items():
        setattr(deepspeed.utils.groups, name, value)
