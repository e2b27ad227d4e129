"""The supervised contrastive loss of SCPL: samples of one class attract, all others repel."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import (
    IGNORED_LABEL,
    GatheredRows,
    Objective,
    ObjectiveOptions,
    ObjectiveOutput,
)
from scpl_ds.objectives._contrast import CHUNK_SIZE, PosNorm, contrast, supcon_loss
from scpl_ds.objectives._heads import (
    Pooling,
    Projection,
    ProjectionHead,
    pool,
    real_rows,
)
from scpl_ds.objectives._queue import FeatureQueue

__all__ = ["SupCon", "SupConOptions", "supcon_loss"]


class SupConOptions(ObjectiveOptions):
    """Options of ``scpl.objective: {name: supcon, ...}``."""

    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Softmax temperature, dimensionless. Lower is sharper; 0.1 is the paper's."""
    pooling: Pooling = "mean"
    """How a sequence becomes one vector: ``mean`` over its real positions, ``cls`` (the first real
    one), ``last`` (the last real one, for decoders)."""
    projection: Projection = "mlp"
    """Head between the pooled vector and the loss; trained with the stage, not exported. The
    paper's language experiments use ``identity``."""
    projection_dim: PositiveInt | None = None
    """Width of the vectors that are compared. Unset: the model's hidden size."""
    hidden_dim: PositiveInt | None = None
    """Width of the hidden layer of ``mlp``. Unset: the model's hidden size."""
    pos_norm: PosNorm = "paper"
    """``paper``: divide by |P| + 1 and average over all rows, as the authors' code does.
    ``khosla``: divide by |P| and average over the rows that have a positive."""
    layer_norm: bool = True
    """Normalise the pooled vector before the head. Pre-norm models (GPT-2, Llama, ModernBERT, ...)
    hand over a residual stream that nobody has normalised, in which a few features are far larger
    than the rest. false is the paper's setting; its own blocks end in a LayerNorm."""

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

    @model_validator(mode="after")
    def _dims_belong_to_the_projection(self) -> SupConOptions:
        if self.projection == "identity" and self.projection_dim is not None:
            raise ValueError(
                f"projection_dim: {self.projection_dim} needs a head, but projection is "
                "'identity'; use projection: linear or mlp, or leave projection_dim out"
            )
        if self.projection != "mlp" and self.hidden_dim is not None:
            raise ValueError(
                f"hidden_dim: {self.hidden_dim} is the hidden layer of an mlp, but projection is "
                f"'{self.projection}'; use projection: mlp, or leave hidden_dim out"
            )
        return self


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
        if num_labels == 1:
            raise RecipeError(
                "scpl.objective: supcon compares samples by class, but model.num_labels is 1, "
                "which means regression in transformers. Use a classification task "
                "(num_labels: 2 or more)."
            )
        self.options = options
        try:
            self.head = ProjectionHead(
                hidden_size,
                projection=options.projection,
                hidden_size=options.hidden_dim,
                output_size=options.projection_dim,
                layer_norm=options.layer_norm,
            )
        except ValueError as error:
            raise RecipeError(
                f"scpl.objective: {error} Use projection: identity with layer_norm: false, or "
                "a model whose config has a hidden_size."
            ) from error
        self.queue: FeatureQueue | None = None
        if options.feature_queue:
            if not self._width:
                raise RecipeError(
                    f"scpl.objective.feature_queue: {options.feature_queue} rows need the width of "
                    "a row, and the hidden size is not known. Use projection: linear or mlp with a "
                    "model whose config has a hidden_size, or feature_queue: 0."
                )
            self.queue = FeatureQueue(options.feature_queue, self._width)

    @property
    def _width(self) -> int:
        """Width of the rows that are compared; 0 where it is not known."""
        return self.head.shapes[-1][1] if self.head.shapes else (self.hidden_size or 0)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: ``valid_anchor_fraction``.

        Raises:
            RecipeError: The labels are not one class per row (regression, multi-label, causal-lm).
            ValueError: The number of labels, or the mask, does not fit the hidden states.
        """
        self._check_labels(hidden_states, labels)
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
        return self.head.flops(batch) + 2 * batch * compared * self._width

    @staticmethod
    def _check_labels(hidden_states: Tensor, labels: Tensor | None) -> None:
        if labels is None:
            raise RecipeError(
                "scpl.objective: supcon needs the class of every sample, but the batch has no "
                "'labels'. Use a labelled data set."
            )
        if labels.is_floating_point() or labels.is_complex():
            raise RecipeError(
                "scpl.objective: supcon compares samples by class and needs integer labels, got "
                f"{labels.dtype} of shape {list(labels.shape)}: regression and multi-label targets "
                "have no classes. Use a single-label classification task."
            )
        if labels.ndim != 1:
            raise RecipeError(
                "scpl.objective: supcon needs one label per sample, [batch], got shape "
                f"{list(labels.shape)}. Labels per token (causal-lm) have no class per sample; use "
                "model.task: sequence-classification."
            )
        if labels.shape[0] != hidden_states.shape[0]:
            raise ValueError(
                f"supcon needs one label per sample, got {labels.shape[0]} labels for "
                f"{hidden_states.shape[0]} rows of hidden states."
            )
