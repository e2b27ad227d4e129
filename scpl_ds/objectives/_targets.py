"""What classifiers and similarity losses compare with, made of the labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import IGNORED_LABEL


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that transformers' classifiers take, mean over the rows that have a label.

    Integer labels [B]: cross-entropy, -100 left out (all of them: 0 with a gradient of zeros).
    One score a sample: mean squared error. Floating point [B, C]: several labels a sample, binary
    cross-entropy.

    Args:
        logits: Float32, [B, C].
        labels: As above.

    Raises:
        RecipeError: Labels of another shape.
    """
    if logits.shape[1] == 1 and labels.numel() == len(logits):
        return F.mse_loss(logits[:, 0], labels.reshape(-1).to(logits.dtype))
    if labels.is_floating_point() and labels.shape == logits.shape:
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    if labels.is_floating_point() or labels.ndim != 1:
        raise RecipeError(
            f"scpl.objective: labels of type {labels.dtype} and shape {list(labels.shape)} do not "
            f"fit {logits.shape[1]} scores a sample. Give one class a sample [batch], or 0.0 and "
            f"1.0 for every class [batch, {logits.shape[1]}]."
        )
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def cosines(rows: Tensor) -> Tensor:
    """Cosine of every pair of rows [N, D], each centred by its own mean: [N, N] in [-1, 1]."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    unit = F.normalize(centred, dim=1)
    return (unit @ unit.T).clamp(-1, 1)


def similarity_loss(rows: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """How far the rows' similarities [N, N] are from those of their classes, mean squared error.

    The classes' are 1 for the same one and -1 / (C - 1) for two different ones: what
    :func:`cosines` gives for one-hot rows. Rows of class -100 are left out.

    Source:
        Nokland & Eidnes 2019, arXiv:1901.06656, eq. 2; DeInfoReg's invariance term.
    """
    valid = labels != IGNORED_LABEL  # [N]
    same = labels[:, None] == labels[None, :]
    target = torch.where(same, 1.0, -1.0 / max(num_labels - 1, 1)).to(rows.dtype)  # [N, N]
    counted = valid[:, None] & valid[None, :]
    squares = (cosines(rows) - target).square().masked_fill(~counted, 0.0)
    return squares.sum() / counted.sum().clamp(min=1)
