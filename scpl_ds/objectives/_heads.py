"""From hidden states to one vector a sample: pooling without padding, projection heads, length."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "cls", "last"]
Projection = Literal["identity", "linear", "mlp"]
ClassifierKind = Literal["linear", "mlp"]


def real_rows(hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which rows have at least one real position, bool, [B]."""
    if attention_mask is None:
        return torch.ones(hidden_states.shape[0], dtype=torch.bool, device=hidden_states.device)
    return attention_mask.bool().any(dim=-1)


def pool(hidden_states: Tensor, attention_mask: Tensor | None, how: Pooling) -> Tensor:
    """One vector per sample, from its real positions only.

    Padding may stand left, right or anywhere, and may hold anything (attention over a fully padded
    row gives NaN in several models): it is replaced before it is summed, not multiplied by zero, so
    neither its values nor its gradient get through. A fully padded row gives zeros.

    Shapes: B samples, T positions, D features.

    Args:
        hidden_states: Floating point, [B, T, D]; [B, D] is taken as pooled already.
        attention_mask: Non-zero for a real position, [B, T]. None: every position is real.
        how: ``mean`` over the real positions; ``cls``, the first real one; ``last``, the last one.

    Returns:
        [B, D], float32; float64 stays float64.

    Raises:
        ValueError: The shapes do not fit, or ``how`` is unknown.
    """
    if hidden_states.ndim not in (2, 3):
        raise ValueError(
            "pooling needs hidden states of shape [batch, sequence, features] or "
            f"[batch, features], got {list(hidden_states.shape)}."
        )
    expected = hidden_states.shape[:2] if hidden_states.ndim == 3 else hidden_states.shape[:1]
    if attention_mask is not None and (
        attention_mask.ndim != 2 or attention_mask.shape[: len(expected)] != expected
    ):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)} and does not fit hidden states "
            f"of shape {list(hidden_states.shape)}; give the tokenizer's mask, [batch, sequence]."
        )
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    if hidden_states.ndim == 2:
        padded_rows = ~real_rows(hidden_states, attention_mask)
        return hidden_states.to(dtype).masked_fill(padded_rows[:, None], 0.0)  # [B, D]
    if attention_mask is None and how == "mean":
        return hidden_states.sum(dim=1, dtype=dtype) / max(hidden_states.shape[1], 1)  # [B, D]
    if attention_mask is None:
        attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
    mask = attention_mask.bool()  # [B, T]
    if how == "mean":
        # Summed in float32 without a float32 copy of the [B, T, D] input; `where` is one pass over
        # it and masked_fill two.
        total = torch.where(mask[..., None], hidden_states, 0.0).sum(dim=1, dtype=dtype)  # [B, D]
        return total / mask.sum(dim=1, keepdim=True).clamp(min=1)
    if how not in ("cls", "last"):
        raise ValueError(f"pooling must be 'mean', 'cls' or 'last', got {how!r}.")
    # The first largest entry; of a row without any 0, which is zeroed below.
    rank = mask if how == "cls" else mask.cumsum(dim=1) * mask
    index = rank.int().argmax(dim=1)  # [B]
    rows = torch.arange(mask.shape[0], device=mask.device)
    pooled = hidden_states[rows, index].to(dtype)  # [B, D]
    return pooled.masked_fill(~mask.any(dim=1)[:, None], 0.0)


def unit_rows(rows: Tensor, ignored: Tensor) -> Tensor:
    """The rows [N, D] at length 1, float32 at least; zeros for those that ``ignored`` [N] says,
    whatever they hold."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.normalize(rows.masked_fill(ignored[:, None], 0.0), dim=-1)


class ProjectionHead(nn.Module):
    """``[LayerNorm] -> identity | linear | mlp``, from D features to ``output_size``.

    ``linear`` is one Linear with bias; ``mlp`` is Linear, ReLU, Linear, without batch norm, as in
    the SCPL authors' code (minyaho/SCPL, model/loss_fn.py, ``i``, ``l`` and ``m``). The dims
    default to the input's.

    The head runs in the dtype of its own parameters (whatever the sharding backend made of them),
    so the input is cast to it; with no parameters the input's dtype is kept.

    Args:
        input_size: Width of the input; None is enough for ``identity`` without a layer norm.
        projection: Kind of head.
        hidden_size: Width between the two layers of ``mlp``; None: ``input_size``.
        output_size: Width of the result; None: ``input_size``.
        layer_norm: Normalise the input first.

    Raises:
        ValueError: ``input_size`` is None and the head has parameters.
    """

    def __init__(
        self,
        input_size: int | None,
        *,
        projection: Projection,
        hidden_size: int | None = None,
        output_size: int | None = None,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm: nn.Module = nn.Identity()
        self.projector: nn.Module = nn.Identity()
        self.shapes: tuple[tuple[int, int], ...] = ()
        """(in, out) of every Linear."""
        if projection == "identity" and not layer_norm:
            return
        if input_size is None:
            raise ValueError(
                f"a '{projection}' projection{' with layer_norm' if layer_norm else ''} has "
                "parameters and needs the hidden size, which is not known."
            )
        if layer_norm:
            self.norm = nn.LayerNorm(input_size)
        if projection == "linear":
            self.shapes = ((input_size, output_size or input_size),)
            self.projector = nn.Linear(*self.shapes[0])
        elif projection == "mlp":
            width = hidden_size or input_size
            self.shapes = ((input_size, width), (width, output_size or input_size))
            self.projector = nn.Sequential(
                nn.Linear(*self.shapes[0]), nn.ReLU(), nn.Linear(*self.shapes[1])
            )

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] -> [B, output size]."""
        parameter = next(self.parameters(), None)
        if parameter is not None:
            pooled = pooled.to(parameter.dtype)
        return self.projector(self.norm(pooled))

    def flops(self, rows: int) -> int:
        """Forward FLOPs of the Linear layers for ``rows`` rows."""
        return sum(2 * rows * n_in * n_out for n_in, n_out in self.shapes)


class Classifier(nn.Module):
    """``[LayerNorm] -> [Linear, Tanh] -> Linear`` from D features to C scores.

    ``mlp`` is the authors' predictor for language (minyaho/DASCPL, ``make_predictor``). It runs in
    the dtype of its own parameters and answers in float32.
    """

    def __init__(
        self, hidden_size: int, num_labels: int, *, kind: ClassifierKind, layer_norm: bool
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size) if layer_norm else nn.Identity()
        self.hidden: nn.Module = nn.Identity()
        self.shapes: tuple[tuple[int, int], ...] = ((hidden_size, num_labels),)
        if kind == "mlp":
            self.hidden = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh())
            self.shapes = ((hidden_size, hidden_size), *self.shapes)
        self.out = nn.Linear(hidden_size, num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        scores = self.out(self.hidden(self.norm(pooled.to(self.out.weight.dtype))))
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def flops(self, rows: int) -> int:
        """Forward FLOPs of the Linear layers for ``rows`` rows."""
        return sum(2 * rows * n_in * n_out for n_in, n_out in self.shapes)
