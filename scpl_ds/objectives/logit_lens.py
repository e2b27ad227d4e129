"""The task's own loss at a frozen copy of the language-model head, on a sample of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from scpl_ds.objectives._base import Matrix, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._calibration import AddUp, ridge
from scpl_ds.objectives._options import TokenOptions, need_size
from scpl_ds.objectives._tokens import (
    draw_rows,
    keep_lent,
    lent,
    straight_map,
    token_cross_entropy,
)

_NAME = "logit_lens"
_FEWEST = 256


class LogitLensOptions(TokenOptions):
    """Options of ``scpl.objective: {name: logit_lens, ...}``."""

    positions: PositiveInt | None = None
    """Most positions of a micro-batch that are taught; of more, so many are drawn anew each time,
    without replacement. Each costs two products with the whole head. Unset: a quarter of
    them, but no fewer than 256."""
    calibration: NonNegativeInt | None = None
    """Positions of the first micro-batches, over all data-parallel ranks, that the map is fitted on
    before the first step; they are learned from afterwards. Unset: 4096, or twice the hidden size
    where that is more. 0: the map starts as the identity."""


class LogitLens(Objective):
    """Cross-entropy of the next token, through W, the language-model head before training (frozen):

        scores = W (A norm(h) + a)

    ``norm`` is a LayerNorm and (A, a) a Linear from the stage's width to the head's, all trained.
    Before the first step A and a are fitted, by least squares, to take norm(h) to what W reads when
    the model, as it came, runs to its end. From the identity the middle of SmolLM2-135M has a loss
    of 21 nats (guessing: 11), fitted 5.5 (the model: 4.7); what the layers learn while the
    map finds its way is worse than learning nothing (docs/language-models.md).

    W needs V x D numbers on every stage that has one, and no gradient or optimizer state. Where the
    head has a bias, it is left out.

    Source:
        nostalgebraist 2020, the logit lens; Belrose et al. 2023, arXiv:2303.08112, the tuned lens.
        As a local loss, on sampled positions and fitted in closed form it is ours.

    Raises:
        RecipeError: The hidden size is not known, or the model has no head.
    """

    Options: ClassVar[type[BaseModel]] = LogitLensOptions

    def __init__(
        self, options: LogitLensOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.options = options
        self.size = need_size(_NAME, hidden_size)
        self.norm = nn.LayerNorm(self.size) if options.layer_norm else nn.Identity()
        self.map = straight_map(self.size, self.size)

    @classmethod
    def borrows(cls, options: BaseModel) -> frozenset[Matrix]:
        del options
        return frozenset({"output_embeddings"})

    def lend(self, weights: Mapping[Matrix, Tensor]) -> None:
        head = keep_lent(self, _NAME, "output_embeddings", weights)
        self.map = straight_map(self.size, head.shape[1])

    @classmethod
    def calibrates(cls, options: BaseModel) -> bool:
        return isinstance(options, LogitLensOptions) and options.calibration != 0

    def calibration(self) -> int:
        asked = self.options.calibration
        return max(4096, 2 * self.size) if asked is None else asked

    def calibrate(self, rows: Tensor, targets: Tensor, add_up: AddUp) -> dict[str, Tensor]:
        if self.options.layer_norm:  # as the norm is before training
            rows = F.layer_norm(rows, (self.size,))
        if (fitted := ridge(rows, targets, add_up)) is None:
            return {}
        return dict(zip(("map.weight", "map.bias"), fitted, strict=True))

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch with labels [B, T]; metrics: ``token_accuracy``, among
        all tokens.

        Raises:
            RecipeError: The labels are not one token per position, or nothing was lent.
            ValueError: The labels, or the mask, do not fit the hidden states.
        """
        head = lent(self, _NAME, "output_embeddings")
        view = StageView.of(hidden_states, attention_mask, labels)
        rows, targets = draw_rows(_NAME, view, self._most(labels.numel()))
        rows = self.map(self.norm(rows.to(self.map.weight.dtype)))
        loss, accuracy = token_cross_entropy(rows, head, targets)
        return ObjectiveOutput(loss, {"token_accuracy": accuracy})

    def _most(self, there: int) -> int:
        """How many of the positions of a micro-batch are drawn."""
        return self.options.positions or max(_FEWEST, there // 4)

    def flops(self, batch: int, sequence: int) -> int:
        """FLOPs of the map and of the scores of the positions that are drawn.

        Raises:
            RecipeError: Nothing was lent, so that the vocabulary is not known.
        """
        rows = min(self._most(batch * sequence), batch * sequence)
        vocabulary, width = lent(self, _NAME, "output_embeddings").shape
        return 2 * rows * width * (self.size + vocabulary)
