"""What the stages predict for a whole data set, in its order, for ``compute_metrics``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer, nested_concat

from scpl_ds.batch import Evaluated
from scpl_ds.data.loader import BatchLoader
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.evaluation import See, evaluate

ComputeMetrics = Callable[[EvalPrediction], Mapping[str, Any]]
Preprocess = Callable[[Tensor, Tensor | None], Tensor]


class Predicted(NamedTuple):
    """Of a whole data set, on every rank."""

    predictions: np.ndarray | None
    """[N, C]; of a language model [N, T, V]; or what ``preprocess`` made of them. None where they
    were not asked for."""
    label_ids: np.ndarray | None
    metrics: dict[str, float]
    """``val/loss`` and so on, with those of ``compute_metrics``."""


def predict(
    engine: Engine,
    loader: BatchLoader,
    *,
    compute_metrics: ComputeMetrics | None = None,
    preprocess: Preprocess | None = None,
    keep: bool = False,
    see: See | None = None,
) -> Predicted:
    """Score a data set over the stages; every rank calls it and gets the same.

    Args:
        engine: The stages.
        loader: Of the data set, in order.
        compute_metrics: Called on rank 0, with what all ranks predicted, in the order of the data.
        preprocess: What to keep of the logits of a micro-batch, and labels or None -> that.
        keep: Predictions are wanted, not only numbers.
        see: As in ``evaluate``.

    Raises:
        RecipeError: ``compute_metrics`` gave something that is no number.
    """
    wanted = keep or compute_metrics is not None
    logits, labels = (EvalLoopContainer(True, padding_index=-100) for _ in range(2))

    def collect(output: Evaluated) -> None:
        if see is not None:
            see(output)
        scores, truth = output.logits, output.labels
        if not wanted or scores is None:
            return
        if preprocess is not None:
            scores = preprocess(scores, truth)
        logits.add(scores)
        logits.to_cpu_and_numpy()
        if truth is not None:
            labels.add(truth)
            labels.to_cpu_and_numpy()

    metrics = evaluate(engine, loader, see=collect).metrics()
    if not wanted:
        return Predicted(None, None, metrics)
    # Last-stage ranks hold shards of the data in the order of their data-parallel numbers.
    parts = gather_objects(engine.mesh, (logits.get_arrays(), labels.get_arrays()))
    found: list[Any] = [_joined([part[n] for part in parts if part[n] is not None]) for n in (0, 1)]
    if found[1] is None:
        compute_metrics = None  # there is no truth to compare with
    own: Any = None
    if compute_metrics is not None and engine.mesh.rank == 0:
        predictions, label_ids = found
        own = compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
    if compute_metrics is not None:
        wait_for_all(engine.mesh)  # the script's metrics may take long
        metrics |= {f"val/{name}": n for name, n in _numbers(broadcast_object(engine.mesh, own))}
    return Predicted(found[0], found[1], metrics)


def _joined(parts: list[Any]) -> Any:
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = nested_concat(whole, part, padding_index=-100)
    return whole


def _numbers(found: Any) -> list[tuple[str, float]]:
    if not isinstance(found, Mapping):
        raise RecipeError(
            f"compute_metrics gave a {type(found).__name__}; it must give a dict of names and "
            "numbers."
        )
    numbers: list[tuple[str, float]] = []
    for name, value in found.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RecipeError(
                f"compute_metrics: '{name}' is {value!r}, not a number, so no tracker can draw it. "
                "Leave it out, or give a number for each of its parts."
            ) from None
        numbers.append((str(name).removeprefix("eval_"), number))
    return numbers
