"""What goes with a checkpoint of a run: what it keeps beside the weights, and who hears of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds import checkpoint
from scpl_ds.data.prepared import saved_position
from scpl_ds.run_folder import versions
from scpl_ds.trackers._base import Artifact
from scpl_ds.trainer_words import partition_of

if TYPE_CHECKING:
    from scpl_ds.trainer import Run

log = logging.getLogger(__name__)


def is_due(run: Run, step: int, *, last: bool) -> bool:
    """Whether ``step`` is saved. A save that nothing but the export asks for is ``run.passing``."""
    train, asked, end = run.recipe.train, run.hooks.asked, last or run.hooks.asked.stop
    kept = run.progress.due(train.save_strategy, train.save_steps, step) or asked.save
    kept = kept or (end and train.save_strategy != "no")
    if end and train.export and not kept:
        run.passing = run.folder.path / f"checkpoint-{step}"
    return kept or run.passing is not None


def forget_passing(run: Run) -> None:
    """``train.save_strategy: no``: once there is an export, what it was made of goes. On rank 0."""
    if run.passing is not None:
        checkpoint.remove(run.passing)
        log.info("removed %s, as train.save_strategy is no", run.passing.name)


def state_of(run: Run) -> dict[str, Any]:
    """The ``client_state`` of a checkpoint; every rank calls it."""
    return {
        "data": saved_position(run.train_loader, run.mesh),
        "fingerprint": run.recipe.fingerprint(),
        "recipe": run.recipe.to_mapping(),
        "versions": versions(),
        "partition": partition_of(run),
        "data_parallel": run.mesh.dp_size,
        "tracker_runs": run.trackers.run_ids(),
        "best": run.best.state(),
        **run.hooks.kept(),
    }


def after_save(run: Run, step: int) -> Callable[[Path], None]:
    """The checkpoint after ``step`` is going to be written. What it returns is called once it is in
    place, by the thread that has written it, and hands it to the trackers before any is pruned."""
    folder, train, trackers = run.folder.path, run.recipe.train, run.trackers
    spare = run.health.losses.spared(folder / f"checkpoint-{step}")
    prune = run.best.saving(step, folder, train.save_total_limit, spare=spare)
    about = {
        "scores": run.last_eval if run.evaluated == step else {},
        "plan": partition_of(run),
    }
    best = run.best.checkpoint == folder / f"checkpoint-{step}"

    def saved(saved_as: Path) -> None:
        if run.passing is None:
            trackers.artifact(Artifact(saved_as, "checkpoint", step, about, best))
        prune(saved_as)

    return saved
