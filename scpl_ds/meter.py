"""How fast a run is and how much memory it took."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

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
    """Highest memory use so far, GiB: tensors on a CUDA device, else this process's resident
    set."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # ru_maxrss counts KiB on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _rates(samples: int, tokens: int, seconds: float) -> dict[str, float]:
    per = 1.0 / seconds if seconds > 0 else 0.0
    return {"perf/samples_per_s": samples * per, "perf/tokens_per_s": tokens * per}
