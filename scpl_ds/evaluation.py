"""Scoring: over the stages of a run, and of an exported model as anybody would load it."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from scpl_ds.batch import Evaluated
from scpl_ds.data.language import IGNORED, targets_of
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.prepared import Data, make_eval_loader, whole_eval_loader
from scpl_ds.data.text import TokenizedDataset
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.early_exit import EarlyExitModel, Point, curve, refuse_heads
from scpl_ds.engine import Engine
from scpl_ds.errors import DataError, RecipeError
from scpl_ds.export import MODEL_FILES, export_checkpoint
from scpl_ds.objectives._probe import Probe
from scpl_ds.recipe import Recipe
from scpl_ds.setup import cut_model, load_data, make_engine, start_world, together

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Score:
    """Counts that add up over micro-batches and ranks."""

    correct: int = 0
    total: int = 0
    """Samples; of a language model, tokens."""
    loss_sum: float = 0.0
    exits: dict[int, int] = dataclasses.field(default_factory=dict)
    """Layer -> how many the local head behind it got right."""
    tokens: bool = False
    """What was counted are tokens."""

    def add(
        self, logits: Tensor, labels: Tensor, exits: Mapping[int, Tensor] | None = None
    ) -> None:
        """Count one micro-batch: logits [B, C], labels int64 [B], and the exits' logits. Of a
        language model logits [B, T, V] and labels [B, T], each position scored by the next label.
        """
        if labels.ndim == 2:
            targets = targets_of(labels)
            logits, labels = logits[targets != IGNORED], targets[targets != IGNORED]
            self.tokens = True
        scores = logits.float()
        self.correct += int((scores.argmax(-1) == labels).sum())
        self.total += len(labels)
        self.loss_sum += float(F.cross_entropy(scores, labels, reduction="sum"))
        for layer, answer in (exits or {}).items():
            right = int((answer.argmax(-1) == labels).sum())
            self.exits[layer] = self.exits.get(layer, 0) + right

    def join(self, other: Score) -> None:
        """Count what another rank has counted."""
        self.correct += other.correct
        self.total += other.total
        self.loss_sum += other.loss_sum
        self.tokens |= other.tokens
        for layer, right in other.exits.items():
            self.exits[layer] = self.exits.get(layer, 0) + right

    def metrics(self) -> dict[str, float]:
        """``val/accuracy`` in [0, 1] and ``val/loss`` (cross-entropy, nats); with local heads that
        classify, ``val/accuracy_after_layer_<number>`` of each. Of a language model ``val/loss`` a
        token, ``val/perplexity`` and ``val/token_accuracy``."""
        if self.total == 0:
            return {}
        if self.tokens:
            loss = self.loss_sum / self.total
            return {
                "val/loss": loss,
                "val/perplexity": math.exp(min(loss, 700.0)),
                "val/token_accuracy": self.correct / self.total,
            }
        exits = {
            f"val/accuracy_after_layer_{layer}": right / self.total
            for layer, right in sorted(self.exits.items())
        }
        whole = {"val/accuracy": self.correct / self.total, "val/loss": self.loss_sum / self.total}
        return whole | exits


See = Callable[[Evaluated], None]
"""Takes a micro-batch of the last stage; its labels are None where the data have none."""


def evaluate(engine: Engine, loader: BatchLoader, *, see: See | None = None) -> Score:
    """Score the evaluation data over all stages; every rank calls it and gets the whole score.

    Args:
        engine: The stages.
        loader: Evaluation data; read on first-stage ranks, elsewhere it only counts.
        see: Called with each micro-batch of this rank, in order, on the last stage's ranks; those
            that are there to fill up are left out.
    """
    own = Score()
    batches = iter(loader) if engine.is_first_stage() else None
    for n, output in enumerate(engine.evaluate(batches, loader.num_micro_batches_per_epoch)):
        if n < loader.num_scored:
            _count(own, output, see)
    whole = Score()
    for part in gather_objects(engine.mesh, own):
        whole.join(part)
    return whole


def diagnose(
    engine: Engine, loader: BatchLoader, *, see: See | None = None
) -> tuple[Score, dict[str, float]]:
    """:func:`evaluate`, and what the features of every stage are worth
    (``stage{k}/nearest_class_accuracy`` and so on, ``objectives._probe.Probe``), mean over
    data-parallel ranks."""
    probes = {stage.index: Probe() for stage in engine.stages}
    for stage in engine.stages:
        stage.probe = probes[stage.index]
    score = evaluate(engine, loader, see=see)
    own = {
        f"stage{k}/{name}": value
        for k, probe in probes.items()
        for name, value in probe.describe().items()
    }
    for stage in engine.stages:
        stage.probe = None
    parts = gather_objects(engine.mesh, own)
    found: dict[str, list[float]] = {}
    for name, value in ((n, v) for part in parts for n, v in part.items()):
        found.setdefault(name, []).append(value)
    return score, {name: sum(values) / len(values) for name, values in found.items()}


def _count(score: Score, output: Evaluated, see: See | None) -> None:
    if output.logits is None:
        return
    if see is not None:
        see(output)
    if output.labels is not None:
        score.add(output.logits, output.labels, output.exits)


def evaluate_run(
    recipe: Recipe,
    folder: Path,
    *,
    logits_file: Path | None = None,
    exit_thresholds: Sequence[float] = (),
    exit_patiences: Sequence[int] = (),
) -> dict[str, Any]:
    """Score a checkpoint of a run over its stages, on the launcher's ranks or in this process.

    Args:
        recipe: The run's, as ``run_folder.open_run`` gives it.
        folder: The checkpoint.
        logits_file: Where to write ``logits`` [N, C] and ``labels`` [N] as safetensors, in the
            order of the evaluation data.
        exit_thresholds: Also score, on rank 0 alone, with samples that leave at the first local
            head that is so sure.
        exit_patiences: Likewise where so many further heads in a row agree.

    Returns:
        ``val/accuracy``, ``val/loss``, ``samples`` (of a language model ``val/perplexity``,
        ``val/token_accuracy``, ``val/loss``, ``tokens``); on rank 0 ``early_exit``, the points of
        ``early_exit.curve``, where any were asked for.

    Raises:
        DataError: The recipe's data has no evaluation split, or labels the run does not know.
        CheckpointError: The checkpoint is incomplete or of another model.
        RecipeError: ``logits_file`` cannot be written, or there is no head to leave at.
    """
    if logits_file is not None and not logits_file.absolute().parent.is_dir():
        raise RecipeError(
            f"--logits {logits_file}: the folder {logits_file.absolute().parent} does not exist."
        )
    if logits_file is not None and recipe.model.task == "causal-lm":
        raise RecipeError(
            f"--logits {logits_file}: a language model has a score for every token of its "
            "vocabulary at every position, too much to write. Leave --logits out."
        )
    if exit_thresholds or exit_patiences:
        _refuse_exits(recipe)
    mesh, device = start_world(recipe)
    log.info("reading the evaluation data: %s", recipe.data.name)
    data = load_data(recipe, mesh, trained=folder / MODEL_FILES)
    model = together(mesh, lambda: cut_model(recipe, data.facts))
    loader = together(mesh, lambda: _loader(recipe, data, mesh))
    log.info("loading %s in %d stages", folder, model.plan.num_stages)
    engine = make_engine(recipe, model, mesh, device, total_steps=1, replaced=True)
    together(mesh, lambda: _load(engine, folder))
    log.info("scoring %d samples", data.facts.num_eval)
    own: list[Tensor] = []

    def keep(output: Evaluated) -> None:
        assert output.logits is not None
        own.append(output.logits.cpu())

    score = evaluate(engine, loader, see=None if logits_file is None else keep)
    if logits_file is not None:
        parts = gather_objects(mesh, own)
        if mesh.rank == 0:
            assert isinstance(data.eval, TokenizedDataset)
            logits = torch.cat([tensor for part in parts for tensor in part])
            labels = torch.from_numpy(data.eval.labels)
            save_file({"logits": logits, "labels": labels}, logits_file)
    counted = "tokens" if score.tokens else "samples"
    found: dict[str, Any] = {**score.metrics(), counted: float(score.total)}
    if exit_thresholds or exit_patiences:
        points = together(
            mesh,
            lambda: (
                _curve(recipe, data, folder, device, exit_thresholds, exit_patiences)
                if mesh.rank == 0
                else []
            ),
        )
        found |= {"early_exit": [point._asdict() for point in points]} if points else {}
    return found


def _refuse_exits(recipe: Recipe) -> None:
    scpl = recipe.scpl
    refuse_heads(scpl.objective)
    if scpl.lookahead or not any(map(scpl.has_objective, range(scpl.stages))):
        found = {"method": scpl.method, "lookahead": scpl.lookahead, "stages": scpl.stages}
        raise RecipeError(
            "--exit-threshold, --exit-patience: this run has no local head that answers for its "
            f"stage (scpl: {found}). Train without method: bp and lookahead."
        )


def _curve(
    recipe: Recipe,
    data: Data,
    folder: Path,
    device: torch.device,
    thresholds: Sequence[float],
    patiences: Sequence[int],
) -> list[Point]:
    with tempfile.TemporaryDirectory(prefix="scpl-eval-") as room:
        task = recipe.model.task
        exported = export_checkpoint(folder, Path(room) / "export", task=task)
        model = EarlyExitModel.from_pretrained(exported, task=task).to(device)
    loader = whole_eval_loader(recipe, data)
    batches = [{k: v.to(device) for k, v in batch.items()} for batch in loader]
    return curve(model, batches, thresholds=thresholds, patiences=patiences)


def _load(engine: Engine, folder: Path) -> None:
    engine.load_checkpoint(folder, load_optimizer_states=False)


def _loader(recipe: Recipe, data: Data, mesh: Mesh) -> BatchLoader:
    loader = make_eval_loader(recipe, data, mesh)
    if loader is None:
        raise DataError(
            f"data: '{recipe.data.name}' has no evaluation split to score. Give one on the command "
            "line, for example data.eval_file=dev.csv."
        )
    return loader


def score_model(
    model: torch.nn.Module, batches: Iterable[dict[str, Tensor]], device: torch.device
) -> Score:
    """Score an ordinary Hugging Face model in this process.

    Args:
        model: Moved to ``device``, or to the CPU if it does not fit there (it may have been trained
            in stages for that reason).
        batches: With ``labels``; read again from the start if they have to be.
        device: Where to compute.
    """
    try:
        return _score(model.to(device), batches)
    except torch.OutOfMemoryError:
        log.warning("the whole model does not fit on %s: it is scored on the CPU.", device)
    return _score(model.to("cpu"), batches)


@torch.inference_mode()
def _score(model: torch.nn.Module, batches: Iterable[dict[str, Tensor]]) -> Score:
    score = Score()
    for logits, labels in _forward_all(model, batches):
        score.add(logits, labels)
    return score


def _forward_all(
    model: torch.nn.Module, batches: Iterable[dict[str, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    for batch in batches:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = moved.pop("labels")
        if "position_ids" in moved:  # with a cache transformers takes packed documents for one
            yield model(**moved, use_cache=False).logits, labels
        else:
            yield model(**moved).logits, labels
