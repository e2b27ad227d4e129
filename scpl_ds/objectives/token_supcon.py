"""SupCon over positions of a text: those with one next token attract, all others repel."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from scpl_ds.objectives._base import IGNORED_LABEL, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._contrast import CHUNK_SIZE, PosNorm, contrast
from scpl_ds.objectives._options import TokenHeadOptions, projection_head, width_of
from scpl_ds.objectives._tokens import draw_rows

_NAME = "token_supcon"


class TokenSupConOptions(TokenHeadOptions):
    """Options of ``scpl.objective: {name: token_supcon, ...}``."""

    positions: PositiveInt = 1024
    """Most positions of a micro-batch that are compared with each other; of more, so many are drawn
    anew each time, without replacement. The more, the likelier a next token occurs twice."""
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Softmax temperature, dimensionless. Lower is sharper."""
    pos_norm: PosNorm = "khosla"
    """``khosla``: divide by |P| and average over the positions that have a positive. ``paper``:
    divide by |P| + 1 and average over all, most of which have none."""
    chunk_size: PositiveInt = CHUNK_SIZE
    """Most positions that are compared with all others at a time, as in ``supcon``."""


class TokenSupCon(Objective):
    """Supervised contrastive loss of single positions, whose class is the next token.

    Not of the SCPL papers, which have no language-modelling recipe. A position whose next token
    is nobody else's teaches nothing (but is a negative for the others): ``valid_token_fraction``
    says how many of those drawn had a positive.
    """

    Options: ClassVar[type[BaseModel]] = TokenSupConOptions

    def __init__(
        self, options: TokenSupConOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.options = options
        self.head = projection_head(hidden_size, options)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch with labels [B, T]; metrics: ``valid_token_fraction``.

        Raises:
            RecipeError: The labels are not one token per position.
            ValueError: The labels, or the mask, do not fit the hidden states.
        """
        view = StageView.of(hidden_states, attention_mask, labels)
        rows, targets = draw_rows(_NAME, view, self.options.positions)
        loss, num_positives = contrast(
            self.head(rows),
            targets,
            temperature=self.options.temperature,
            pos_norm=self.options.pos_norm,
            memory=None,
            chunk_size=self.options.chunk_size,
        )
        drawn = (targets != IGNORED_LABEL).sum().clamp(min=1)
        return ObjectiveOutput(
            loss, {"valid_token_fraction": (num_positives > 0).sum().float() / drawn}
        )

    def flops(self, batch: int, sequence: int) -> int:
        """FLOPs of the head and of the similarities of the positions that are drawn."""
        rows = min(self.options.positions, batch * sequence)
        return self.head.flops(rows) + 2 * rows * rows * width_of(self.head, self.hidden_size)
