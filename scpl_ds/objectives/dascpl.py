"""SupCon, and a classifier that watches: DASCPL."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from scpl_ds.objectives._base import Answer, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import Classifier, ClassifierKind, Pooling, pool
from scpl_ds.objectives._options import need_labels, need_size
from scpl_ds.objectives._targets import task_loss
from scpl_ds.objectives.supcon import SupCon, SupConOptions


class DascplOptions(SupConOptions):
    """Options of ``scpl.objective: {name: dascpl, ...}``: supcon's, and the classifier's."""

    classifier: ClassifierKind = "mlp"
    """``linear``: one Linear. ``mlp``: Linear, Tanh, Linear, the authors' predictor."""


class Dascpl(SupCon):
    """SupCon for the stage's layers, and a classifier on their output that teaches them nothing.

    So every stage can answer, as with ``early_exit``, and the layers learn what ``supcon`` alone
    would teach them.

    Source:
        minyaho/DASCPL: SupCon(h) + CE(c(stopgrad(h))) in every block.
    """

    Options: ClassVar[type[BaseModel]] = DascplOptions

    def __init__(
        self, options: DascplOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self._pooling: Pooling = options.pooling
        self.classifier = Classifier(
            need_size("dascpl", hidden_size),
            need_labels("dascpl", num_labels),
            kind=options.classifier,
            layer_norm=options.layer_norm,
        )

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: supcon's, ``supcon_loss`` and ``exit_accuracy``."""
        contrast = super().forward(hidden_states, attention_mask=attention_mask, labels=labels)
        logits = self._scores(hidden_states.detach(), attention_mask)
        with torch.autocast(logits.device.type, enabled=False):
            loss = contrast.loss + task_loss(logits, labels)
        metrics = {
            **contrast.metrics,
            "supcon_loss": contrast.loss.detach(),
            "exit_accuracy": (logits.argmax(1) == labels).float().mean(),
        }
        return ObjectiveOutput(loss, metrics)

    def answer(self, view: StageView) -> Answer:
        return Answer(self._scores(view.hidden_states, view.attention_mask))

    def flops(self, batch: int, sequence: int) -> int:
        return super().flops(batch, sequence) + self.classifier.flops(batch)

    def _scores(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        return self.classifier(pool(hidden_states, attention_mask, self._pooling))
