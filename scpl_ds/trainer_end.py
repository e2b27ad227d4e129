"""What comes after the last step: the export, and its score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scpl_ds import checkpoint, export
from scpl_ds.checkpoint_disk import writing
from scpl_ds.data.prepared import Data, whole_eval_loader
from scpl_ds.errors import HubError
from scpl_ds.evaluation import score_model
from scpl_ds.export_card import write_card
from scpl_ds.export_hub import Destination, push
from scpl_ds.recipe import Recipe
from scpl_ds.run_folder import RunFolder
from scpl_ds.trackers._base import Artifact, TrackerSet

log = logging.getLogger(__name__)


def export_run(recipe: Recipe, chosen: Path) -> Path:
    """Export a checkpoint to where the recipe says."""
    return export.export_checkpoint(chosen, recipe.export_dir, task=recipe.model.task)


def destination(recipe: Recipe) -> Destination | None:
    """Where on the hub the recipe wants its export."""
    train = recipe.train
    if not train.push_to_hub:
        return None
    return Destination(
        train.hub_model_id or recipe.name, train.hub_private_repo, train.hub_revision
    )


def publish(
    recipe: Recipe, folder: RunFolder, chosen: Path, trackers: TrackerSet, result: dict[str, Any]
) -> None:
    """Write ``result.json``, put the scores into the export's model card, and hand the export to
    the trackers and to the hub. On rank 0.

    An upload that fails is a warning: the run has what it was for. ``result`` then says
    ``hub_url: None``.
    """
    folder.write_result(result)
    exported = recipe.export_dir
    manifest = checkpoint.Reader(chosen).manifest
    left = f"The export is whole but for its model card; {chosen} is too."
    with writing(exported, then=left):
        write_card(exported, manifest, recipe.model.task, result)
    about = {"scores": scores_of(result), "plan": manifest["client_state"]["partition"]}
    trackers.artifact(Artifact(exported, "model", manifest["step"], about))
    where = destination(recipe)
    if where is None:
        return
    result["hub_url"] = None
    try:
        message = f"scpl_ds: {recipe.name}, step {manifest['step']}"
        result["hub_url"] = push(exported, where, message=message)
        log.info("uploaded to %s", result["hub_url"])
    except HubError as error:
        log.warning("%s", error)
    folder.write_result(result)


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Of a result what says how good the model is."""
    return {k: v for k, v in result.items() if k.startswith(("eval_", "best_m")) and v is not None}


def score_export(
    exported: Path, recipe: Recipe, data: Data, device: torch.device
) -> dict[str, float]:
    """Of the export, loaded as anybody would, on all evaluation data in this process."""
    model = export.load_exported(exported, recipe.model.task)
    # The stages were scored in the precision that they were trained in, so their score may differ.
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    log.info("scoring the exported model on %d samples, in %s", data.facts.num_eval, dtype)
    return score_model(model, whole_eval_loader(recipe, data), device).metrics()


def named(score: Mapping[str, float], prefix: str) -> dict[str, float | None]:
    """The number that says how good a model is, for ``result.json``: ``eval_accuracy``, or
    ``eval_perplexity`` of a language model."""
    name = "perplexity" if "val/perplexity" in score else "accuracy"
    return {f"{prefix}_{name}": score.get(f"val/{name}")}
