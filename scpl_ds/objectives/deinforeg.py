"""Variance, invariance and covariance of a stage's features: DeInfoReg."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel, NonNegativeFloat
from torch import Tensor

from scpl_ds.objectives._base import IGNORED_LABEL, Answer, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import Classifier, ClassifierKind, Projection, pool, unit_rows
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


class DeInfoRegOptions(ProjectionOptions):
    """Options of ``scpl.objective: {name: deinforeg, ...}``."""

    projection: Projection = "identity"
    """Head between the pooled vector and the loss; ``identity`` for language, as the authors'."""
    variance: NonNegativeFloat = 1.0
    """Weight of the term that keeps every feature's spread over the batch from vanishing. With rows
    of length 1 it hardly moves (the authors'; docs/objectives.md)."""
    invariance: NonNegativeFloat = 1.0
    """Weight of the term that makes rows as similar as their classes."""
    covariance: NonNegativeFloat = 1.0
    """Weight of the term that decorrelates features."""
    classifier_weight: NonNegativeFloat = 0.001
    """Weight of the classifier's cross-entropy."""
    classifier: ClassifierKind = "linear"
    """``linear``: one Linear. ``mlp``: Linear, Tanh, Linear."""
    merge: bool = True
    """The classifier reads what the projection gives, and teaches the layers. ``false``: it reads
    the pooled vector, and teaches them nothing."""


class DeInfoReg(Objective):
    """VICReg's three terms with the labels in the place of the second view.

    For rows z of length 1, [B, d]: the off-diagonal squares of their covariance divided by d; the
    squared distance of their similarities from those of their classes; the hinge of each feature's
    standard deviation at 1, divided by B.

    Source:
        DeInfoReg, arXiv:2506.18193; the authors' code (ianzih, utils.py ``DeInfoReg``): the hinge's
        extra 1/B and the standard deviation of rows of length 1 are theirs.

    Raises:
        RecipeError: The task has no classes, or a size is not known.
    """

    Options: ClassVar[type[BaseModel]] = DeInfoRegOptions

    def __init__(
        self, options: DeInfoRegOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        refuse_regression("deinforeg", num_labels)
        self.options = options
        self.classes = need_labels("deinforeg", num_labels)
        self.head = projection_head(hidden_size, options)
        size = need_size("deinforeg", hidden_size)
        self.classifier = Classifier(
            width_of(self.head, hidden_size) if options.merge else size,
            self.classes,
            kind=options.classifier,
            layer_norm=options.layer_norm and not options.merge,
        )

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: the three terms and ``exit_accuracy``."""
        require_classes("deinforeg", hidden_states, labels)
        o = self.options
        pooled = pool(hidden_states, attention_mask, o.pooling)  # [B, D]
        features = self.head(pooled)  # [B, d]
        logits = self.classifier(features if o.merge else pooled.detach())
        with torch.autocast(features.device.type, enabled=False):
            terms = deinforeg_terms(features, labels, self.classes)
            weights = (o.variance, o.invariance, o.covariance)
            loss = sum(w * term for w, term in zip(weights, terms, strict=True))
            loss = loss + o.classifier_weight * task_loss(logits, labels)
        names = ("variance_loss", "invariance_loss", "covariance_loss")
        metrics = {name: term.detach() for name, term in zip(names, terms, strict=True)}
        metrics["exit_accuracy"] = (logits.argmax(1) == labels).float().mean()
        return ObjectiveOutput(loss, metrics)

    def answer(self, view: StageView) -> Answer:
        pooled = pool(view.hidden_states, view.attention_mask, self.options.pooling)
        return Answer(self.classifier(self.head(pooled) if self.options.merge else pooled))

    def flops(self, batch: int, sequence: int) -> int:
        """Head, classifier, and the similarities [B, B] and covariances [d, d]."""
        del sequence
        width = width_of(self.head, self.hidden_size)
        products = 2 * batch * batch * width + 2 * batch * width * width
        return self.head.flops(batch) + self.classifier.flops(batch) + products


def deinforeg_terms(features: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, ...]:
    """Variance, invariance and covariance term of features [B, d] with integer labels [B].

    Rows of class -100 are left out. One row gives finite numbers.
    """
    valid = labels != IGNORED_LABEL
    z = unit_rows(features, ~valid)  # [B, d]
    count = valid.sum().clamp(min=1).to(z.dtype)
    mean = z.sum(0) / count
    centred = (z - mean).masked_fill(~valid[:, None], 0.0)
    covariance = centred.T @ centred / count  # [d, d]
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    spread = (centred.square().sum(0) / (count - 1).clamp(min=1) + 1e-7).sqrt()  # [d]
    hinge = torch.relu(1 - spread).mean() / count
    return hinge, similarity_loss(z, labels, num_labels), off_diagonal / z.shape[1]
