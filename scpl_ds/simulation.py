"""When every piece of work of a run begins and ends, where each rank does one thing at a time.

A small list scheduler: it knows queues, lengths and what needs what, and no schedule by name.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scpl_ds.errors import ScheduleError


class Work(NamedTuple):
    """One thing a rank does: ``F`` forward, ``B`` backward, ``W`` weight gradient, ``S`` step."""

    kind: str
    stage: int
    micro_batch: int
    """Of a step: the first one of it."""

    def __str__(self) -> str:
        names = {"F": "Forward", "B": "Backward", "W": "WeightGradient", "S": "Step"}
        return f"{names[self.kind]}(stage {self.stage}, micro-batch {self.micro_batch})"


class Slot(NamedTuple):
    """One piece of work, placed in time."""

    stage: int
    micro_batch: int
    kind: str
    """``F``, ``B``, ``W`` or ``S``, as in :class:`Work`."""
    start: float
    end: float
    rank: int


class Lane:
    """One rank: its queues, dearest first, and how many forwards it may have open.

    Args:
        queues: Each in order; only their heads can begin.
        open_limit: Forwards that may wait for their backward; None is any number.
        kept_limit: Forwards that may wait for their weight gradient.
    """

    def __init__(
        self, queues: list[list[Work]], open_limit: int | None, kept_limit: int | None = None
    ) -> None:
        self.queues = [collections.deque(queue) for queue in queues]
        self.limits = {"B": open_limit, "W": kept_limit}
        self.waiting = {"B": 0, "W": 0}
        self.free = 0.0

    def take(self, work: Work, end: float) -> None:
        """``work`` runs next here, until ``end``."""
        next(queue for queue in self.queues if queue and queue[0] == work).popleft()
        self.free = end
        for kind in self.waiting:
            self.waiting[kind] += {"F": 1, kind: -1}.get(work.kind, 0)

    def heads(self) -> list[Work]:
        """What may begin as far as this rank is concerned."""
        full = any(
            limit is not None and self.waiting[kind] >= limit for kind, limit in self.limits.items()
        )
        return [q[0] for q in self.queues if q and not (full and q[0].kind == "F")]

    def waits_at(self) -> str:
        return str(next(queue[0] for queue in self.queues if queue))


def lay_out(
    lanes: list[Lane],
    lengths: Mapping[str, Sequence[float]],
    needs: Callable[[Work], list[tuple[Work, float]]],
    owner: Mapping[int, int],
) -> list[Slot]:
    """Place all work of all ranks in time; a rank begins what it can as soon as it can.

    Always the work that can begin earliest is placed, so that what it was chosen from is what was
    known at that time. Of several that could begin, that of the dearest queue.

    Args:
        lanes: The ranks; their queues are emptied.
        lengths: Kind -> length on each stage.
        needs: Work -> what must have ended, and how much later that is known here.
        owner: Stage -> rank. Work needs only work of its own stage and of the two beside it.

    Raises:
        ScheduleError: No rank can go on although work is left: a deadlock.
    """
    done: dict[Work, float] = {}
    slots: list[Slot] = []

    def next_of(lane: Lane) -> tuple[float, Work] | None:
        ready: list[tuple[float, Work]] = []
        for work in lane.heads():
            known = [(done.get(other), later) for other, later in needs(work)]
            if all(end is not None for end, _ in known):
                arrived = max((end + later for end, later in known if end is not None), default=0)
                ready.append((max(lane.free, arrived), work))
        earliest = min((at for at, _ in ready), default=0)
        slack = 1e-9 * max(1.0, earliest)  # sums of floats in another order
        return next(((at, work) for at, work in ready if at <= earliest + slack), None)

    choices = [next_of(lane) for lane in lanes]
    while any(choice is not None for choice in choices):
        r = min((c[0], i) for i, c in enumerate(choices) if c is not None)[1]
        start, work = choices[r]  # pyright: ignore[reportGeneralTypeIssues]
        lane = lanes[r]
        done[work] = start + lengths[work.kind][work.stage]
        lane.take(work, done[work])
        slots.append(Slot(work.stage, work.micro_batch, work.kind, start, lane.free, r))
        near = {owner.get(work.stage - 1, r), r, owner.get(work.stage + 1, r)}
        for i in near:
            choices[i] = next_of(lanes[i])
    if stuck := {r: lane.waits_at() for r, lane in enumerate(lanes) if any(lane.queues)}:
        raise ScheduleError(f"deadlock: no rank can go on; they wait at {stuck}.")
    return slots
