"""Where a Hugging Face model is cut, its local heads counted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from scpl_ds.partition.anatomy import Anatomy
from scpl_ds.partition.matrices import shapes_of
from scpl_ds.partition.plan import LayerTimes, PartitionPlan, make_plan
from scpl_ds.recipe import ScplSection


def plan_stages(
    anatomy: Anatomy,
    scpl: ScplSection,
    config: Any,
    *,
    method: str | Sequence[Sequence[int]] | None = None,
    times: LayerTimes | None = None,
) -> PartitionPlan:
    """Cut a Hugging Face model, each local head counted on the stage that has one.

    ``method`` goes before ``scpl.partition``; ``times`` are what ``time`` cuts by.
    """
    on_last = scpl.has_objective(scpl.stages - 1)
    head_flops = 0
    if scpl.has_objective(max(0, scpl.stages - 2)) or on_last:
        with torch.random.fork_rng(devices=[]):
            head = scpl.objective.build(
                hidden_size=anatomy.hidden_size,
                num_labels=getattr(config, "num_labels", None),
                matrices=functools.partial(shapes_of, config),
            )
        head_flops = head.flops(1, anatomy.sequence_length)
    method = method or scpl.partition
    return make_plan(anatomy, scpl.stages, method, head_flops, on_last, times)
