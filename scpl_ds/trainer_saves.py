"""What goes with a checkpoint of a run: what it keeps beside the weights, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds.data.prepared import saved_position
from scpl_ds.run_folder import versions
from scpl_ds.trackers._base import Artifact
from scpl_ds.trainer_words import partition_of

if TYPE_CHECKING:
    from scpl_ds.trainer import Run


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
        trackers.artifact(Artifact(saved_as, "checkpoint", step, about, best))
        prune(saved_as)

    return saved
