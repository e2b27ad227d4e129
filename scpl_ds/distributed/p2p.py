"""One message per micro-batch per boundary, forward only: a checked header, then one flat
payload."""

from __future__ import annotations

import collections
import datetime
import json
import logging
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import BoundaryError

log = logging.getLogger(__name__)

HEADER_BYTES = 4096
_LAST_WORDS = datetime.timedelta(seconds=30)
_ALIGN = 64  # every tensor starts on a cache line, so that a view of any dtype is legal
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.bfloat16, torch.float16,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    )
}  # fmt: skip


_untaken: list[collections.deque[tuple[str, list[Any], list[Tensor]]]] = []
"""Messages on their way, of every channel: gloo drops one whose buffer nobody holds, and an engine
may be forgotten before its last message has been taken."""


class Expected(NamedTuple):
    """What the receiver is about to compute, compared with what the header says."""

    phase: str
    """``train`` or ``eval``."""
    step: int
    micro_batch: int


class EndOfData(Exception):
    """The first stage's data ended; passed on from stage to stage so that nobody waits for more."""


class BoundaryChannel:
    """The boundary between this rank and its two neighbours in the pipeline.

    A send returns at once; it is waited for only when ``max_in_flight`` earlier messages have not
    been taken yet, which is the back-pressure that bounds memory. (Gloo starts to move a message
    once the receiver has posted its receive, so an untaken message costs the sender its buffer.)
    The header goes first, over the CPU, and says which step, micro-batch and batch this is: a
    mismatch is a ``BoundaryError``, never a loss computed with somebody else's labels.

    Shapes may change from one micro-batch to the next.
    """

    def __init__(self, mesh: Mesh, device: torch.device, *, max_in_flight: int) -> None:
        self._mesh, self._device = mesh, device
        self._group = mesh.boundary_group
        self._limit = max_in_flight
        self._in_flight: collections.deque[tuple[str, list[Any], list[Tensor]]] = (
            collections.deque()
        )
        _untaken[:] = [messages for messages in _untaken if messages]
        _untaken.append(self._in_flight)
        self._last_batch_id: dict[str, int] = {}
        self._timeout = datetime.timedelta(seconds=mesh.timeout_s)

    # -- sending ---------------------------------------------------------------------------

    def send(self, batch: MicroBatch, phase: str) -> None:
        """Hand ``batch`` to the next pipeline rank without waiting for it to be taken."""
        tensors = {f"inputs/{k}": v for k, v in batch.inputs.items()}
        tensors |= {f"extras/{k}": v for k, v in batch.extras.items()}
        assert batch.hidden_states is not None, "only a computed micro-batch crosses a boundary"
        tensors["hidden_states"] = batch.hidden_states
        layout, payload = _pack(tensors)
        header = {"kind": "data", "phase": phase, "tag": list(batch.tag), "layout": layout}
        while len(self._in_flight) >= self._limit:
            self._wait_for_oldest()
        self._post(f"micro-batch {batch.tag.micro_batch} of step {batch.tag.step}", header, payload)

    def send_end(self) -> None:
        """Tell the next pipeline rank that there is no more data."""
        if self._mesh.next_rank is not None:
            self._post("the end of the data", {"kind": "end"}, None)

    def send_error(self, message: str) -> None:
        """Tell the next pipeline rank why nothing more will come, and wait until it has heard, 30 s
        at most. Never raises."""
        if self._mesh.next_rank is None:
            return
        try:
            self._post("an error", {"kind": "error", "message": message[:2000]}, None)
            # Gloo forgets what is not taken when this process ends, and the peer may be computing.
            self._timeout = min(self._timeout, _LAST_WORDS)
            self.drain()
        except (RuntimeError, BoundaryError) as error:
            log.debug("could not pass the error on: %s", error)

    def drain(self) -> None:
        """Wait until every message sent so far has been taken (before eval, save and exit)."""
        while self._in_flight:
            self._wait_for_oldest()

    def _post(self, what: str, header: dict[str, Any], payload: Tensor | None) -> None:
        head = _encode(header)
        peer = self._mesh.next_rank
        works, tensors = [], [head] if payload is None else [head, payload]
        for tensor in tensors:
            try:
                works.append(dist.isend(tensor, peer, group=self._group))
            except RuntimeError as error:
                raise self._broken(f"could not send {what} to", peer, error) from error
        self._in_flight.append((what, works, tensors))

    def _wait_for_oldest(self) -> None:
        what, works, _ = self._in_flight[0]
        began = time.monotonic()
        for work in works:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                waited = time.monotonic() - began
                raise self._broken(
                    f"waited {waited:.0f} s for {what} to be taken by", self._mesh.next_rank, error
                ) from error
        self._in_flight.popleft()

    # -- receiving -------------------------------------------------------------------------

    def receive(self, expected: Expected) -> MicroBatch:
        """The next micro-batch from the previous pipeline rank.

        Raises:
            EndOfData: The first stage has no more data.
            BoundaryError: The peer is gone, failed, late, or sent another micro-batch.
        """
        peer = self._mesh.previous_rank
        what = f"micro-batch {expected.micro_batch} of {expected.phase} step {expected.step}"
        header = _decode(self._read(torch.empty(HEADER_BYTES, dtype=torch.uint8), what))
        if header["kind"] == "end":
            raise EndOfData
        if header["kind"] == "error":
            raise BoundaryError(
                f"{self._me()} got no {what}: rank {peer} before it failed with: "
                f"{header['message']}"
            )
        layout = header["layout"]
        size = layout[-1][3] + layout[-1][4]
        # Taken before it is judged: the sender must not be left waiting for a refused message.
        payload = self._read(torch.empty(size, dtype=torch.uint8), what)
        tag = Tag(*header["tag"])
        found = Expected(header["phase"], tag.step, tag.micro_batch)
        last = self._last_batch_id.get(found.phase)
        if found != expected or (last is not None and tag.batch_id != last + 1):
            raise BoundaryError(
                f"{self._me()} expected {what} (batch {'any' if last is None else last + 1}) from "
                f"rank {peer}, but micro-batch {found.micro_batch} of {found.phase} step "
                f"{found.step} (batch {tag.batch_id}) arrived. The ranks no longer run the same "
                "steps: check that every rank calls train_batch and eval_batch equally often."
            )
        self._last_batch_id[found.phase] = tag.batch_id
        return _unpack(layout, payload, tag).to(self._device)

    def reset(self, phase: str) -> None:
        """Forget the running batch number of ``phase`` (a new evaluation, a restored position)."""
        self._last_batch_id.pop(phase, None)

    def _read(self, buffer: Tensor, what: str) -> Tensor:
        peer = self._mesh.previous_rank
        began = time.monotonic()
        try:
            work = dist.irecv(buffer, peer, group=self._group)
            assert work is not None
            work.wait(self._timeout)
        except RuntimeError as error:
            waited = time.monotonic() - began
            raise self._broken(f"waited {waited:.0f} s for {what} from", peer, error) from error
        return buffer

    # -- words -----------------------------------------------------------------------------

    def _me(self) -> str:
        return f"pipeline rank {self._mesh.pp_rank} (rank {self._mesh.rank})"

    def _broken(self, did: str, peer: int | None, cause: Exception) -> BoundaryError:
        return BoundaryError(
            f"{self._me()} {did} rank {peer}, which is no longer running or is stuck; "
            f"its own log says why. [{str(cause).strip().splitlines()[0]}]"
        )


def _pack(tensors: dict[str, Tensor]) -> tuple[list[list[Any]], Tensor]:
    """Copy tensors behind each other into one byte buffer on the CPU, with a table of what is
    where."""
    layout: list[list[Any]] = []
    offset = 0
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise BoundaryError(
                f"'{name}' is {tensor.dtype}, which cannot cross a stage boundary. "
                f"Convert it to one of {', '.join(_DTYPES)}."
            )
        nbytes = tensor.numel() * tensor.element_size()
        layout.append([name, dtype, list(tensor.shape), offset, nbytes])
        offset = -(-(offset + nbytes) // _ALIGN) * _ALIGN
    payload = torch.empty(layout[-1][3] + layout[-1][4], dtype=torch.uint8)
    for (_, _, _, start, nbytes), tensor in zip(layout, tensors.values(), strict=True):
        flat = tensor.detach().contiguous().reshape(-1)
        payload[start : start + nbytes].copy_(flat.view(torch.uint8) if nbytes else flat.byte())
    return layout, payload


def _unpack(layout: list[list[Any]], payload: Tensor, tag: Tag) -> MicroBatch:
    parts: dict[str, dict[str, Tensor]] = {"inputs": {}, "extras": {}}
    hidden_states = None
    for name, dtype, shape, start, nbytes in layout:
        tensor = payload[start : start + nbytes].view(_DTYPES[dtype]).reshape(shape)
        room, _, key = name.partition("/")
        if room == "hidden_states":
            hidden_states = tensor
        else:
            parts[room][key] = tensor
    return MicroBatch(parts["inputs"], tag, hidden_states, parts["extras"])


def _encode(header: dict[str, Any]) -> Tensor:
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > HEADER_BYTES:
        raise BoundaryError(
            f"The header of a micro-batch takes {len(text)} bytes, more than {HEADER_BYTES}: "
            "it carries too many tensors. Drop columns that no stage needs."
        )
    return torch.frombuffer(bytearray(text.ljust(HEADER_BYTES)), dtype=torch.uint8)


def _decode(buffer: Tensor) -> dict[str, Any]:
    return json.loads(buffer.numpy().tobytes())
