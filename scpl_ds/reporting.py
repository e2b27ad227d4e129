"""What leaves a rank while it trains: numbers for the trackers, and where its time went."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scpl_ds.checkpoint import write_text
from scpl_ds.distributed.collectives import MetricsMailbox, barrier, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.engine import Engine
from scpl_ds.meter import MemoryWatch, Meter, peak_memory_gib
from scpl_ds.run_folder import RunFolder
from scpl_ds.timeline import shares, since
from scpl_ds.timeline_files import RankTimeline, clock_offsets, render_shares, svg, trace
from scpl_ds.trackers._base import TrackerSet

log = logging.getLogger(__name__)

_BARRIERS = 8
_RANKS_SHOWN = 16
"""In a larger world the metrics of a logging step are means over ranks only."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ClockOffset(NamedTuple):
    """Seconds this rank's clock is ahead of rank 0's, and how wrong that may be."""

    seconds: float
    error: float


class RunTotals(NamedTuple):
    """What the training took, without evaluating and saving; the same on every rank, but for the
    rates."""

    rates: dict[str, float]
    seconds: float
    shares: list[dict[str, Any]]
    """Of every rank: ``rank``, ``stages``, and the shares of its time (``timeline.shares``)."""
    peaks: list[int]
    """Bytes of every rank, see ``MemoryWatch``."""

    def for_result(self) -> dict[str, Any]:
        """The entries of ``result.json``."""
        bubbles = [each["bubble_fraction"] for each in self.shares]
        return {
            "samples_per_s": self.rates["perf/samples_per_s"],
            "tokens_per_s": self.rates["perf/tokens_per_s"],
            "train_seconds": self.seconds,
            "bubble_fraction": sum(bubbles) / len(bubbles),
            "time_shares": self.shares,
            "peak_memory_bytes": self.peaks,
        }


class Reporter:
    """Counts and times one rank's training, and hands rank 0's trackers what all ranks found.

    Args:
        engine: The stages of this rank.
        memory: Begun before they were loaded.
        trackers: Empty on ranks other than 0.
        profile_steps: Which steps (from 1, over the whole run) are kept for a trace; None: none.
            Every rank must then be here: their clocks are compared.
    """

    def __init__(
        self,
        engine: Engine,
        memory: MemoryWatch,
        trackers: TrackerSet,
        *,
        profile_steps: range | None = None,
    ) -> None:
        self._engine, self._memory, self.trackers = engine, memory, trackers
        self._mesh = engine.mesh
        self._mailbox = MetricsMailbox(self._mesh)
        self._meter = Meter(engine.device)
        self._profile_steps = profile_steps
        self._clock = None if profile_steps is None else _compare_clocks(self._mesh)

    def start(self) -> None:
        """Training begins now."""
        self._meter.restart()
        self._memory.restart()
        self._engine.start_timeline(keep=False)
        self._window = self._engine.timeline.totals()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around optimizer step ``number`` (from 1)."""
        engine = self._engine
        engine.timeline.keep = self._profile_steps is not None and number in self._profile_steps
        samples, tokens = engine.samples_seen, engine.tokens_seen
        yield
        lanes = self._mesh.dp_size
        samples, tokens = engine.samples_seen - samples, engine.tokens_seen - tokens
        self._meter.update(samples * lanes, tokens * lanes)
        self.trackers.tick(number)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time and memory inside count nowhere: evaluation, saving. What was posted before is on
        its way when it begins."""
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)  # what was asked for before is not inside
        began = time.monotonic()
        try:
            with self._meter.paused(), self._memory.paused():
                self._mailbox.flush()
                yield
        finally:
            self._engine.timeline.pause(time.monotonic() - began)

    def post(self, step: int, extra: Mapping[str, float]) -> None:
        """Send this rank's numbers of ``step`` on their way, without waiting for anybody.

        ``extra`` and the rates are rank 0's. Times are those since the last ``post``.
        """
        values: dict[str, Any] = dict(self._engine.metrics())
        if self._mesh.rank == 0:
            values |= self._meter.window() | dict(extra)
        values["perf/peak_memory_gib"] = peak_memory_gib(self._engine.device)
        totals = self._engine.timeline.totals(wait=False)
        for name, share in shares(since(self._window, totals)).items():
            values[f"perf/{name}"] = share  # the mailbox makes it the mean over ranks
            if self._mesh.world_size <= _RANKS_SHOWN:
                values[f"perf/rank{self._mesh.rank}/{name}"] = share
        self._window = totals
        self._mailbox.post(step, values)

    def show(self) -> list[tuple[int, dict[str, float]]]:
        """Give the trackers the steps that have reached every rank; returns them, on rank 0."""
        arrived = self._mailbox.poll()
        for step, values in arrived:
            self.trackers.log(values, step)
        return arrived

    def finish(self, folder: RunFolder) -> RunTotals:
        """After the last step, on every rank (waits): the totals, and the profile's files."""
        own = shares(self._engine.timeline.totals())
        stages = [stage.index for stage in self._engine.stages]
        self._engine.drain()
        barrier(self._mesh)
        rates, seconds = self._meter.total(), self._meter.seconds
        with self.paused():
            self.show()
            who = {"rank": self._mesh.rank, "stages": stages}
            everyone = gather_objects(self._mesh, {**who, **own})
            peaks = gather_objects(self._mesh, self._memory.peak())
            if self._clock is not None:
                self._write_profile(folder.profile, own, self._clock)
        return RunTotals(rates, seconds, everyone, peaks)

    def log_shares(self, totals: RunTotals) -> None:
        """Where the time went, as a table in the log."""
        rows = [
            (f"{each['rank']}: stage {', '.join(map(str, each['stages']))}", each)
            for each in totals.shares
        ]
        log.info("where the time went, without evaluating and saving:\n%s", render_shares(rows))

    def _write_profile(self, folder: Path, own: dict[str, float], clock: ClockOffset) -> None:
        mesh, plan = self._mesh, self._engine.plan
        stages = tuple(stage.index for stage in self._engine.stages)
        first, end = plan.bounds[stages[0]], plan.bounds[stages[-1] + 1]
        spans = [
            span._replace(start=span.start - clock.seconds, end=span.end - clock.seconds)
            for span in self._engine.timeline.spans()
        ]
        layers = f"{first}-{end - 1}" if end - first > 1 else f"{first}"
        mine = RankTimeline(mesh.rank, stages, layers, mesh.next_rank, own, spans)
        ranks: list[RankTimeline] = gather_objects(mesh, mine)
        error = max(gather_objects(mesh, clock.error))
        if mesh.rank != 0:
            return
        folder.mkdir(exist_ok=True)
        write_text(folder / "trace.json", json.dumps(trace(ranks)) + "\n")
        write_text(folder / "timeline.svg", svg(ranks, title=folder.absolute().parent.name))
        bubbles = [each.shares["bubble_fraction"] for each in ranks]
        about = {
            "bubble_fraction": sum(bubbles) / len(bubbles),
            "clock_error_s": error,
            "ranks": [
                {"rank": r.rank, "stages": r.stages, "layers": r.layers, **r.shares} for r in ranks
            ],
        }
        write_text(folder / "shares.json", json.dumps(about, indent=2) + "\n")
        self.trackers.picture("profile/timeline", folder / "timeline.svg")
        log.info("profile: %s (open it in ui.perfetto.dev) and timeline.svg", folder / "trace.json")


def _compare_clocks(mesh: Mesh) -> ClockOffset:
    """This rank's clock against rank 0's, by a few barriers (waits).

    Processes of one machine share the monotonic clock: nothing to compare there.
    """
    try:
        machine = _BOOT_ID.read_text()
    except OSError:  # not Linux
        machine = socket.gethostname()
    entered: list[float] = []
    left: list[float] = []
    for _ in range(_BARRIERS):
        entered.append(time.monotonic())
        barrier(mesh)
        left.append(time.monotonic())
    told = gather_objects(mesh, (machine, entered, left))
    if machine == told[0][0]:
        return ClockOffset(0.0, 0.0)
    offsets = clock_offsets([each[1] for each in told], [each[2] for each in told])
    return ClockOffset(*offsets[mesh.rank])
