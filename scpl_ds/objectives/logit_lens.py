"""The task's own loss at a frozen copy of the language-model head, on a sample of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import Matrix, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._options import TokenOptions, need_size
from scpl_ds.objectives._tokens import draw_rows, keep_lent, lent, token_cross_entropy

_NAME = "logit_lens"


class LogitLensOptions(TokenOptions):
    """Options of ``scpl.objective: {name: logit_lens, ...}``."""

    positions: PositiveInt = 256
    """Most positions of a micro-batch that are taught; of more, so many are drawn anew each time,
    without replacement. Each costs two products with the whole head."""
    rank: PositiveInt = 64
    """Width between the two Linears of the map before the head."""


class LogitLens(Objective):
    """Cross-entropy of the next token, through W, the language-model head before training (frozen):

        n = norm(h)        scores = W (n + up(down(n)))

    ``norm`` is a LayerNorm, ``down`` and ``up`` Linear(D, rank) and Linear(rank, D) without bias,
    all trained; ``up`` starts at zero, so that training starts from W norm(h). W needs V x D
    numbers on every stage that has one, and no gradient or optimizer state. Where the
    head has a bias, it is left out.

    Source:
        nostalgebraist 2020, the logit lens; Belrose et al. 2023, arXiv:2303.08112, the tuned lens.
        As a local loss and on sampled positions it is ours.

    Raises:
        RecipeError: The hidden size is not known, or the model's head is not one for it.
    """

    Options: ClassVar[type[BaseModel]] = LogitLensOptions

    def __init__(
        self, options: LogitLensOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.options = options
        self.size = need_size(_NAME, hidden_size)
        self.norm = nn.LayerNorm(self.size) if options.layer_norm else nn.Identity()
        self.down = nn.Linear(self.size, options.rank, bias=False)
        self.up = nn.Linear(options.rank, self.size, bias=False)
        nn.init.zeros_(self.up.weight)

    @classmethod
    def borrows(cls, options: BaseModel) -> frozenset[Matrix]:
        del options
        return frozenset({"output_embeddings"})

    def lend(self, weights: Mapping[Matrix, Tensor]) -> None:
        head = keep_lent(self, _NAME, "output_embeddings", weights)
        if head.shape[1] != self.size:
            raise RecipeError(
                f"scpl.objective: {_NAME} reads hidden states with the model's head, but they are "
                f"{self.size} wide and the head reads {head.shape[1]}. Use prototype or "
                "token_supcon."
            )

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
        rows, targets = draw_rows(_NAME, view, self.options.positions)
        rows = self.norm(rows.to(self.down.weight.dtype))
        loss, accuracy = token_cross_entropy(rows + self.up(self.down(rows)), head, targets)
        return ObjectiveOutput(loss, {"token_accuracy": accuracy})

    def flops(self, batch: int, sequence: int) -> int:
        """FLOPs of the map and of the scores of the positions that are drawn.

        Raises:
            RecipeError: Nothing was lent, so that the vocabulary is not known.
        """
        rows = min(self.options.positions, batch * sequence)
        vocabulary = len(lent(self, _NAME, "output_embeddings"))
        return 2 * rows * self.size * (2 * self.options.rank + vocabulary)
