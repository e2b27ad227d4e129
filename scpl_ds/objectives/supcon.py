"""The supervised contrastive loss of SCPL: samples of one class attract, all others repel."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import IGNORED_LABEL, GatheredRows, Objective, ObjectiveOutput
from scpl_ds.objectives._contrast import CHUNK_SIZE, PosNorm, contrast, supcon_loss
from scpl_ds.objectives._heads import pool, real_rows
from scpl_ds.objectives._options import (
    ProjectionOptions,
    projection_head,
    refuse_regression,
    require_classes,
    width_of,
)
from scpl_ds.objectives._queue import FeatureQueue

__all__ = ["SupCon", "SupConOptions", "supcon_loss"]


class SupConOptions(ProjectionOptions):
    """Options of ``scpl.objective: {name: supcon, ...}``."""

    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Softmax temperature, dimensionless. Lower is sharper; 0.1 is the paper's."""
    pos_norm: PosNorm = "paper"
    """``paper``: divide by |P| + 1 and average over all rows, as the authors' code does.
    ``khosla``: divide by |P| and average over the rows that have a positive."""
    gather: bool = False
    """Compare the rows of all data-parallel ranks of the stage, as if one rank had them all: D
    ranks with B rows each train as one rank with D x B rows. Two messages a micro-batch between
    them, the numbers of rows and then the rows and labels, and none in the backward. Nothing
    changes with one rank."""
    feature_queue: NonNegativeInt = 0
    """Compare every row also with the last so many rows of earlier micro-batches (of all
    data-parallel ranks), as the stage saw them then: further positives and negatives, without
    gradient. For micro-batches of 1-8 rows. 0: off. Takes N x width x 4 bytes a stage, saved with
    its head, and as much again within a step."""

    chunk_size: PositiveInt = CHUNK_SIZE
    """Most rows that are compared with all others at a time; more go through in chunks, compared
    once more in backward. Bounds memory: chunk_size x (rows + queue) similarities instead of
    rows x (rows + queue). A batch of up to so many rows is untouched by it; a larger one learns
    the same up to rounding."""


class SupCon(Objective):
    """Supervised contrastive local objective: pool, project, compare every pair of the micro-batch.

    Who shares the micro-batch is part of the objective: gradient accumulation is not a bigger batch
    for it. ``gather`` adds the rows of the other data-parallel ranks, ``feature_queue`` those of
    earlier micro-batches; both in training only. Rows without a positive teach nothing;
    ``valid_anchor_fraction`` says how many of the anchors did have one (fully padded rows and
    labels of -100 count as rows without). With ``gather`` the anchors are the rows of all ranks.

    Raises:
        RecipeError: The task has no classes (regression), or the head or the queue needs a hidden
            size that is not known.
    """

    Options: ClassVar[type[BaseModel]] = SupConOptions

    def __init__(
        self, options: SupConOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        refuse_regression("supcon", num_labels)
        self.options = options
        self.head = projection_head(hidden_size, options)
        self.queue: FeatureQueue | None = None
        if options.feature_queue:
            if not (width := width_of(self.head, hidden_size)):
                raise RecipeError(
                    f"scpl.objective.feature_queue: {options.feature_queue} rows need the width of "
                    "a row, and the hidden size is not known. Use projection: linear or mlp with a "
                    "model whose config has a hidden_size, or feature_queue: 0."
                )
            self.queue = FeatureQueue(options.feature_queue, width)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: ``valid_anchor_fraction``.

        Raises:
            RecipeError: The labels are not one class per row (regression, multi-label, causal-lm).
            ValueError: The number of labels, or the mask, does not fit the hidden states.
        """
        require_classes("supcon", hidden_states, labels)
        pooled = pool(hidden_states, attention_mask, self.options.pooling)  # [B, D]
        labels = labels.long().masked_fill(~real_rows(hidden_states, attention_mask), IGNORED_LABEL)
        features = self.head(pooled)  # [B, width]
        queue = self.queue if self.training else None
        rows = self._rows_of_all_ranks(features.detach(), labels)
        anchors, classes = features, labels
        if self.options.gather:
            anchors, classes = rows.with_own(features), rows.labels  # [N, width], [N]
        loss, num_positives = contrast(
            anchors,
            classes,
            temperature=self.options.temperature,
            pos_norm=self.options.pos_norm,
            memory=None if queue is None else (queue.features, queue.labels),
            chunk_size=self.options.chunk_size,
        )
        if self.options.gather:
            # Every rank has the loss of all rows and the gradient of its own ones: the gradients
            # are to be added over the ranks, and will be averaged. The value stays as it is.
            loss = loss + (rows.ranks - 1) * (loss - loss.detach())
        fraction = (num_positives > 0).sum().float() / max(len(classes), 1)
        if queue is not None:
            queue.push(rows.features, rows.labels)
        return ObjectiveOutput(loss, {"valid_anchor_fraction": fraction})

    def _rows_of_all_ranks(self, features: Tensor, labels: Tensor) -> GatheredRows:
        """This rank's own rows unless those of the others are asked for, and there are others."""
        asked = self.options.gather or self.queue is not None
        if asked and self.training and self.gather_rows is not None:
            return self.gather_rows(features, labels)
        return GatheredRows(features, labels, first=0, ranks=1)

    def commit_step(self) -> None:
        if self.queue is not None:
            self.queue.commit()

    def discard_step(self) -> None:
        if self.queue is not None:
            self.queue.rollback()

    def forget(self) -> None:
        if self.queue is not None:
            self.queue.clear()

    def flops(self, batch: int, sequence: int) -> int:
        """FLOPs of the head and of the B x (B + queue) similarities; pooling has no matrix product.

        The rows that ``gather`` adds are not counted: how many ranks there will be is not known
        when a plan is made.
        """
        del sequence
        compared = batch + self.options.feature_queue
        width = width_of(self.head, self.hidden_size)
        return self.head.flops(batch) + 2 * batch * compared * width
