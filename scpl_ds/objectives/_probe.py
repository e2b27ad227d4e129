"""What a stage's features are worth, found without training anything: ``train.diagnostics``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scpl_ds.objectives._base import IGNORED_LABEL
from scpl_ds.objectives._heads import pool

_ROWS = 2048
"""Rows that are kept: pairs of them are compared."""


class Probe:
    """Collects mean-pooled features [N, D] of an evaluation, N at most 2048, and describes them."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._count = 0

    @torch.no_grad()
    def add(self, hidden_states: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
        """One micro-batch: [B, T, D] or [B, D], its mask [B, T], classes int64 [B]."""
        room = _ROWS - self._count
        if room <= 0 or labels.is_floating_point() or labels.ndim != 1:
            return
        keep = labels[:room] != IGNORED_LABEL
        pooled = pool(hidden_states, attention_mask, "mean")[:room][keep]
        self._rows.append(pooled.float().cpu())
        self._labels.append(labels[:room][keep].cpu())
        self._count += len(pooled)

    def describe(self) -> dict[str, float]:
        """Numbers to log; empty where there were too few rows.

        - ``nearest_class_accuracy``: of one half of the rows, by the nearest of the classes' means
          of the other half (drawn, the same way each time).
        - ``feature_rank``: exp of the entropy of the singular values of the centred features
          (Roy & Vetterli 2007), between 1 and D.
        - ``alignment``: mean squared distance of two rows of one class, at length 1; lower is
          nearer. ``uniformity``: log of the mean of exp(-2 squared distance) of all pairs; lower is
          more spread (Wang & Isola 2020, arXiv:2005.10242).
        """
        if self._count < 4:
            return {}
        rows, labels = torch.cat(self._rows), torch.cat(self._labels)
        found = {"nearest_class_accuracy": _nearest_class(rows, labels)}
        weights = torch.linalg.svdvals(rows - rows.mean(0))
        weights = weights / weights.sum().clamp(min=1e-12)
        found["feature_rank"] = float(torch.special.entr(weights).sum().exp())
        unit = F.normalize(rows, dim=1)
        squared = (2 - 2 * unit @ unit.T).clamp(min=0)  # [N, N]
        pairs = ~torch.eye(len(unit), dtype=torch.bool)
        same = (labels[:, None] == labels[None, :]) & pairs
        if same.any():
            found["alignment"] = float(squared[same].mean())
        found["uniformity"] = float(squared[pairs].mul(-2).exp().mean().log())
        return found


def _nearest_class(rows: Tensor, labels: Tensor) -> float:
    # Not every second row: classes may take turns.
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    known, asked = order[::2], order[1::2]
    classes = labels[known].unique()
    means = torch.stack([rows[known][labels[known] == c].mean(0) for c in classes])
    nearest = classes[torch.cdist(rows[asked], means).argmin(1)]
    return float((nearest == labels[asked]).float().mean())
