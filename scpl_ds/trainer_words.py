"""What a run says before its first step, and to whom it reports."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from scpl_ds.partition.plan import render_plan
from scpl_ds.run_folder import versions
from scpl_ds.setup import draw_schedule
from scpl_ds.trackers._base import TrackerSet

if TYPE_CHECKING:
    from scpl_ds.trainer import Run

log = logging.getLogger(__name__)


def warn_of_no_evaluation(run: Run) -> None:
    strategy = run.recipe.train.eval_strategy
    if run.eval_loader is None and strategy != "no":
        log.warning(
            "train.eval_strategy is '%s', but '%s' has no evaluation split: nothing is "
            "evaluated. Give one (data.eval_file, data.eval_fraction, data.eval_split), or set "
            "train.eval_strategy: no.",
            strategy, run.recipe.data.name,
        )  # fmt: skip


def plan_text(run: Run) -> str:
    m = run.mesh
    return render_plan(
        run.model.plan, run.model.anatomy, pipeline_ranks=m.pp_size, data_parallel=m.dp_size
    )


def log_banner(run: Run) -> None:
    """Cut, schedule and arithmetic of the batches."""
    sizes = run.recipe.deepspeed.batch(run.mesh.dp_size)
    shown = min(sizes.accumulation, 4)
    drawing = draw_schedule(run.recipe, run.engine.num_stages, max(2, shown))
    together = run.recipe.scpl.method != "scpl" or run.recipe.scpl.clip_scope == "global"
    total, count = run.progress.total_steps, run.data.facts.num_train
    epochs = "a stream" if count is None else f"{run.progress.epoch(total):.2f} epochs"
    log.info("%s\n", plan_text(run))
    log.info("schedule '%s', first micro-batches:\n%s\n", run.recipe.scpl.order, drawing)
    log.info(
        "global batch %d = micro-batch %d x %d micro-batches x %d dp; %s training and %d "
        "evaluation samples; %d steps (%s); clip %g %s; run folder %s",
        sizes.global_batch, sizes.micro_batch, sizes.accumulation, run.mesh.dp_size,
        count or "streamed", run.data.facts.num_eval, total, epochs,
        run.recipe.deepspeed.gradient_clipping,
        "over all stages" if together else "per stage", run.folder.path,
    )  # fmt: skip


def make_trackers(run: Run, *, resuming: bool) -> TrackerSet:
    if not run.is_main:
        return TrackerSet([])
    sections = [choice.model_dump(mode="json") for choice in run.recipe.trackers]
    if run.recipe.train.disable_tqdm:
        for section in sections:
            if section["name"] == "console":
                section["progress"] = False
    trackers = TrackerSet.build(
        sections, run_dir=run.folder.path, resume=resuming, run_name=run.recipe.name
    )
    config = {
        "recipe": run.recipe.to_mapping(),
        "partition": run.model.plan.rows(
            run.model.anatomy,
            pipeline_ranks=run.mesh.pp_size,
            data_parallel=run.mesh.dp_size,
        ),
        "ranks": run.mesh.world_size,
        "device": str(run.device),
        "versions": versions(),
        "fingerprint": run.recipe.fingerprint(),
    }
    trackers.start(
        config,
        total_steps=run.progress.total_steps,
        resumed_step=run.progress.done if resuming else None,
    )
    return trackers
