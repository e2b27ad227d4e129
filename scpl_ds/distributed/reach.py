"""What ranks can say to each other, and how fast: ``scpl-ds doctor`` under a launcher."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh

MESSAGE_BYTES = 4 * 2**20
_REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Link:
    """What was measured between two ranks, over gloo on the CPU as boundaries may use it."""

    source: int
    target: int
    latency_us: float
    """There and back, halved: the fastest of 5."""
    mib_per_s: float
    """Of messages of 4 MiB one after the other: the median of 5."""


@dataclasses.dataclass(frozen=True)
class Sum:
    """An all-reduce of 4 MiB over all ranks."""

    backend: str
    milliseconds: float
    """Median of 5."""


def all_reduce(mesh: Mesh, *, cuda: bool = False) -> Sum:
    """Sum a tensor over all ranks and look at the result (waits for all).

    Args:
        mesh: Of all ranks.
        cuda: On this rank's device over NCCL; else on the CPU over gloo.

    Raises:
        RuntimeError: A rank cannot be reached, or the sum is wrong.
    """
    device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu"
    group = dist.group.WORLD if cuda else mesh.control_group
    times = []
    for _ in range(_REPEATS + 1):
        box = torch.full((MESSAGE_BYTES // 4,), float(mesh.rank + 1), device=device)
        _finish(device)
        started = time.perf_counter()
        dist.all_reduce(box, group=group)
        _finish(device)
        times.append(time.perf_counter() - started)
        wanted = mesh.world_size * (mesh.world_size + 1) / 2
        found = (float(box.min()), float(box.max()))
        if found != (wanted, wanted):
            raise RuntimeError(f"the sum over ranks is {found}, not {wanted}")
    return Sum("nccl" if cuda else "gloo", 1e3 * statistics.median(times[1:]))


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def neighbours(mesh: Mesh) -> list[Link]:
    """A message from every rank to the next and back; all ranks get all the figures.

    Raises:
        RuntimeError: A rank cannot be reached, or got another message.
    """
    own: list[Link] = []
    last = mesh.world_size - 1
    for parity in (0, 1):  # a rank talks to one neighbour at a time
        for first in range(parity, last, 2):
            if mesh.rank in (first, first + 1):
                found = _measure(mesh, first, first + 1)
                own += [found] if found is not None else []
        dist.barrier(group=mesh.control_group)
    links = [Link(**link) for part in _gathered(mesh, own) for link in part]
    return sorted(links, key=lambda link: link.source)


def _gathered(mesh: Mesh, own: list[Link]) -> list[list[dict[str, Any]]]:
    return gather_objects(mesh, [dataclasses.asdict(link) for link in own])


def _measure(mesh: Mesh, source: int, target: int) -> Link | None:
    """On both ranks; the figures are those of ``source``."""
    small = _exchanges(mesh, source, target, torch.zeros(1), 4 * _REPEATS)
    large = _exchanges(mesh, source, target, torch.arange(MESSAGE_BYTES // 4).float(), _REPEATS)
    if mesh.rank != source:
        return None
    seconds = statistics.median(large) / 2
    return Link(source, target, 1e6 * min(small) / 2, MESSAGE_BYTES / 2**20 / seconds)


def _exchanges(
    mesh: Mesh, source: int, target: int, message: torch.Tensor, repeats: int
) -> list[float]:
    """Seconds there and back."""
    times = []
    for _ in range(repeats + 1):
        box = torch.empty_like(message)
        started = time.perf_counter()
        if mesh.rank == source:
            dist.send(message, target, group=mesh.boundary_group)
            dist.recv(box, target, group=mesh.boundary_group)
        else:
            dist.recv(box, source, group=mesh.boundary_group)
            dist.send(box, source, group=mesh.boundary_group)
        times.append(time.perf_counter() - started)
        if not torch.equal(box, message):
            raise RuntimeError(f"a message between ranks {source} and {target} came back changed")
    return times[1:]


def clock_differences(mesh: Mesh, now: Callable[[], float] = time.time) -> list[float]:
    """How far every rank's clock is ahead of rank 0's, in seconds, on every rank (waits for all).

    As good as half of the fastest answer, usually under a millisecond.
    """
    found = [0.0] * mesh.world_size
    box = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, mesh.world_size):
        if mesh.rank not in (0, rank):
            continue
        best = float("inf")
        for _ in range(_REPEATS):
            if mesh.rank == rank:
                dist.recv(box, 0, group=mesh.boundary_group)
                box[0] = now()
                dist.send(box, 0, group=mesh.boundary_group)
                continue
            asked = now()
            dist.send(box, rank, group=mesh.boundary_group)
            dist.recv(box, rank, group=mesh.boundary_group)
            answered = now()
            if answered - asked < best:
                best, found[rank] = answered - asked, float(box) - (asked + answered) / 2
    answer = torch.tensor(found, dtype=torch.float64)
    dist.broadcast(answer, src=0, group=mesh.control_group)
    return answer.tolist()
