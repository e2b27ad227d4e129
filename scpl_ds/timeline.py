"""What a rank does at every moment of a run: computing, waiting for its neighbours, or neither."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch

Kind = Literal["data", "receive", "forward", "send", "backward", "step", "sync"]
KINDS: tuple[Kind, ...] = ("data", "receive", "forward", "send", "backward", "step", "sync")
ON_DEVICE: frozenset[Kind] = frozenset({"forward", "backward", "step"})


class Span(NamedTuple):
    """One action of one rank, placed in time."""

    kind: Kind
    stage: int
    """-1 for what belongs to the rank and not to one of its stages."""
    step: int
    micro_batch: int
    """-1 for an optimizer step."""
    start: float
    """Seconds of the process's monotonic clock, which all processes of one machine share."""
    end: float


class _Unread(NamedTuple):
    """A span of a CUDA rank; ``first`` and ``last`` are events of an action on the device."""

    span: Span
    keep: bool
    first: Any = None
    last: Any = None


class Timeline:
    """Times the actions of one rank: their sums always, each of them while it is asked to.

    Host time on a CPU. On a CUDA device the host runs ahead: forward, backward and step are timed
    by events there, which are read once they have passed, and of the host's own time (data,
    receive, send) only that counts in which the device had nothing to do. Nothing here waits for
    the device, except the first action after ``restart`` or ``pause`` (where the two clocks meet)
    and whoever asks for everything.

    Args:
        keep: Keep every action, for a trace: a few hundred bytes each. May be set at any time.
        device: Where the stages compute.
        clock: Seconds, monotonic; a test passes its own.
    """

    def __init__(
        self,
        *,
        keep: bool = False,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keep = keep
        self._clock = clock
        self._cuda = device if device is not None and device.type == "cuda" else None
        self.restart()

    def restart(self) -> None:
        """Forget everything and start counting now."""
        self._seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._spans: list[Span] = []
        self._paused = 0.0
        self._began = self._read_until = self._clock()
        # Of a CUDA device only:
        self._unread: collections.deque[_Unread] = collections.deque()
        self._computing: collections.deque[Span] = collections.deque()
        self._event: Any = None
        self._anchor: tuple[float, Any] | None = None

    def begin(self, kind: Kind) -> float:
        """An action begins now; hand what this returns to ``end``."""
        if self._cuda is not None and kind in ON_DEVICE:
            if self._anchor is None:
                torch.cuda.synchronize(self._cuda)
                self._anchor = self._clock(), self._record()
            self._event = self._record()
        return self._clock()

    def end(self, kind: Kind, start: float, *, stage: int, step: int, micro_batch: int) -> None:
        """The action that began at ``start`` is over."""
        span = Span(kind, stage, step, micro_batch, start, self._clock())
        if self._cuda is None:
            self._count(_Unread(span, self.keep), span.end - span.start)
        elif kind in ON_DEVICE:
            self._unread.append(_Unread(span, self.keep, self._event, self._record()))
        else:
            self._unread.append(_Unread(span, self.keep))
        if kind == "step":
            self._read()

    def pause(self, seconds: float) -> None:
        """Count ``seconds`` that have just passed nowhere: evaluation, saving."""
        self._read(wait=True)
        self._anchor = None  # the clocks drift apart: a good moment to compare them again
        self._read_until = self._clock()
        self._paused += seconds

    def spans(self) -> list[Span]:
        """The actions that were kept so far, in the order they were asked for; waits for a CUDA
        device."""
        self._read(wait=True)
        return list(self._spans)

    def totals(self, *, wait: bool = True) -> dict[str, float]:
        """Seconds of every kind of action since the start, ``other`` (none of them) and
        ``total``.

        Args:
            wait: For a CUDA device to finish; otherwise the time of what it has finished.
        """
        self._read(wait=wait)
        now = self._clock() if wait or self._cuda is None else self._read_until
        total = max(0.0, now - self._began - self._paused)
        seconds: dict[str, float] = {**self._seconds}
        return seconds | {"other": max(0.0, total - sum(seconds.values())), "total": total}

    def _count(self, done: _Unread, seconds: float) -> None:
        self._seconds[done.span.kind] += seconds
        if done.keep:
            self._spans.append(done.span)

    # -- a CUDA device ---------------------------------------------------------------------

    def _record(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self, *, wait: bool = False) -> None:
        """Count what has passed, in order."""
        if self._cuda is None or not self._unread:
            return
        if wait:
            torch.cuda.synchronize(self._cuda)
        while self._unread and (self._unread[0].last is None or self._unread[0].last.query()):
            entry = self._unread.popleft()
            if entry.last is None:
                self._count(entry, self._idle_within(entry.span))
            else:
                entry = self._placed(entry)
                self._count(entry, entry.span.end - entry.span.start)
                self._computing.append(entry.span)
            self._read_until = max(self._read_until, entry.span.end)

    def _placed(self, entry: _Unread) -> _Unread:
        """With the times of its events instead of the host's."""
        assert self._anchor is not None
        known, anchor = self._anchor
        start = known + anchor.elapsed_time(entry.first) / 1e3  # ms
        end = start + entry.first.elapsed_time(entry.last) / 1e3
        # Times are 32-bit milliseconds: measured from the last event, not from the first of hours.
        self._anchor = end, entry.last
        return entry._replace(span=entry.span._replace(start=start, end=end))

    def _idle_within(self, host: Span) -> float:
        """Seconds of a host's action in which the device did nothing. What it can have done then
        was asked for before, so it has been read."""
        while self._computing and self._computing[0].end <= host.start:
            self._computing.popleft()
        overlaps = (min(s.end, host.end) - max(s.start, host.start) for s in self._computing)
        return max(0.0, host.end - host.start - sum(max(0.0, overlap) for overlap in overlaps))


def since(earlier: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
    """What was added between two ``Timeline.totals``."""
    return {kind: max(0.0, seconds - earlier[kind]) for kind, seconds in later.items()}


def shares(totals: Mapping[str, float]) -> dict[str, float]:
    """What part of a rank's time went where, from ``Timeline.totals``; they sum to 1.

    ``busy`` (forward and backward), ``optimizer``, ``wait_input`` (for the previous rank, unpacking
    included), ``wait_send`` (packing and waiting for room on the way to the next rank),
    ``wait_sync`` (for all ranks, where ``scpl.sync`` or ``clip_scope`` asks for it), ``data``
    (loading) and ``other``. ``bubble_fraction`` is the three waits together: an upper bound, for
    packing is work.
    """
    total = totals["total"] or 1.0
    part = {kind: totals[kind] / total for kind in (*KINDS, "other")}
    return {
        "busy": part["forward"] + part["backward"],
        "optimizer": part["step"],
        "wait_input": part["receive"],
        "wait_send": part["send"],
        "wait_sync": part["sync"],
        "data": part["data"],
        "other": part["other"],
        "bubble_fraction": part["receive"] + part["send"] + part["sync"],
    }
