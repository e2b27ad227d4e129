"""The contrastive loss as plain maths: anchors against rows, never more than a chunk at a time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scpl_ds.objectives._base import IGNORED_LABEL
from scpl_ds.objectives._heads import unit_rows

PosNorm = Literal["paper", "khosla"]
Memory = tuple[Tensor, Tensor]
"""Rows to compare with that are no anchors: features [M, D] and labels [M]."""

CHUNK_SIZE = 1024


class Contrast(NamedTuple):
    """What comparing the rows of one batch gave."""

    loss: Tensor
    """Scalar."""
    num_positives: Tensor
    """Of every anchor, int64, [N]; 0 for an ignored one."""


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    pos_norm: PosNorm = "paper",
    memory: Memory | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """Supervised contrastive loss of one batch: same-label rows attract, the rest repel.

    Row ``i`` is the anchor once. Its positives P(i) are the other rows with the same label. With
    ``pos_norm="paper"`` an anchor's sum over P(i) is divided by |P(i)| + 1, and a row that is alone
    in its class contributes 0 but stays in the mean; with ``"khosla"`` it is divided by |P(i)| and
    the mean is over the anchors that have a positive. A batch of one row, or without any pair,
    gives 0 with a gradient of zeros, never NaN and never a missing gradient.

    Rows of ``memory`` are further positives and negatives of every anchor. They are no anchors, so
    they do not count in the mean, and get no gradient.

    Rows labelled -100 are left out altogether, whatever they hold. Computed in float32 (float64
    stays float64), also under autocast. Needs no synchronisation with the device.

    At most ``chunk_size`` anchors are compared at a time, in forward and in backward: a batch of
    more goes through in chunks, whose similarities are computed once more in backward instead of
    being kept. Chunks change the order in which gradients are added up, nothing else; a batch of
    one chunk computes nothing twice.

    Shapes: N rows (micro-batch x data-parallel ranks when gathered), D features, M remembered rows.

    Args:
        embeddings: Floating point, [N, D]. Normalised here; need not be unit length.
        labels: Integer, [N].
        temperature: Softmax temperature, dimensionless, > 0. Lower is sharper.
        pos_norm: Which of the two normalisations.
        memory: Features [M, D], normalised here, and integer labels [M]; M may be 0.
        chunk_size: Most anchors at a time, > 0: similarities take ``chunk_size`` x (N + M) numbers.

    Returns:
        Scalar in nats, float32 or float64.

    Raises:
        ValueError: The shapes do not fit, the labels are not integers, ``temperature`` or
            ``chunk_size`` is not positive, or ``pos_norm`` is unknown.

    Source:
        Khosla et al. 2020, arXiv:2004.11362, eq. 2 (L_out). ``paper`` divides by |P(i)| + 1 as the
        SCPL authors' code does (minyaho/SCPL, model/loss_fn.py, LocalLoss), not by |P(i)|.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(supcon_loss(x, torch.tensor([0, 0, 1]), temperature=1.0).item(), 4)
        0.1044
    """
    options = {"temperature": temperature, "pos_norm": pos_norm, "chunk_size": chunk_size}
    return contrast(embeddings, labels, memory=memory, **options).loss


def contrast(
    embeddings: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    pos_norm: PosNorm,
    memory: Memory | None,
    chunk_size: int,
) -> Contrast:
    """:func:`supcon_loss`, and how many positives every anchor had."""
    _check(embeddings, labels, temperature, pos_norm, memory, chunk_size)
    labels = labels.long()
    keys = labels if memory is None else torch.cat([labels, memory[1].long()])  # [N + M]
    ignored = keys == IGNORED_LABEL  # [N + M]
    with torch.autocast(embeddings.device.type, enabled=False):
        z = unit_rows(embeddings, ignored[: len(labels)])  # [N, D]
        remembered = None
        if memory is not None:
            remembered = unit_rows(memory[0].detach(), ignored[len(labels) :]).to(z.dtype)  # [M, D]
        if len(labels) <= chunk_size:
            sums, num_positives = _compare(z, z, remembered, labels, keys, ignored, 0, temperature)
        else:
            chunks: list[tuple[Tensor, Tensor]] = []
            for start in range(0, len(labels), chunk_size):
                part = slice(start, start + chunk_size)
                rows = (z[part], z, remembered, labels[part], keys, ignored, start, temperature)
                # Nothing of [chunk, N + M] is kept for the backward, which compares once more.
                chunks.append(
                    checkpoint(_compare, *rows, use_reentrant=False, preserve_rng_state=False)
                )
            sums, num_positives = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        if pos_norm == "paper":
            num_rows = (~ignored[: len(labels)]).sum().clamp(min=1)
            loss = (sums / (num_positives + 1)).sum() / num_rows
        else:
            num_anchors = (num_positives > 0).sum().clamp(min=1)
            loss = (sums / num_positives.clamp(min=1)).sum() / num_anchors
    return Contrast(loss, num_positives)


def _compare(
    anchors: Tensor,
    z: Tensor,
    remembered: Tensor | None,
    labels: Tensor,
    keys: Tensor,
    ignored: Tensor,
    start: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Anchors [C, D] with ``labels`` [C], which are rows ``start ...`` of z [N, D], against z and
    what is remembered [M, D], whose classes are ``keys`` [N + M]; ``ignored`` [N + M] are left out.

    Returns:
        Each anchor's sum over its positives of -log p, and the number of its positives, [C].
    """
    logits = anchors @ z.T / temperature  # [C, N]
    if remembered is not None:
        # A product of its own, so that the backward computes nothing for it.
        logits = torch.cat([logits, anchors @ remembered.T / temperature], dim=1)  # [C, N + M]
    left_out = ignored.repeat(len(anchors), 1)  # [C, N + M]
    left_out.diagonal(start).fill_(True)  # no row with itself
    # An ignored anchor has no positive either: only ignored rows share its label.
    no_positive = (labels[:, None] != keys).logical_or_(left_out)  # [C, N + M]
    # finfo.min, not -inf: for a row without others, logsumexp of all -inf has a NaN gradient.
    denominator = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
    minus_log_prob = denominator.logsumexp(dim=1, keepdim=True) - logits  # [C, N + M]
    sums = minus_log_prob.masked_fill(no_positive, 0.0).sum(dim=1)
    return sums, len(keys) - no_positive.sum(dim=1)


def _check(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float,
    pos_norm: str,
    memory: Memory | None,
    chunk_size: int,
) -> None:
    _check_rows(embeddings, labels)
    if memory is not None:
        _check_rows(*memory)
        if memory[0].shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"supcon_loss compares rows of one width, got {embeddings.shape[1]} features a row "
                f"and {memory[0].shape[1]} in memory."
            )
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 row, got {chunk_size}.")
    if pos_norm not in ("paper", "khosla"):
        raise ValueError(f"pos_norm must be 'paper' or 'khosla', got {pos_norm!r}.")


def _check_rows(embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.ndim != 2 or labels.ndim != 1 or embeddings.shape[0] != labels.shape[0]:
        raise ValueError(
            "supcon_loss needs one vector and one label per row, got embeddings of shape "
            f"{list(embeddings.shape)} and labels of shape {list(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"supcon_loss compares classes and needs integer labels, got {labels.dtype}."
        )
    if not embeddings.is_floating_point():
        raise ValueError(f"supcon_loss needs floating point embeddings, got {embeddings.dtype}.")
