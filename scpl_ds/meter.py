"""How fast a run is and how much memory it took."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

GIB = 2**30


class Meter:
    """Counts samples and tokens against a monotonic clock; nothing here waits for the device.

    Training is asynchronous, so the rates say how fast optimizer steps are *issued*; over a window
    of several steps that is how fast they are done, because a stage has a bounded number of
    messages in flight.

    Args:
        device: Whose memory to report: a CUDA device's allocator, else this process's resident set.
        clock: Seconds, monotonic; a test passes its own.
    """

    def __init__(
        self, device: torch.device | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Forget everything and start counting now."""
        self._window_start = self._clock()
        self._window_samples = self._window_tokens = 0
        self._past_seconds = 0.0
        self._past_samples = self._past_tokens = 0

    def update(self, samples: int, tokens: int) -> None:
        """``samples`` and ``tokens`` (real ones, without padding) have been trained on."""
        self._window_samples += samples
        self._window_tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside counts nowhere: evaluation, saving."""
        start = self._clock()
        try:
            yield
        finally:
            self._window_start += self._clock() - start

    def window(self) -> dict[str, float]:
        """Rates since the last call, and peak memory; starts the next window.

        Keys: ``perf/samples_per_s``, ``perf/tokens_per_s``, ``perf/peak_memory_gib``.
        """
        now = self._clock()
        seconds = now - self._window_start
        metrics = _rates(self._window_samples, self._window_tokens, seconds)
        self._past_seconds += seconds
        self._past_samples += self._window_samples
        self._past_tokens += self._window_tokens
        self._window_start, self._window_samples, self._window_tokens = now, 0, 0
        return metrics | {"perf/peak_memory_gib": peak_memory_gib(self._device)}

    def total(self) -> dict[str, float]:
        """The same keys over the whole run so far; leaves the window as it is."""
        return _rates(
            self._past_samples + self._window_samples,
            self._past_tokens + self._window_tokens,
            self.seconds,
        ) | {"perf/peak_memory_gib": peak_memory_gib(self._device)}

    @property
    def seconds(self) -> float:
        """Counted seconds so far, without pauses."""
        return self._past_seconds + self._clock() - self._window_start


def peak_memory_gib(device: torch.device | None = None) -> float:
    """Highest memory use, GiB, since the process began or a ``MemoryWatch`` restarted: tensors on a
    CUDA device, else this process's resident set."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # ru_maxrss counts KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class MemoryWatch:
    """This process's memory beyond what it had when the watch began.

    Begin before the model is loaded, so that Python and libraries do not count. On a CUDA device it
    is what tensors take; elsewhere the resident set, mapped weights included.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._base, self._before = self._now(), 0

    def restart(self) -> None:
        """Forget the peak so far."""
        self._before = 0
        self._forget()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The peak inside counts nowhere: evaluation, saving."""
        self._before = self.peak()
        try:
            yield
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            return
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak since the start
            Path("/proc/self/clear_refs").write_text("5")

    @property
    def before(self) -> int:
        """Bytes at the beginning, which count nowhere here."""
        return self._base

    def now(self) -> int:
        """Bytes beyond the beginning, now."""
        return self._now() - self._base

    def peak(self) -> int:
        """The most bytes beyond the beginning since ``restart``."""
        return max(self._before, round(peak_memory_gib(self._cuda) * GIB) - self._base)

    def _now(self) -> int:
        if self._cuda is not None:
            return torch.cuda.memory_allocated(self._cuda)
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:
            return round(peak_memory_gib() * GIB)
        return pages * os.sysconf("SC_PAGE_SIZE")


_LARGE = 2**20
_M_MMAP_THRESHOLD = -3


def give_back_freed_memory() -> None:
    """Make glibc return every freed block of a MiB or more to the system at once, in this process.

    Left alone it raises that limit to 32 MiB and keeps what lies below for later: a BERT-base that
    needs 2.28 GB then takes 2.78 GB. Costs page faults. Without glibc, or where the user has set
    ``MALLOC_MMAP_THRESHOLD_``, nothing happens.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _rates(samples: int, tokens: int, seconds: float) -> dict[str, float]:
    per = 1.0 / seconds if seconds > 0 else 0.0
    return {"perf/samples_per_s": samples * per, "perf/tokens_per_s": tokens * per}
