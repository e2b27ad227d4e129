"""One message per micro-batch per boundary, forward only, checked on arrival."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import logging
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.distributed.coding import Coded, decode, encode, round_trip
from scpl_ds.distributed.links import LinkLost, Outgoing, Transport, make_link
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.messages import views
from scpl_ds.errors import BoundaryError

log = logging.getLogger(__name__)

_LAST_WORDS = datetime.timedelta(seconds=30)
_SCALE = "scale"

_untaken: list[collections.deque[Outgoing]] = []
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
    been taken yet, which is the back-pressure that bounds memory. The receiver takes one message
    ahead of the one it computes on. The header says which step, micro-batch and batch this is: a
    mismatch is a ``BoundaryError``, never a loss computed with somebody else's labels.

    Shapes may change from one micro-batch to the next.

    Args:
        mesh: Who the neighbours are.
        device: Where the stages compute.
        max_in_flight: Messages that may wait to be taken.
        transport: ``scpl.transport``.
        boundary_dtype: ``scpl.boundary_dtype``: hidden states of training micro-batches travel in
            it. Those of an evaluation travel as they are, so that what is evaluated is the model
            that will be exported.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        *,
        max_in_flight: int,
        transport: Transport = "auto",
        boundary_dtype: str | None = None,
    ) -> None:
        self.bytes_sent = 0
        """Bytes of hidden states, ids, masks and labels that this rank has sent."""
        self._mesh = mesh
        self._link = make_link(transport, mesh, device)
        self._limit, self._code = max_in_flight, boundary_dtype
        self._in_flight: collections.deque[Outgoing] = collections.deque()
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
        header: dict[str, Any] = {"kind": "data", "phase": phase, "tag": list(batch.tag)}
        if self._code is None or phase != "train":
            tensors["hidden_states"] = batch.hidden_states
        else:
            header["dtype"] = str(batch.hidden_states.dtype).removeprefix("torch.")
            tensors["hidden_states"], scale = encode(batch.hidden_states, self._code)
            if scale is not None:
                tensors[_SCALE] = scale
        while len(self._in_flight) >= self._limit:
            self._wait_for_oldest()
        self._post(f"micro-batch {batch.tag.micro_batch} of step {batch.tag.step}", header, tensors)
        self.bytes_sent += sum(t.numel() * t.element_size() for t in tensors.values())

    def flush(self) -> None:
        """Start what waits for the device on its way; to be called when the device has been given
        more to do, for it may wait. Nothing to do on a CPU."""
        try:
            self._link.flush()
        except LinkLost as error:
            raise self._broken("could not send to", self._mesh.next_rank, error) from error

    def across(self, batch: MicroBatch) -> MicroBatch:
        """``batch`` as the next stage gets it although it is on this rank: rounded as if it had
        travelled, so that the numbers do not depend on how many ranks there are."""
        if self._code is None or batch.hidden_states is None:
            return batch
        hidden = round_trip(batch.hidden_states, self._code)
        return dataclasses.replace(batch, hidden_states=hidden)

    def send_end(self) -> None:
        """Tell the next pipeline rank that there is no more data."""
        if self._mesh.next_rank is not None:
            self._post("the end of the data", {"kind": "end"}, {})

    def send_error(self, message: str) -> None:
        """Tell the next pipeline rank why nothing more will come, and wait until it has heard, 30 s
        at most. Never raises."""
        if self._mesh.next_rank is None:
            return
        try:
            self._link.forget()
            self._post("an error", {"kind": "error", "message": message[:2000]}, {})
            # Gloo forgets what is not taken when this process ends, and the peer may be computing.
            self._timeout = min(self._timeout, _LAST_WORDS)
            self.drain()
        except (RuntimeError, BoundaryError) as error:
            log.debug("could not pass the error on: %s", error)

    def drain(self) -> None:
        """Wait until every message sent so far has been taken (before eval, save and exit)."""
        while self._in_flight:
            self._wait_for_oldest()

    def _post(self, what: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            self._in_flight.append(self._link.send(what, header, tensors))
        except LinkLost as error:
            raise self._broken(f"could not send {what} to", self._mesh.next_rank, error) from error

    def _wait_for_oldest(self) -> None:
        oldest = self._in_flight[0]
        began = time.monotonic()
        try:
            self._link.wait(oldest, self._timeout)
        except LinkLost as error:
            raise self._broken(
                f"waited {time.monotonic() - began:.0f} s for {oldest.what} to be taken by",
                self._mesh.next_rank,
                error,
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
        began = time.monotonic()
        try:
            header, payload = self._link.receive(self._timeout)
        except LinkLost as error:
            waited = time.monotonic() - began
            raise self._broken(f"waited {waited:.0f} s for {what} from", peer, error) from error
        if header["kind"] == "end":
            raise EndOfData
        if header["kind"] == "error":
            raise BoundaryError(
                f"{self._me()} got no {what}: rank {peer} before it failed with: "
                f"{header['message']}"
            )
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
        return _unpack(header, payload, tag)

    def reset(self, phase: str) -> None:
        """Forget the running batch number of ``phase`` (a new evaluation, a restored position)."""
        self._last_batch_id.pop(phase, None)

    # -- words -----------------------------------------------------------------------------

    def _me(self) -> str:
        return f"pipeline rank {self._mesh.pp_rank} (rank {self._mesh.rank})"

    def _broken(self, did: str, peer: int | None, cause: Exception) -> BoundaryError:
        return BoundaryError(
            f"{self._me()} {did} rank {peer}, which is no longer running or is stuck; "
            f"its own log says why. [{cause}]"
        )


def _unpack(header: dict[str, Any], payload: Tensor, tag: Tag) -> MicroBatch:
    tensors = views(payload, header["layout"])
    hidden, scale = tensors.pop("hidden_states"), tensors.pop(_SCALE, None)
    if "dtype" in header:
        hidden = decode(Coded(hidden, scale), getattr(torch, header["dtype"]))
    parts: dict[str, dict[str, Tensor]] = {"inputs": {}, "extras": {}}
    for name, tensor in tensors.items():
        room, _, key = name.partition("/")
        # Hidden states are let go of before the rest, and must not stay with it.
        parts[room][key] = tensor.clone()
    return MicroBatch(parts["inputs"], tag, hidden, parts["extras"])
