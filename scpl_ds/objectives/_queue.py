"""The last rows that a stage compared, kept so that later micro-batches are compared with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scpl_ds.objectives._base import IGNORED_LABEL
from scpl_ds.objectives._heads import unit_rows


class FeatureQueue(nn.Module):
    """The last ``size`` rows that had a class, oldest first: normalised, without gradient.

    Both tensors are persistent buffers, so that a resumed run goes on where it stopped. Free places
    come first; they hold zeros and the label -100. In half precision the features are whatever the
    backend made of the module's floating point buffers.

    What entered since the last ``commit`` can be taken back: a push makes new tensors and keeps the
    ones before the step until then. So it also leaves alone what a pending backward still reads.

    Args:
        size: Number of rows, N > 0.
        width: Width of a row, D.
    """

    features: Tensor
    """[N, D]."""
    labels: Tensor
    """int64, [N]."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), IGNORED_LABEL))
        self._before: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def push(self, features: Tensor, labels: Tensor) -> None:
        """Add rows [B, D] with labels [B]; the oldest make room. Rows of -100 do not enter.

        Nor do rows that are not finite, as an overflow in half precision makes them: each would
        spoil the loss of every later row. Needs no synchronisation with the device.
        """
        if self._before is None:
            self._before = (self.features, self.labels)
        labels = labels.masked_fill(~features.isfinite().all(dim=1), IGNORED_LABEL)
        rows = unit_rows(features, labels == IGNORED_LABEL).to(self.features.dtype)
        everything = torch.cat([self.features, rows])
        classes = torch.cat([self.labels, labels])
        # Stable: rows without a class go to the front, the others stay in the order they came in.
        newest = (classes != IGNORED_LABEL).int().argsort(stable=True)[-len(self.labels) :]
        self.features, self.labels = everything[newest], classes[newest]

    def commit(self) -> None:
        """The step is finished: what entered stays."""
        self._before = None

    def rollback(self) -> None:
        """The step will not be finished: as it was at the last ``commit``."""
        if self._before is not None:
            self.features, self.labels = self._before
            self._before = None

    @torch.no_grad()
    def clear(self) -> None:
        """Free all places."""
        self.rollback()
        self.features.zero_()
        self.labels.fill_(IGNORED_LABEL)
