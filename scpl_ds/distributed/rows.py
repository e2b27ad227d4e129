"""The rows that the data-parallel ranks of a stage compare with each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_ds.distributed.collectives import lost_rank_is_named
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.objectives._base import GatheredRows, GatherRows


def row_gatherer(mesh: Mesh) -> GatherRows | None:
    """The function by which a stage's objective sees the rows of all its data-parallel ranks; None
    where there is only one.

    It is a collective of the stage, once a call: all its ranks call it for the same micro-batch.
    They may hold different numbers of rows, none included. Nothing in it has a gradient, so it
    needs no message in the backward.

    Raises (the function):
        BoundaryError: A rank of the stage is gone or late.
    """
    if mesh.dp_size == 1:
        return None

    @torch.no_grad()
    def gather_rows(features: Tensor, labels: Tensor) -> GatheredRows:
        with lost_rank_is_named(mesh, "compare rows"):
            # Over gloo whatever the device: reading the numbers does not make the device wait, and
            # a rank that is gone is noticed at once.
            own = torch.tensor([len(labels)])
            counts = [torch.zeros_like(own) for _ in range(mesh.dp_size)]
            dist.all_gather(counts, own, group=mesh.dp_control_group)
            numbers = [int(count) for count in counts]
            # One message, as bytes: gloo does not know every dtype. Labels first, for alignment.
            packed = torch.cat([_bytes(labels.long()[:, None]), _bytes(features)], dim=1)
            message = packed.new_zeros(max(1, *numbers), packed.shape[1])
            message[: len(packed)] = packed
            messages = message.new_empty(mesh.dp_size, *message.shape)
            dist.all_gather(list(messages), message, group=mesh.dp_group)
        rows = torch.cat([part[:n] for part, n in zip(messages, numbers, strict=True)])
        return GatheredRows(
            _part(rows[:, 8:], features.dtype),
            _part(rows[:, :8], torch.int64)[:, 0],
            first=sum(numbers[: mesh.dp_rank]),
            ranks=mesh.dp_size,
        )

    return gather_rows


def _bytes(rows: Tensor) -> Tensor:
    """[B, D] as bytes, [B, D x item size]."""
    return rows.contiguous().view(torch.uint8)


def _part(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``_bytes``, for some columns of a message."""
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)
