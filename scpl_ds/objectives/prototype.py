"""Each position is to be nearest to the embedding of its next token, among the batch's tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from scpl_ds.objectives._base import IGNORED_LABEL, Matrix, Objective, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import Projection
from scpl_ds.objectives._options import TokenHeadOptions, need_size, projection_head, width_of
from scpl_ds.objectives._tokens import (
    distinct,
    draw_rows,
    keep_lent,
    lent,
    straight_map,
    token_cross_entropy,
)

_NAME = "prototype"


class PrototypeOptions(TokenHeadOptions):
    """Options of ``scpl.objective: {name: prototype, ...}``."""

    positions: PositiveInt = 4096
    """Most positions of a micro-batch that are taught; of more, so many are drawn anew each time,
    without replacement."""
    projection: Projection = "linear"
    """Head between a position's features and the loss; trained with the stage, not exported."""
    prototypes: PositiveInt = 4096
    """Most different next tokens that a position is compared with. When those drawn have
    more, the rarest are left out, and so are the positions before them."""
    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """Softmax temperature, dimensionless. Lower is sharper."""
    frequency_correction: bool = True
    """Add the log of how often a token is a target in the micro-batch to its score. Features
    then need not say how frequent tokens are, only what the text before makes of it."""


class Prototype(Objective):
    """Softmax of cosines between a position and the prototypes of the tokens that come next
    anywhere in the micro-batch.

    With h the features of position t, y its next token, E the model's input embeddings before
    training (frozen), U the different next tokens of the positions drawn, n_c how often c is one:

        z   = unit(head(h))             p_c = unit(A E[c] + a)
        s_c = z . p_c / temperature + log n_c
        loss = mean of log sum over c in U of exp(s_c) - s_y

    The map (A, a) is always there and trained: it starts as the identity where the width of the
    embedding is that of the head (else orthogonal), and a = 0. Every position has a prototype
    to go to, unlike in ``token_supcon``, and no matrix has the size of the vocabulary.

    log n_c makes the softmax that over the next tokens of all positions, each as often as it
    occurs; the cosine then learns log p(c | text) - log p(c). Without, tokens count once and it
    learns log p(c | text) (what logQ correction makes of negatives that occur more than once).

    Source:
        Ours. Menon et al. 2021, arXiv:2007.07314, for adding the log of the prior; Yi et al. 2019
        (sampling-bias-corrected retrieval) for what subtracting it from repeated negatives does.

    Raises:
        RecipeError: The hidden size is not known, or the model has no input embeddings.
    """

    Options: ClassVar[type[BaseModel]] = PrototypeOptions

    def __init__(
        self, options: PrototypeOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.options = options
        self.head = projection_head(need_size(_NAME, hidden_size), options)
        self.width = width_of(self.head, hidden_size)
        self.map = nn.Linear(self.width, self.width)

    @classmethod
    def borrows(cls, options: BaseModel) -> frozenset[Matrix]:
        del options
        return frozenset({"input_embeddings"})

    def lend(self, weights: Mapping[Matrix, Tensor]) -> None:
        embedding = keep_lent(self, _NAME, "input_embeddings", weights)
        self.map = straight_map(embedding.shape[1], self.width)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss of one micro-batch with labels [B, T]. Metrics: ``prototype_accuracy``, how often
        the right prototype scores highest; ``valid_token_fraction``, how many of the positions
        drawn have a prototype.

        Raises:
            RecipeError: The labels are not one token per position, or nothing was lent.
            ValueError: The labels, or the mask, do not fit the hidden states.
        """
        embedding = lent(self, _NAME, "input_embeddings")
        view = StageView.of(hidden_states, attention_mask, labels)
        rows, targets = draw_rows(_NAME, view, self.options.positions)
        drawn = (targets != IGNORED_LABEL).sum().clamp(min=1)
        tokens, counts, places = distinct(targets, self.options.prototypes)
        z = self.head(rows)  # [n, width]
        prototypes = self.map(embedding[tokens].to(self.map.weight.dtype))  # [K, width]
        with torch.autocast(z.device.type, enabled=False):
            wide = torch.promote_types(z.dtype, torch.float32)
            prototypes = F.normalize(prototypes.to(wide), dim=-1) / self.options.temperature
            correction = counts.to(wide).clamp(min=1).log()
            if not self.options.frequency_correction:
                correction = torch.zeros_like(correction)
            # min, not -inf: where nothing is drawn, all places are empty.
            bias = correction.masked_fill(counts == 0, torch.finfo(wide).min)
            loss, accuracy = token_cross_entropy(z, prototypes, places, bias=bias, unit=True)
        valid = (places != IGNORED_LABEL).sum().float() / drawn
        return ObjectiveOutput(
            loss, {"prototype_accuracy": accuracy, "valid_token_fraction": valid}
        )

    def flops(self, batch: int, sequence: int) -> int:
        """FLOPs of head and map and of the cosines, with as many places for prototypes as there
        may be; an embedding of the width of the head until one is lent."""
        rows = min(self.options.positions, batch * sequence)
        places = min(self.options.prototypes, rows)
        mapped = 2 * places * self.map.in_features * self.width
        return self.head.flops(rows) + mapped + 2 * rows * places * self.width
