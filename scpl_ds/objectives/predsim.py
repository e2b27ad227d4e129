"""Similarity matching beside a classifier: PredSim."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from scpl_ds.objectives._base import Answer, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import Classifier, ClassifierKind, pool
from scpl_ds.objectives._options import (
    ProjectionOptions,
    need_labels,
    need_size,
    projection_head,
    refuse_regression,
    require_classes,
    width_of,
)
from scpl_ds.objectives._targets import similarity_loss, task_loss


class PredSimOptions(ProjectionOptions):
    """Options of ``scpl.objective: {name: predsim, ...}``."""

    similarity: float = Field(default=0.99, ge=0, le=1)
    """Weight of the similarity loss; the classifier's cross-entropy has the rest."""
    classifier: ClassifierKind = "linear"
    """``linear``: one Linear. ``mlp``: Linear, Tanh, Linear."""


class PredSim(Objective):
    """Rows as similar as their classes, and a classifier that teaches the layers too.

    The convolution before the similarities is here the projection head.

    Source:
        Nokland & Eidnes 2019, arXiv:1901.06656 (``predsim``): 0.99 similarity + 0.01 cross-entropy.

    Raises:
        RecipeError: The task has no classes, or a size is not known.
    """

    Options: ClassVar[type[BaseModel]] = PredSimOptions

    def __init__(
        self, options: PredSimOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        refuse_regression("predsim", num_labels)
        self.options = options
        self.classes = need_labels("predsim", num_labels)
        self.head = projection_head(hidden_size, options)
        self.classifier = Classifier(
            need_size("predsim", hidden_size),
            self.classes,
            kind=options.classifier,
            layer_norm=options.layer_norm,
        )

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: ``similarity_loss`` and ``exit_accuracy``."""
        require_classes("predsim", hidden_states, labels)
        pooled = pool(hidden_states, attention_mask, self.options.pooling)  # [B, D]
        features, logits = self.head(pooled), self.classifier(pooled)
        share = self.options.similarity
        with torch.autocast(features.device.type, enabled=False):
            similar = similarity_loss(features.to(logits.dtype), labels, self.classes)
            loss = share * similar + (1 - share) * task_loss(logits, labels)
        metrics = {
            "similarity_loss": similar.detach(),
            "exit_accuracy": (logits.argmax(1) == labels).float().mean(),
        }
        return ObjectiveOutput(loss, metrics)

    def answer(self, view: StageView) -> Answer:
        pooled = pool(view.hidden_states, view.attention_mask, self.options.pooling)
        return Answer(self.classifier(pooled))

    def flops(self, batch: int, sequence: int) -> int:
        del sequence
        similar = 2 * batch * batch * width_of(self.head, self.hidden_size)
        return self.head.flops(batch) + self.classifier.flops(batch) + similar
