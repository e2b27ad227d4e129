"""What goes with a checkpoint of a run: what it keeps beside the weights, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds.data.prepared import saved_position
from scpl_ds.partition.config import generation_config
from scpl_ds.partition.lora import save_config
from scpl_ds.run_folder import versions
from scpl_ds.trackers._base import Artifact
from scpl_ds.trainer_words import partition_of, write_start

if TYPE_CHECKING:
    from scpl_ds.trainer import Run


def write_model_files(run: Run, trained: list[str]) -> None:
    """Config, tokenizer, plan and ``about.json`` into the run folder; the first two go into every
    checkpoint.

    Args:
        run: The run.
        trained: Names of what it trains, where the rest is frozen.
    """
    model, asked, folder = run.model, run.recipe.model, run.folder
    folder.model_files.mkdir(exist_ok=True)
    model.config.save_pretrained(folder.model_files)
    if asked.task == "causal-lm":
        own = generation_config(model.path, revision=asked.revision)
        if own is not None:
            own.to_json_file(folder.model_files / "generation_config.json")
    run.data.tokenizer.save_pretrained(folder.model_files)
    if model.adapters is not None:
        save_config(
            model.adapters, folder.model_files, model.anatomy, trained,
            base=model.path, revision=asked.revision,
        )  # fmt: skip
    write_start(run)


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
