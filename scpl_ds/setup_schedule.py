"""A recipe's schedule before the first step: drawn, and its bubble predicted."""

from __future__ import annotations

import logging

from scpl_ds import registry
from scpl_ds.partition.plan import stages_of_rank
from scpl_ds.recipe import Recipe
from scpl_ds.schedules import bubble_fraction, render, simulate
from scpl_ds.setup import Model

log = logging.getLogger(__name__)
_SIMULATED = 2000
"""Pieces of work that a predicted bubble may take: some hundredths of a second."""


def draw_schedule(recipe: Recipe, num_stages: int, num_micro_batches: int) -> str:
    """The timeline of one step under the recipe's schedule, one rank a stage."""
    scpl = recipe.scpl
    backprop, name = scpl.method != "scpl", scpl.order
    schedule = registry.resolve("schedule", name, where="scpl.schedule")
    num_micro_batches = 1 if name == "naive" else num_micro_batches
    try:
        slots = simulate(schedule, num_stages, num_micro_batches, gradients_travel_back=backprop)
        learn = [s for s in slots if s.kind == "F" or s.stage >= scpl.freeze_stages]
        return render(learn)
    except Exception as error:  # anybody's code, perhaps made for several stages a rank
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"(not drawn with one rank a stage: {reason})"


def predict_bubble(
    recipe: Recipe, model: Model, *, pipeline_ranks: int, micro_batches: int, total_steps: int
) -> tuple[float, int] | None:
    """Share of the ranks' time that the schedule leaves idle, and the steps it was simulated over.

    Stages take as long as their times, where they were measured, else as their forward FLOPs, and
    twice that in backward; messages and optimizer steps take nothing. None: the schedule is not one
    that can be simulated.
    """
    scpl, plan = recipe.scpl, model.plan
    stages, backprop = plan.num_stages, scpl.method != "scpl"
    # Where all stages meet in every step, the next one fills the pipeline again.
    flushes = backprop or scpl.sync == "step" or scpl.clip_scope == "global"
    micro_batches = 1 if scpl.order == "naive" else micro_batches
    most = max(1, _SIMULATED // (3 * stages * micro_batches))
    steps = 1 if flushes else min(total_steps, 10, most)
    times = plan.times
    work = plan.stage_flops(model.anatomy) if times is None else (plan.stage_seconds() or [])
    frozen = range(0 if backprop else scpl.freeze_stages)
    try:
        slots = simulate(
            registry.resolve("schedule", scpl.order, where="scpl.schedule"),
            stages,
            micro_batches,
            forward=[each / 3 for each in work],
            backward=[0.0 if k in frozen else each * 2 / 3 for k, each in enumerate(work)],
            gradients_travel_back=backprop,
            num_steps=steps,
            placement=[list(each) for each in stages_of_rank(stages, pipeline_ranks)],
        )
        return bubble_fraction(slots), steps
    except Exception as error:  # anybody's code, perhaps made for one stage a rank
        log.debug("the bubble is not predicted: %s: %s", type(error).__name__, error)
        return None
