"""What ranks tell each other outside the boundaries: metrics without waiting, facts with
waiting."""

from __future__ import annotations

import collections
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import BoundaryError


class _Leaving:
    """Numbers of one step on their way to the host; asking whether they have arrived costs
    nothing."""

    def __init__(self, values: Mapping[str, float | Tensor]) -> None:
        on_device = {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and value.device.type == "cuda"
        }
        self._names = list(on_device)
        self._values = {n: float(v) for n, v in values.items() if n not in on_device}
        self._order = list(values)
        self._copy = torch.empty(0)
        self._event: Any = None
        if on_device:
            # One copy for all; doubles hold every narrower number exactly.
            stacked = torch.stack([v.detach().double().reshape(()) for v in on_device.values()])
            self._copy = torch.empty(len(on_device), dtype=torch.float64, pin_memory=True)
            self._copy.copy_(stacked, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(stacked.device))

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> dict[str, float]:
        """In the order they were given; waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        values = self._values | dict(zip(self._names, self._copy.tolist(), strict=True))
        return {name: values[name] for name in self._order}


class MetricsMailbox:
    """Every rank leaves its numbers of a logging step; rank 0 takes them once all have arrived.

    Nobody waits: an early stage may be several steps ahead of the last one, and a collective
    here would flush the pipeline. Nor is the device waited for: what is still being computed is
    sent at a later ``poll``, which every rank therefore calls. The words go through the rendezvous
    store, not through the boundaries, so they never stand in an activation's way.
    """

    def __init__(self, mesh: Mesh, *, name: str = "metrics") -> None:
        self._mesh, self._name = mesh, name
        self._store = _get_default_store()
        self._pending: list[int] = []
        self._leaving: collections.deque[tuple[int, _Leaving]] = collections.deque()

    def _key(self, step: int, rank: int) -> str:
        return f"scpl/{self._name}/{step}/{rank}"

    def post(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Leave this rank's numbers for ``step`` (numbers, or tensors of one element); every rank
        posts the same steps in order."""
        self._leaving.append((step, _Leaving(values)))
        if self._mesh.rank == 0:
            self._pending.append(step)
        self._send()

    def flush(self) -> None:
        """Send what is left, waiting for the device: before an evaluation and at the end."""
        self._send(wait=True)

    def _send(self, *, wait: bool = False) -> None:
        while self._leaving and (wait or self._leaving[0][1].arrived()):
            step, values = self._leaving.popleft()
            self._store.set(self._key(step, self._mesh.rank), json.dumps(values.read()))

    def poll(self) -> list[tuple[int, dict[str, float]]]:
        """On rank 0: the steps that have reached every rank since the last call, in order.

        A name that several ranks posted (the data-parallel ranks of one stage) is their mean;
        a peak (``..peak..``) is their maximum.
        """
        self._send()
        arrived: list[tuple[int, dict[str, float]]] = []
        while self._pending:
            keys = [self._key(self._pending[0], rank) for rank in range(self._mesh.world_size)]
            if not self._store.check(keys):
                break
            arrived.append((self._pending.pop(0), self._merge(keys)))
        return arrived

    def _merge(self, keys: list[str]) -> dict[str, float]:
        seen: dict[str, list[float]] = {}
        for key in keys:
            for name, value in json.loads(self._store.get(key)).items():
                seen.setdefault(name, []).append(value)
            self._store.delete_key(key)
        return {
            name: max(values) if "peak" in name else sum(values) / len(values)
            for name, values in seen.items()
        }


def barrier(mesh: Mesh) -> None:
    """Wait until every rank is here. Only outside the training loop: it flushes the pipeline."""
    with lost_rank_is_named(mesh, "wait for the other ranks"):
        dist.barrier(group=mesh.control_group)


def broadcast_object(mesh: Mesh, value: Any, *, source: int = 0) -> Any:
    """``value`` of rank ``source`` on every rank (waits). Only for plain data of our own ranks."""
    box = [value]
    dist.broadcast_object_list(box, src=source, group=mesh.control_group)
    return box[0]


def gather_objects(mesh: Mesh, value: Any) -> list[Any]:
    """Every rank's ``value``, in rank order, on every rank (waits)."""
    box: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(box, value, group=mesh.control_group)
    return box


@contextlib.contextmanager
def lost_rank_is_named(mesh: Mesh, doing: str) -> Iterator[None]:
    """Around collectives of a stage: a failure becomes a ``BoundaryError`` that says what this rank
    was ``doing`` and with whom."""
    try:
        yield
    except RuntimeError as error:
        raise BoundaryError(
            f"rank {mesh.rank} could not {doing} with ranks {mesh.stage_ranks} of its "
            f"stage: one is no longer running or is stuck; its own log says why. "
            f"[{str(error).strip().splitlines()[0]}]"
        ) from error


def sum_over_stages(mesh: Mesh, value: float) -> float:
    """Sum over the pipeline ranks of a number that data-parallel ranks agree on (waits)."""
    box = torch.tensor(value, dtype=torch.float64)
    with lost_rank_is_named(mesh, "agree on the norm of the gradients"):
        dist.all_reduce(box, group=mesh.control_group)
    return float(box) / mesh.dp_size


def broadcast(tensors: Iterable[Tensor], mesh: Mesh) -> None:
    """Make tensors those of the stage's first data-parallel rank, in place: ranks whose scripts
    drew other weights would train other models without a word.

    Raises:
        BoundaryError: A rank of the stage is gone or late.
    """
    if mesh.dp_size == 1:
        return
    with lost_rank_is_named(mesh, "agree on the starting weights"):
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=mesh.stage_ranks[0], group=mesh.dp_group)


def rows_of_last_rank(mesh: Mesh, rows: Tensor | None) -> Tensor:
    """What this lane's last rank has, [n, E] float32 on the CPU, on every rank of the lane (waits);
    ``rows`` is None on ranks before."""
    if mesh.pp_size == 1:
        assert rows is not None
        return rows
    shapes = gather_objects(mesh, None if rows is None else tuple(rows.shape))
    last = mesh.rank_of(mesh.pp_size - 1, mesh.dp_rank)
    with lost_rank_is_named(mesh, "pass on what the last stage computes"):
        if rows is None:
            rows = torch.empty(shapes[last])
            dist.recv(rows, last, group=mesh.control_group)
        else:
            for pp_rank in range(mesh.pp_size - 1):
                target = mesh.rank_of(pp_rank, mesh.dp_rank)
                dist.send(rows.contiguous(), target, group=mesh.control_group)
    return rows


def first_ranks_values(mesh: Mesh, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU as the stage's first data-parallel rank has them: processors differ."""
    found = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if mesh.dp_size > 1:
        with lost_rank_is_named(mesh, "agree on the local head"):
            for tensor in found.values():
                dist.broadcast(tensor, src=mesh.stage_ranks[0], group=mesh.dp_control_group)
    return found


def add_up_stage(mesh: Mesh, tensors: Iterable[Tensor]) -> None:
    """Sum tensors on the CPU over the data-parallel ranks of this stage, in place."""
    if mesh.dp_size == 1:
        return
    with lost_rank_is_named(mesh, "add up"):
        for tensor in tensors:
            dist.all_reduce(tensor, group=mesh.dp_control_group)


MESSAGE_ELEMENTS = 8 * 2**20
"""Gradients of one message: enough to hide its latency, little beside a stage."""


def average_gradients(parameters: Sequence[torch.nn.Parameter], mesh: Mesh) -> None:
    """Average ``.grad`` over the data-parallel ranks of this stage, in a few flat messages.

    Every rank passes the same parameters. One that got no gradient here but did on another rank (a
    skipped layer, an expert without tokens) counts as zeros; one that got none anywhere keeps None.

    Raises:
        BoundaryError: A rank of the stage is gone or late.
    """
    if mesh.dp_size == 1:
        return
    seen = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    with lost_rank_is_named(mesh, "average gradients"):
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=mesh.dp_control_group)
        used = [p for p, anywhere in zip(parameters, seen.tolist(), strict=True) if anywhere]
        for bucket in _buckets(used):
            flat = torch.cat([_gradient(p).reshape(-1) for p in bucket])
            dist.all_reduce(flat, group=mesh.dp_group)
            flat /= mesh.dp_size
            averaged = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, averaged, strict=True):
                # Into the old memory, so that the message can be freed.
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view_as(parameter))


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one dtype, up to ``MESSAGE_ELEMENTS`` elements (or one larger parameter)."""
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        full = sum(p.numel() for p in bucket) + parameter.numel() > MESSAGE_ELEMENTS
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
