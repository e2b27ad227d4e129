"""The first values of a map in front of the language-model head, by least squares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AddUp = Callable[[list[Tensor]], None]
"""Sums tensors over the data-parallel ranks of the stage, in place; a collective of the stage."""

_RIDGE = 0.1
"""Relative to the mean square of the centred rows. Measured on SmolLM2-135M (D = 576) in the middle
of its layers: between 0.01 and 0.3 the loss differs by 1 % with 7 D rows, by 8 % with 2 D."""


def ridge(rows: Tensor, targets: Tensor, add_up: AddUp) -> tuple[Tensor, Tensor] | None:
    """``weight`` [E, D] and ``bias`` [E], float32, with rows weight^T + bias nearest to the targets
    of all data-parallel ranks, and the weight small; None where no row is finite.

    In float64 on the CPU, the same on every rank.

    Args:
        rows: [n, D]; n may differ between ranks. Those with NaN or inf count for nothing.
        targets: [n, E].
        add_up: See ``AddUp``.
    """
    whole = rows.isfinite().all(1) & targets.isfinite().all(1)
    x, y = rows[whole].double(), targets[whole].double()
    count = x.new_tensor(float(len(x)))
    sums = [count, x.sum(0), y.sum(0)]
    add_up(sums)
    if sums[0] == 0:
        return None
    mean_x, mean_y = sums[1] / sums[0], sums[2] / sums[0]
    x, y = x - mean_x, y - mean_y
    products = [x.T @ x, x.T @ y]
    add_up(products)
    square, product = products
    scale = square.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    square.diagonal().add_(_RIDGE * scale)
    weight = torch.linalg.solve(square, product).T  # [E, D]
    return weight.float().contiguous(), (mean_y - weight @ mean_x).float()
