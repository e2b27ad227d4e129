"""Which checkpoint of a run is the best, by a number of its evaluations, as in transformers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scpl_ds import checkpoint
from scpl_ds.errors import RecipeError
from scpl_ds.recipe_checks import AFTER_LAYER
from scpl_ds.recipe_sections import TrainSection

log = logging.getLogger(__name__)


class Best:
    """The best checkpoint so far. Without ``train.load_best_model_at_end`` there is none."""

    def __init__(self, train: TrainSection) -> None:
        self._on = train.load_best_model_at_end
        self._metric = f"val/{train.best_metric}"
        self._greater = train.best_is_greatest
        self._score: tuple[int, float] | None = None
        self.value: float | None = None
        self.checkpoint: Path | None = None

    def check(self, bounds: Sequence[int], num_eval: int) -> None:
        """Before the first step: what can be known by then; a recipe knows the other names.

        Args:
            bounds: Where stages end and begin, in layers.
            num_eval: Samples that are evaluated.

        Raises:
            RecipeError: No evaluation is going to give the number.
        """
        if self._on and num_eval == 0:
            raise RecipeError(
                "train.load_best_model_at_end needs evaluations to choose by, and there are no "
                "evaluation data. Give some (data.eval_file, data.eval_fraction, data.eval_split), "
                "or set train.load_best_model_at_end: false."
            )
        after = AFTER_LAYER.fullmatch(self._metric.removeprefix("val/")) if self._on else None
        heads = [end - 1 for end in bounds[1:]]
        if after is not None and int(after[1]) not in heads:
            raise RecipeError(
                f"train.metric_for_best_model: no stage ends with layer {after[1]}, so there is "
                f"no local head behind it; they end with {', '.join(map(str, heads))}."
            )

    def scored(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of an evaluation after ``step``.

        Raises:
            RecipeError: The one that is asked for is not among them.
        """
        if not self._on:
            return
        if self._metric not in metrics:
            known = ", ".join(sorted(name.removeprefix("val/") for name in metrics))
            raise RecipeError(
                f"train.metric_for_best_model: '{self._metric.removeprefix('val/')}' is not among "
                f"the numbers of an evaluation of this run: {known or 'there are none'}."
            )
        self._score = (step, metrics[self._metric])

    def saving(
        self, step: int, run: Path, limit: int | None, *, spare: Sequence[Path] = ()
    ) -> Callable[[Path], None]:
        """The checkpoint after ``step``, which may be the best, is going to be written.

        Args:
            step: As it was given to ``scored``.
            run: The run folder.
            limit: ``train.save_total_limit``.
            spare: Checkpoints that it does not remove either.

        Returns:
            What to call once it is in place: removes what the limit says, but never the best.
        """
        if self._score is not None and self._score[0] == step and self._better(self._score[1]):
            self.value, self.checkpoint = self._score[1], run / f"checkpoint-{step}"
        kept = [*spare, *([] if self.checkpoint is None else [self.checkpoint])]

        def saved(folder: Path) -> None:
            checkpoint.prune(run, limit, spare=kept)
            log.info("saved %s", folder.name)

        return saved

    def _better(self, value: float) -> bool:
        if self.value is None:
            return not math.isnan(value)
        return value > self.value if self._greater else value < self.value

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it."""
        if self.checkpoint is None:
            return None
        return {"checkpoint": self.checkpoint.name, "metric": self._metric, "value": self.value}

    def restore(self, state: Mapping[str, Any] | None, beside: Path) -> None:
        """Go on from ``state`` of a checkpoint in the folder ``beside``."""
        if not self._on or state is None or state["metric"] != self._metric:
            return
        folder = beside / state["checkpoint"]
        if (folder / checkpoint.MANIFEST).is_file():
            self.value, self.checkpoint = state["value"], folder
        else:
            log.warning(
                "%s, the best checkpoint until here (%s %g), is gone: the best is sought among "
                "those to come.",
                folder, self._metric, state["value"],
            )  # fmt: skip

    def result(self) -> dict[str, Any]:
        """For ``result.json``, in transformers' words."""
        if self.checkpoint is None:
            return {}
        return {"best_model_checkpoint": str(self.checkpoint), "best_metric": self.value}
