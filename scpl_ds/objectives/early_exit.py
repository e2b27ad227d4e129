"""A classifier at every stage: the Early Exit baseline of the SCPL authors."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from scpl_ds.objectives._base import Answer, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import Classifier, ClassifierKind, pool
from scpl_ds.objectives._options import PooledOptions, need_labels, need_size
from scpl_ds.objectives._targets import task_loss


class EarlyExitOptions(PooledOptions):
    """Options of ``scpl.objective: {name: early_exit, ...}``."""

    classifier: ClassifierKind = "mlp"
    """``linear``: one Linear. ``mlp``: Linear, Tanh, Linear, the authors' predictor."""


class EarlyExit(Objective):
    """The task's own loss at a classifier on the stage's pooled output.

    The gradient flows through the stage and ends at its first layer. Every stage can answer, so an
    evaluation reports the accuracy at each. Takes one class a sample, several, or a number
    (``model.num_labels: 1``).

    Source:
        minyaho/DASCPL, ``Trans_EE_m_d``: CE(c_k(pool(h_k)), y), the block's input detached and the
        classifier's not. Not BranchyNet's joint training, which is ``scpl.method: joint``.

    Raises:
        RecipeError: The hidden size or the number of classes is not known.
    """

    Options: ClassVar[type[BaseModel]] = EarlyExitOptions

    def __init__(
        self, options: EarlyExitOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.options = options
        self.classifier = Classifier(
            need_size("early_exit", hidden_size),
            need_labels("early_exit", num_labels),
            kind=options.classifier,
            layer_norm=options.layer_norm,
        )

    def scores(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, C]."""
        return self.classifier(pool(hidden_states, attention_mask, self.options.pooling))

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: ``exit_accuracy``, on the training rows."""
        logits = self.scores(hidden_states, attention_mask)
        metrics = {}
        if not labels.is_floating_point():
            metrics["exit_accuracy"] = (logits.argmax(1) == labels).float().mean()
        with torch.autocast(logits.device.type, enabled=False):
            return ObjectiveOutput(task_loss(logits, labels), metrics)

    def answer(self, view: StageView) -> Answer:
        return Answer(self.scores(view.hidden_states, view.attention_mask))

    def flops(self, batch: int, sequence: int) -> int:
        del sequence
        return self.classifier.flops(batch)
