"""End-to-end backpropagation over the same Hugging Face model, cut by the same ``StageModule``, on
the same ranks: what local objectives are compared with.

A rival is one entry of ``RIVALS``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from scpl_ds.baselines._base import Job, Part, Rival
from scpl_ds.baselines.data_parallel import Ddp, Single
from scpl_ds.baselines.deepspeed_pipeline import DeepSpeedPipeline
from scpl_ds.baselines.deepspeed_zero import Zero
from scpl_ds.baselines.torch_pipelining import STYLES, TorchPipelining
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import RecipeError
from scpl_ds.registry import did_you_mean

__all__ = ["RIVALS", "Job", "Part", "Rival", "make_rival"]

RIVALS: dict[str, Callable[[str, Job, Mesh], Rival]] = {
    "single": Single,
    **dict.fromkeys(STYLES, TorchPipelining),
    "deepspeed-1f1b": functools.partial(DeepSpeedPipeline, zero_stage=0),
    "deepspeed-1f1b-zero1": functools.partial(DeepSpeedPipeline, zero_stage=1),
    "ddp": Ddp,
    "zero": functools.partial(Zero, zero_stage=1),
    "zero3": functools.partial(Zero, zero_stage=3),
}
"""Name -> what makes it, from its name, a job and a mesh."""


def make_rival(name: str, job: Job, mesh: Mesh) -> Rival:
    """The rival of that name; all ranks make the same ones in the same order (waits).

    Raises:
        RecipeError: There is none, or it cannot run these numbers of ranks and micro-batches.
        PartitionError: It wants more stages than the model has layers.
    """
    if name not in RIVALS:
        raise RecipeError(
            f"no rival is called '{name}'{did_you_mean(name, RIVALS) or '.'} "
            f"Known: {', '.join(RIVALS)}."
        )
    return RIVALS[name](name, job, mesh)
