"""How messages move from one pipeline rank to the next: ``scpl.transport``."""

from __future__ import annotations

import collections
import contextlib
import datetime
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.messages import (
    HEADER_LIMIT,
    Layout,
    aligned,
    fill,
    lay_out,
    read_header,
    size_of,
    write_header,
)
from scpl_ds.errors import RecipeError

Transport = Literal["auto", "nccl", "gloo"]

_FIRST_ROOM = 64 * 1024
"""Bytes of a posted receive before anything larger has come."""
_HEAD_ROOM = aligned(HEADER_LIMIT) + 64
_POLL_S = 1e-3


class LinkLost(Exception):
    """The neighbour is gone, or has been silent for too long."""


@contextlib.contextmanager
def _neighbour() -> Iterator[None]:
    """Around what talks to the neighbour, and nothing else: a device out of memory is no neighbour
    that has gone."""
    try:
        yield
    except RuntimeError as error:
        raise LinkLost(str(error).strip().partition("\n")[0]) from error


class Outgoing:
    """A message on its way; holds its memory until it has been taken."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.pieces: list[tuple[Tensor, int]] = []
        """Host memory and the tag it goes under; still to be posted while ``works`` is short."""
        self.works: list[Any] = []
        self.ready: Any = None
        """CUDA event after which the pieces hold what is to be sent."""
        self.gone: Any = None
        """CUDA event after which a device buffer has been sent, and that buffer."""


class GlooLink:
    """Through host memory, over gloo.

    The receiver has posted its next receive before it computes on what it took, so that a message
    moves behind the computation: gloo sends nothing before. Its size is not known then. Gloo lets a
    message be shorter than the receive, so the receive has room for the largest message so far;
    both ends know how large that was, and a larger one goes apart, announced by its header.

    Tensors of a CUDA device go through pinned memory, copied on a stream of their own; the host
    sends them at the next ``flush``, which waits for the copy: call it once more work has been
    queued on the device.

    Args:
        mesh: Who the neighbours are.
        device: Where the tensors are, and are to be.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._group = mesh.boundary_group
        # Another engine over the same mesh must not take this one's messages.
        number = mesh.new_channel_number()
        self._tag, self._apart_tag = 2 * number, 2 * number + 1
        self._cuda = device.type == "cuda"
        # One each way: what arrives must not queue behind what nobody has taken yet.
        self._outward = torch.cuda.Stream(device) if self._cuda else None
        self._inward = torch.cuda.Stream(device) if self._cuda else None
        self._room_out = self._room_in = _FIRST_ROOM
        self._posted: tuple[Any, Tensor] | None = None
        self._waiting: collections.deque[Outgoing] = collections.deque()

    # -- sending ---------------------------------------------------------------------------

    def send(self, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Outgoing:
        """Copy a message and start it on its way, without waiting for the receiver.

        Raises:
            LinkLost: The receiver is gone.
        """
        out = Outgoing(what)
        layout = lay_out(tensors)
        size = size_of(layout)
        head = write_header({**header, "layout": layout})
        total = len(head) + size
        if size == 0:
            out.pieces = [(head, self._tag)]
        elif total <= self._room_out:
            message = self._host_memory(total)
            message[: len(head)] = head
            self._copy_out(out, message[len(head) :], layout, tensors)
            out.pieces = [(message, self._tag)]
        else:
            payload = self._host_memory(size)
            self._copy_out(out, payload, layout, tensors)
            out.pieces = [(head, self._tag), (payload, self._apart_tag)]
            self._room_out = _HEAD_ROOM + size
        self._waiting.append(out)
        if not self._cuda or size == 0:
            self.flush()
        return out

    def flush(self) -> None:
        """Post what is ready, in order; waits for copies from the device.

        Raises:
            LinkLost: The receiver is gone.
        """
        while self._waiting:
            out = self._waiting.popleft()
            if out.ready is not None:
                out.ready.synchronize()
            with _neighbour():
                for piece, tag in out.pieces:
                    peer = self._mesh.next_rank
                    out.works.append(dist.isend(piece, peer, group=self._group, tag=tag))

    def forget(self) -> None:
        """Drop what is not on its way yet: the device has failed, and would fail again."""
        self._waiting.clear()

    def wait(self, out: Outgoing, timeout: datetime.timedelta) -> None:
        """Until the receiver has taken it.

        Raises:
            LinkLost: It is gone, or has not within ``timeout``.
        """
        self.flush()
        with _neighbour():
            for work in out.works:
                work.wait(timeout)

    def _host_memory(self, nbytes: int) -> Tensor:
        # torch keeps pinned blocks for the next message, and waits for copies out of them.
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._cuda)

    def _copy_out(
        self, out: Outgoing, payload: Tensor, layout: Layout, tensors: Mapping[str, Tensor]
    ) -> None:
        with self._on_its_way():
            fill(payload, layout, tensors)
        if self._outward is not None:
            for tensor in tensors.values():
                if tensor.is_cuda:
                    tensor.record_stream(self._outward)
            out.ready = self._outward.record_event()

    @contextlib.contextmanager
    def _on_its_way(self) -> Iterator[None]:
        """The stream of what leaves, behind what has been queued on the current one."""
        if self._outward is None:
            yield
            return
        self._outward.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._outward):
            yield

    # -- receiving -------------------------------------------------------------------------

    def receive(self, timeout: datetime.timedelta) -> tuple[dict[str, Any], Tensor]:
        """The next message: its header, and its payload where the stages compute.

        Posts the receive of the message after it before it returns.

        Raises:
            LinkLost: The sender is gone, or silent for ``timeout``.
        """
        work, message = self._posted or self._post()
        self._posted = None
        with _neighbour():
            work.wait(timeout)
        header, rest = read_header(message)
        size = size_of(header["layout"])
        if size > len(rest):
            rest = self._host_memory(size)
            work = self._irecv(rest, self._apart_tag)
            self._room_in = _HEAD_ROOM + size
            self._post_ahead()
            with _neighbour():
                work.wait(timeout)
        else:
            self._post_ahead()
        return header, self._copy_in(rest[:size])

    def _post_ahead(self) -> None:
        """A sender that has sent its last word may have gone; what it sent has still arrived."""
        with contextlib.suppress(LinkLost):
            self._posted = self._post()

    def _post(self) -> tuple[Any, Tensor]:
        room = self._host_memory(self._room_in)
        return self._irecv(room, self._tag), room

    def _irecv(self, room: Tensor, tag: int) -> Any:
        with _neighbour():
            return dist.irecv(room, self._mesh.previous_rank, group=self._group, tag=tag)

    def _copy_in(self, payload: Tensor) -> Tensor:
        if self._inward is None:
            return payload
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inward):
            moved = payload.to(self._device, non_blocking=True)
        current.wait_stream(self._inward)
        moved.record_stream(current)
        return moved


class NcclLink(GlooLink):
    """From device to device over NCCL, on a stream of its own; headers over gloo, in parallel.

    The communicators are made here, in the order of the boundaries. Not yet run on a machine with
    two GPUs: ``docs/benchmarks.md`` says what has been.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        super().__init__(mesh, device)
        self._payloads = mesh.new_group(None, backend="nccl")
        hello = torch.zeros(1, device=device)
        for boundary in range(mesh.pp_size - 1):
            if mesh.pp_rank == boundary:
                dist.send(hello, mesh.next_rank, group=self._payloads)
            elif mesh.pp_rank == boundary + 1:
                dist.recv(hello, mesh.previous_rank, group=self._payloads)
        torch.cuda.synchronize(device)

    def send(self, what: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Outgoing:
        layout = lay_out(tensors)
        out = super().send(what, {**header, "device_layout": layout}, {})
        if layout:
            payload = torch.empty(size_of(layout), dtype=torch.uint8, device=self._device)
            fill(payload, layout, tensors)
            with self._on_its_way(), _neighbour():
                work = dist.isend(payload, self._mesh.next_rank, group=self._payloads)
                assert work is not None and self._outward is not None
                work.wait()  # this stream waits, not the host
                out.gone = self._outward.record_event(), payload
        return out

    def wait(self, out: Outgoing, timeout: datetime.timedelta) -> None:
        super().wait(out, timeout)
        deadline = time.monotonic() + timeout.total_seconds()
        while out.gone is not None and not out.gone[0].query():
            if time.monotonic() > deadline:
                raise LinkLost(f"NCCL has not sent it within {timeout.total_seconds():.0f} s")
            time.sleep(_POLL_S)

    def receive(self, timeout: datetime.timedelta) -> tuple[dict[str, Any], Tensor]:
        header, payload = super().receive(timeout)
        header["layout"] = header.pop("device_layout", header["layout"])
        if not header["layout"] or self._inward is None:
            return header, payload
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._inward), _neighbour():
            payload = torch.empty(size_of(header["layout"]), dtype=torch.uint8, device=self._device)
            work = dist.irecv(payload, self._mesh.previous_rank, group=self._payloads)
            assert work is not None
            work.wait()
        current.wait_stream(self._inward)
        payload.record_stream(current)
        return header, payload


def make_link(transport: Transport, mesh: Mesh, device: torch.device) -> GlooLink:
    """The link that ``scpl.transport`` asks for; ``auto`` is gloo until NCCL has been run between
    two GPUs. Every rank must call it (NCCL makes its communicators).

    Raises:
        RecipeError: NCCL, where it cannot work.
    """
    if transport != "nccl":
        return GlooLink(mesh, device)
    if not mesh.has_nccl:
        found = "ranks share a GPU" if device.type == "cuda" else f"the device is '{device.type}'"
        raise RecipeError(
            f"scpl.transport: nccl needs a CUDA device of its own for every rank, but {found}. Use "
            "scpl.transport: auto or gloo."
        )
    return (NcclLink if mesh.pp_size > 1 else GlooLink)(mesh, device)
