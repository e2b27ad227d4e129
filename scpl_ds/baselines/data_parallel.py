"""Rivals that hold the whole model on every rank: one rank alone, and torch's data parallelism."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from scpl_ds.baselines._base import Job, Part, Rival, ring_bytes
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import RecipeError

# Renamed in torch 2.13; every rank computes the same buffers.
_OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
_NO_BUFFER_SYNC: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _OPTIONS else "broadcast_buffers": False
}


class Replica(Rival):
    """The whole model on each of ``ranks`` ranks, which share the samples of a step evenly.

    A rank's samples go through in as few equal pieces as fit into micro-batches.
    """

    def __init__(self, name: str, job: Job, mesh: Mesh, ranks: int) -> None:
        super().__init__(name, job, mesh)
        rows, rest = divmod(job.rows, ranks)
        if rest or not rows:
            raise RecipeError(
                f"{name}: {ranks} ranks cannot share the {job.rows} samples of a step "
                f"({job.num_micro_batches} micro-batches x {job.micro_batch_size}) evenly. Use a "
                f"multiple of {ranks}."
            )
        most = min(rows, job.micro_batch_size)
        self.ranks, self.rows = ranks, rows
        self.piece = next(size for size in range(most, 0, -1) if rows % size == 0)
        """Samples of one forward of a rank."""
        self.part = Part(job, 0, job.cut(1)) if mesh.rank < ranks else None

    def pieces(self, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """This rank's samples, cut for accumulation."""
        first = self.mesh.rank * self.rows
        starts = range(first, first + self.rows, self.piece)
        return [{k: v[at : at + self.piece] for k, v in inputs.items()} for at in starts]

    def parameters(self) -> dict[str, Tensor]:
        return {} if self.part is None else self.part.body.hf_state_dict()


class Single(Replica):
    """Rank 0 alone with the whole model; the others own nothing and do nothing."""

    def __init__(self, name: str, job: Job, mesh: Mesh) -> None:
        super().__init__(name, job, mesh, 1)
        if self.part is not None:
            self._optimizer = job.optimizer(self.part.named_parameters())

    def _train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None:
        if self.part is None:
            return None
        loss = accumulate(self, self.part, self.pieces(inputs))
        self.update(self._optimizer)
        return loss


class Ddp(Replica):
    """Torch's DistributedDataParallel over all ranks.

    Gradients are views of their buckets, buckets have torch's size (25 MiB, the first smaller) and
    are averaged during the last micro-batch's backward only.
    """

    def __init__(self, name: str, job: Job, mesh: Mesh) -> None:
        super().__init__(name, job, mesh, mesh.world_size)
        assert self.part is not None
        self._parallel: Any = DistributedDataParallel(
            self.part,
            process_group=mesh.new_group(None),
            gradient_as_bucket_view=True,
            **_NO_BUFFER_SYNC,
        )
        self._optimizer = job.optimizer(self.part.named_parameters())

    def _train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None:
        loss = accumulate(self, self._parallel, self.pieces(inputs), self._parallel.no_sync)
        self.bytes_sent += ring_bytes(self._parallel.parameters(), self.ranks)
        self.update(self._optimizer)
        return loss


def accumulate(
    rival: Replica,
    model: torch.nn.Module,
    pieces: list[dict[str, Tensor]],
    before_last: Any = contextlib.nullcontext,
) -> Tensor:
    """Forward and backward of every piece.

    Args:
        rival: Whose step it is.
        model: Gives the mean loss of a piece.
        pieces: As many samples in each.
        before_last: Makes the context of all pieces but the last.

    Returns:
        The mean loss of all pieces, detached.
    """
    losses: list[Tensor] = []
    for number, piece in enumerate(pieces):
        last = number == len(pieces) - 1
        with contextlib.nullcontext() if last else before_last():
            with rival.doing("forward", 0, number):
                loss = model(piece["input_ids"], **piece) / len(pieces)
            with rival.doing("backward", 0, number):
                loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
