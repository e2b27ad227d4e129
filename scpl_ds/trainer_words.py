"""What a run says before its first step, and to whom it reports."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from scpl_ds.evaluation_samples import Predictions
from scpl_ds.export_hub import why_not
from scpl_ds.generation import Samples
from scpl_ds.partition.config import generation_config
from scpl_ds.partition.plan import render_plan
from scpl_ds.run_folder import versions
from scpl_ds.setup import draw_schedule
from scpl_ds.trackers._base import TrackerSet
from scpl_ds.trainer_end import destination

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


def samples_of(run: Run) -> Samples | None:
    """What shows the texts of a language model."""
    prompts, most = run.recipe.train.sample_prompts, run.recipe.train.sample_max_new_tokens
    if not prompts:
        return None
    model, revision = run.model, run.recipe.model.revision
    own = generation_config(model.path, revision=revision) if run.is_main else None
    return Samples(run.data.tokenizer, prompts, most, model.config, own)


def predictions_of(run: Run) -> Predictions | None:
    """What shows the answers of a classifier."""
    count = run.recipe.train.sample_predictions
    if not count or run.eval_loader is None:
        return None
    return Predictions(run.data, run.eval_loader, count)


def warn_of_no_upload(run: Run) -> None:
    """Said now, not after the training."""
    where = destination(run.recipe)
    if where is not None and (reason := why_not(where)) is not None:
        log.warning("train.push_to_hub: %s. The run goes on, and its export stays here.", reason)


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
        "partition": partition_of(run),
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
    trackers.table("partition", partition_of(run), run.progress.done if resuming else 0)
    return trackers


def partition_of(run: Run) -> list[dict[str, Any]]:
    """A row for each stage."""
    m = run.mesh
    return run.model.plan.rows(run.model.anatomy, pipeline_ranks=m.pp_size, data_parallel=m.dp_size)
