"""What else ran where a benchmark ran."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Processor(NamedTuple):
    """Processor time so far: of the whole machine, and of this process."""

    machine_s: float | None
    """None where the system does not say."""
    own_s: float

    @classmethod
    def now(cls) -> Processor:
        times = os.times()
        return cls(_busy_s(), times.user + times.system)

    def others_since(self, ranks_s: float, seconds: float) -> float | None:
        """Cores that neither this process nor its ranks used meanwhile, on average.

        Args:
            ranks_s: Processor time of the ranks.
            seconds: How long it is ago.
        """
        now = Processor.now()
        if self.machine_s is None or now.machine_s is None or seconds <= 0:
            return None
        ours = now.own_s - self.own_s + ranks_s
        return max(0.0, (now.machine_s - self.machine_s - ours) / seconds)


def _busy_s() -> float | None:
    """Seconds that the machine's cores have not been idle, since it started."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
