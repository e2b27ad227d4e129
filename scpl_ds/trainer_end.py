"""What comes after the last step: the export, and its score."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from scpl_ds import checkpoint, export
from scpl_ds.data.prepared import Data, whole_eval_loader
from scpl_ds.evaluation import score_model
from scpl_ds.recipe import Recipe

log = logging.getLogger(__name__)


def export_run(recipe: Recipe, run: Path, best: Path | None) -> Path:
    """Export the best checkpoint of a run, or the latest."""
    chosen = best or checkpoint.resolve(run)
    return export.export_checkpoint(chosen, recipe.export_dir, task=recipe.model.task)


def score_export(
    exported: Path, recipe: Recipe, data: Data, device: torch.device
) -> dict[str, float]:
    """Of the export, loaded as anybody would, on all evaluation data in this process."""
    log.info("scoring the exported model on %d samples", data.facts.num_eval)
    model = export.load_exported(exported, recipe.model.task)
    return score_model(model, whole_eval_loader(recipe, data), device).metrics()


def named(score: Mapping[str, float], prefix: str) -> dict[str, float | None]:
    """The number that says how good a model is, for ``result.json``: ``eval_accuracy``, or
    ``eval_perplexity`` of a language model."""
    name = "perplexity" if "val/perplexity" in score else "accuracy"
    return {f"{prefix}_{name}": score.get(f"val/{name}")}
