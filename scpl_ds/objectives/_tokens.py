"""What the objectives for causal language models share: the next token of a position, a draw of
positions, cross-entropy over many tokens without the whole matrix of scores, and lent matrices.

Every shape here follows from the shapes of the batch and the options, never from values: nothing
waits for the device, and an estimate of memory can run it on fake tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import IGNORED_LABEL, Matrix, Objective, StageView

_SCORES = 2**24
"""Most scores at a time: 64 MiB in float32."""

_SPOKEN = {
    "input_embeddings": "input embedding matrix",
    "output_embeddings": "output embedding matrix (language-model head)",
}


class TokenRows(NamedTuple):
    """Positions of one micro-batch, each with what comes next."""

    rows: Tensor
    """Hidden states, [n, D]; zeros where the target is -100."""
    targets: Tensor
    """The next token, int64, [n]; -100: the row counts for nothing."""


class Distinct(NamedTuple):
    """The different ones among n targets, the most frequent first."""

    tokens: Tensor
    """int64, [K]; 0 in places that are not filled."""
    counts: Tensor
    """How often each stands among the targets, int64, [K]; 0 in places that are not filled."""
    places: Tensor
    """Where each target is in ``tokens``, int64, [n]; -100: it is not, or was ignored."""


class TokenLoss(NamedTuple):
    """Cross-entropy of some rows."""

    loss: Tensor
    """Scalar in nats, the mean over the rows that count; 0 if there are none."""
    accuracy: Tensor
    """Share of those rows whose target has the highest score, 0-dim float32."""


def next_tokens(name: str, view: StageView) -> Tensor:
    """The label that each position is taught, int64, [B, T]: that of the position after it, as in
    Hugging Face's loss.

    -100 for the last position, where the label is -100, and, given a mask, where either position is
    padding. Packed texts have no mask; the first label of each text is to be -100, or the end of
    the text before is taught it.

    Args:
        name: Of the objective, for messages.
        view: Hidden states [B, T, D] and labels [B, T].

    Raises:
        RecipeError: There are no labels, or they are no tokens: one a sample, or numbers.
        ValueError: Labels or mask do not fit the hidden states.
    """
    hidden, labels = view.hidden_states, view.inputs.get("labels")
    advice = "Use model.task: causal-lm."
    if labels is None:
        raise RecipeError(
            f"scpl.objective: {name} learns from the next token, but the batch has no 'labels'. "
            f"{advice}"
        )
    if labels.ndim != 2 or labels.is_floating_point() or labels.is_complex():
        raise RecipeError(
            f"scpl.objective: {name} learns from the next token and needs one integer label per "
            f"position, [batch, sequence], got {labels.dtype} of shape {list(labels.shape)}. "
            f"{advice} For one class per sample: supcon, dascpl or early_exit."
        )
    if hidden.ndim != 3:
        raise RecipeError(
            f"scpl.objective: {name} needs hidden states of every position, [batch, sequence, "
            f"features], got shape {list(hidden.shape)}. {advice}"
        )
    mask = view.attention_mask
    for what, found in (("labels", labels), ("attention_mask", mask)):
        if found is not None and found.shape != hidden.shape[:2]:
            raise ValueError(
                f"{name} needs {what} of shape {list(hidden.shape[:2])}, as the hidden states have "
                f"positions, got {list(found.shape)}."
            )
    nothing = labels.new_full((len(labels), 1), IGNORED_LABEL)
    following = torch.cat([labels[:, 1:], nothing], dim=1).long()
    if mask is not None:
        real = mask.bool()
        after = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
        following = following.masked_fill(~(real & after), IGNORED_LABEL)
    return following


def draw_rows(name: str, view: StageView, positions: int) -> TokenRows:
    """At most ``positions`` positions of the micro-batch, those with a target before others.

    All of them, in order, when there are no more; else drawn without replacement from torch's
    global generator (of the device), so that a stage's seed decides. Padding may hold
    anything: neither its values nor their gradient get through.
    """
    targets = next_tokens(name, view).flatten()  # [B x T]
    rows = view.hidden_states.flatten(0, 1)  # [B x T, D]
    if len(targets) > positions:
        score = torch.rand(targets.shape, device=targets.device)
        chosen = score.masked_fill(targets == IGNORED_LABEL, -1.0).topk(positions).indices
        rows, targets = rows[chosen], targets[chosen]
    return TokenRows(rows.masked_fill((targets == IGNORED_LABEL)[:, None], 0.0), targets)


def distinct(targets: Tensor, most: int) -> Distinct:
    """The at most ``most`` different tokens among the targets [n]; what is beyond, the rarest, is
    nowhere. K is the smaller of ``most`` and n, however many there are."""
    ordered, order = targets.sort()
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    kind = first.cumsum(0) - 1  # which of the different ones, [n]
    counts = torch.zeros_like(targets)
    counts = counts.scatter_add(0, kind, (ordered != IGNORED_LABEL).long())
    tokens = torch.zeros_like(targets).scatter(0, kind, ordered.clamp(min=0))
    # Stable, so that it is the same on every device and in every run.
    counts, by_count = counts.sort(descending=True, stable=True)
    counts, kept = counts[:most], by_count[:most]
    place = torch.arange(len(kept), device=targets.device)
    place = place.masked_fill(counts == 0, IGNORED_LABEL)
    where = torch.full_like(targets, IGNORED_LABEL).scatter(0, kept, place)
    index = torch.empty_like(targets).scatter(0, order, where[kind])
    return Distinct(tokens[kept], counts, index)


def token_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    unit: bool = False,
) -> TokenLoss:
    """Cross-entropy of softmax(rows weight^T + bias), and how often the highest score is right,
    with no more than a chunk of the scores at a time.

    The gradients are computed in the forward, as a chunk's scores are at hand: two
    products of the size rows x weight where ``weight`` is frozen, three where it is not, and none
    in backward. Chunking that recomputes has one more. torch 2.13 has the same in
    ``torch.nn.functional.linear_cross_entropy``; it does not say what scored highest, and 2.11 does
    not have it.

    Products are in the dtype of ``weight``, all else in float32 (float64 stays float64). There is
    no gradient of a gradient.

    Args:
        rows: [N, D], cast to the dtype of ``weight``.
        weight: [C, D]; with a gradient if it requires one.
        targets: int64, [N], each -100 or below C.
        bias: Added to the scores, without gradient, [C].
        unit: Take the rows at length 1; here, because torch keeps and needs several matrices [N, D]
            for it.
    """
    grad = torch.is_grad_enabled()
    wanted = (grad and rows.requires_grad, grad and weight.requires_grad)
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows.to(weight.dtype)
        total, right = _ChunkedCrossEntropy.apply(rows, weight, bias, targets, unit, wanted)
        taught = (targets != IGNORED_LABEL).sum().clamp(min=1)
        return TokenLoss(total / taught, right.float() / taught)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        unit: bool,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        """Sum over rows of the loss, and how many are right."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        total = rows.new_zeros((), dtype=wide)
        right = targets.new_zeros(())
        of_rows = rows.new_zeros(rows.shape, dtype=wide) if wanted[0] else None
        of_weight = weight.new_zeros(weight.shape, dtype=wide) if wanted[1] else None
        size = max(1, _SCORES // len(weight))
        for start in range(0, len(rows), size):
            chunk = slice(start, start + size)
            kept = (targets[chunk] != IGNORED_LABEL)[:, None]  # [c, 1]
            target = targets[chunk].clamp(min=0)[:, None]  # [c, 1]
            given_rows = rows[chunk]
            length = given_rows.norm(dim=1, keepdim=True).clamp(min=1e-12) if unit else None
            if length is not None:
                given_rows = given_rows / length  # [c, D]
            # One matrix of [c, C], changed in place from here to the end of the chunk.
            scores = (given_rows @ weight.T).to(wide)
            if bias is not None:
                scores += bias
            top, best = scores.max(dim=1, keepdim=True)
            given = scores.gather(1, target)
            right += ((best == target) & kept).sum()
            scores.sub_(top).exp_()
            mass = scores.sum(dim=1, keepdim=True)
            total += (top + mass.log() - given).masked_fill(~kept, 0.0).sum()
            if wanted[0] or wanted[1]:
                # softmax less one at the target: the gradient of the scores, zero in ignored rows
                scores.mul_(kept / mass)
                scores.scatter_add_(1, target, -kept.to(wide))
                scores = scores.to(weight.dtype)
            if of_rows is not None:
                of_given = (scores @ weight).to(wide)
                if length is not None:  # what points along the row does not turn it
                    along = (of_given * given_rows).sum(dim=1, keepdim=True)
                    of_given = (of_given - along * given_rows) / length
                of_rows[chunk] = of_given
            if of_weight is not None:
                of_weight += scores.T @ given_rows
            del scores  # or it would be there beside the next chunk's
        ctx.save_for_backward(of_rows, of_weight)
        ctx.dtypes = rows.dtype, weight.dtype
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        of = [
            None if saved is None else (grad * saved).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *of, None, None, None, None


def straight_map(inside: int, outside: int) -> nn.Linear:
    """A Linear that changes nothing where the widths are equal, and no length where it can."""
    made = nn.Linear(inside, outside)
    with torch.no_grad():
        (nn.init.eye_ if inside == outside else nn.init.orthogonal_)(made.weight)
        made.bias.zero_()
    return made


def keep_lent(
    objective: Objective, name: str, matrix: Matrix, weights: Mapping[Matrix, Tensor]
) -> Tensor:
    """Keep a matrix that was lent as a non-persistent buffer of the objective.

    Raises:
        RecipeError: It was not lent, or is no [V, E].
    """
    found = weights.get(matrix)
    if found is None or found.ndim != 2:
        have = "none" if found is None else f"one of shape {list(found.shape)}"
        raise RecipeError(
            f"scpl.objective: {name} needs the model's {_SPOKEN[matrix]}, [vocabulary, width], and "
            f"there is {have}. Use a language model (model.task: causal-lm), or an objective "
            "that needs no vocabulary: token_supcon, supcon."
        )
    objective.register_buffer(matrix, found.detach(), persistent=False)
    return found


def lent(objective: Objective, name: str, matrix: Matrix) -> Tensor:
    """The matrix that ``keep_lent`` kept.

    Raises:
        RecipeError: Nobody lent it.
    """
    found = getattr(objective, matrix, None)
    if found is None:
        raise RecipeError(
            f"scpl.objective: {name} needs the model's {_SPOKEN[matrix]} and was lent "
            "none, as with a list of layers, whose vocabulary is not known. Use a Hugging Face "
            "language model, or token_supcon."
        )
    return found
