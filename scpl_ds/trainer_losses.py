"""Losses that explode and stay numbers: said once, and the checkpoint of before is kept."""

from __future__ import annotations

import collections
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

_TIMES = 100.0
"""So many times its usual value, or more than that where the usual value is below 1, a loss has
exploded: cross-entropy of uniform answers is about 12 nats with the largest vocabularies."""
_REMEMBERED, _NEEDED = 25, 3
"""Logged losses whose median is the usual value, and without how many there is none."""


class Losses:
    """What is usual for every loss of a run, on rank 0.

    A loss that explodes is no error: it may come back, and a false alarm would cost the run. But
    ``train.save_total_limit`` must not remove the last checkpoint from before.
    """

    def __init__(self) -> None:
        self._usual: dict[str, collections.deque[float]] = {}
        self._exploded: set[str] = set()
        self._sound: Path | None = None

    def logged(self, step: int, losses: Mapping[str, float]) -> None:
        """Take the finite losses of a logging step."""
        self.seen(step, losses)
        for name in losses.keys() - self._exploded:
            usual = self._usual.setdefault(name, collections.deque(maxlen=_REMEMBERED))
            usual.append(losses[name])

    def seen(self, step: int, losses: Mapping[str, float]) -> None:
        """Compare losses of a step with what is usual."""
        for name, value in losses.items():
            usual = self._usual.get(name, ())
            if len(usual) < _NEEDED:
                continue
            median = statistics.median(usual)
            if abs(value) <= _TIMES * max(1.0, abs(median)):
                self._exploded.discard(name)
            elif name not in self._exploded:
                self._exploded.add(name)
                sound = "no checkpoint" if self._sound is None else self._sound.name
                log.warning(
                    "%s is %.4g at step %d, usual is %.4g: it seems to diverge. The run goes on; "
                    "until it comes back, train.save_total_limit spares the last checkpoint from "
                    "before (%s). Lower the learning rate or warm up longer, or clip gradients "
                    "(deepspeed.gradient_clipping).",
                    name, value, step, median, sound,
                )  # fmt: skip

    def spared(self, folder: Path) -> list[Path]:
        """What must stay while ``folder`` is saved: the last checkpoint from before an
        explosion."""
        if not self._exploded:
            self._sound = folder
        return [] if self._sound is None else [self._sound]
