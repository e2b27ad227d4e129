"""In which order: a schedule is a list of actions, drawn and checked without any process.

The engine walks the actions of ``stream``; ``simulate`` and ``render`` lay any schedule out in
time, so that the drawings in the docs are made by the code they explain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from scpl_ds.errors import ScheduleError
from scpl_ds.simulation import Lane, Slot, Work, lay_out


@dataclasses.dataclass(frozen=True)
class Load:
    """Take the next micro-batch from the data loader (first pipeline rank)."""

    micro_batch: int


@dataclasses.dataclass(frozen=True)
class Receive:
    """Take the next micro-batch from the previous pipeline rank."""

    micro_batch: int


@dataclasses.dataclass(frozen=True)
class Forward:
    """Run one local stage on the current micro-batch; its output becomes the current one."""

    stage: int
    micro_batch: int


@dataclasses.dataclass(frozen=True)
class Send:
    """Hand the current micro-batch to the next pipeline rank, without waiting."""

    micro_batch: int


@dataclasses.dataclass(frozen=True)
class Backward:
    """Local backward of one stage."""

    stage: int
    micro_batch: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Optimizer step of one stage, after its last backward."""

    stage: int


Action = Load | Receive | Forward | Send | Backward | Step
Schedule = Callable[..., Iterator[Action]]


def stream(
    local_stages: Sequence[int],
    num_stages: int,
    num_micro_batches: int,
    *,
    step_in_backward: bool = True,
) -> Iterator[Action]:
    """One optimizer step of one rank, with nothing to wait for but its own input.

    A stage goes backward right after its own forward and frees its activations before the next
    forward begins, so a rank holds the activations of one stage and one micro-batch. The last
    local stage's output leaves before that stage's backward. No action looks at a later stage, so a
    rank runs on into the next step: the pipeline fills once a run.

    Args:
        local_stages: The stages of this rank, consecutive, first to last.
        num_stages: Stages of the whole model.
        num_micro_batches: Micro-batches of one optimizer step.
        step_in_backward: All micro-batches go through one stage, which then takes its step and
            frees its gradients, before the next local stage begins: gradients of one stage at a
            time, and what the stage gave for each micro-batch waits. Otherwise each micro-batch
            goes through all local stages first. The same where there is one micro-batch or one
            local stage; the numbers are the same to the bit always.
    """
    first, last = local_stages[0], local_stages[-1]
    numbers = range(num_micro_batches)
    order = [(k, n) for k in local_stages for n in numbers]
    if not step_in_backward:
        order.sort(key=lambda pair: (pair[1], pair[0]))
    for k, n in order:
        if k == first:
            yield Load(n) if first == 0 else Receive(n)
        yield Forward(k, n)
        if k == last and k < num_stages - 1:
            yield Send(n)
        yield Backward(k, n)
        if n == numbers[-1]:
            yield Step(k)


def one_f_one_b(
    local_stages: Sequence[int], num_stages: int, num_micro_batches: int
) -> Iterator[Action]:
    """The order of DeepSpeed's and torch's 1F1B: warm-up forwards, then one forward, one backward.

    Only for drawings and predictions: backprop pipelines run through the libraries that own them.
    """
    (k,) = local_stages
    warm_up = min(num_stages - k - 1, num_micro_batches)
    for n in range(warm_up):
        yield Forward(k, n)
    for n in range(warm_up, num_micro_batches):
        yield Forward(k, n)
        yield Backward(k, n - warm_up)
    for n in range(num_micro_batches - warm_up, num_micro_batches):
        yield Backward(k, n)


def gpipe(local_stages: Sequence[int], num_stages: int, num_micro_batches: int) -> Iterator[Action]:
    """All forwards, then all backwards, the latest first: GPipe, arXiv:1811.06965. For drawings and
    predictions."""
    (k,) = local_stages
    for n in range(num_micro_batches):
        yield Forward(k, n)
    for n in reversed(range(num_micro_batches)):
        yield Backward(k, n)


@dataclasses.dataclass(frozen=True)
class Priorities:
    """An order that is found while time passes: a free rank takes a forward that may and can begin,
    or else a backward, or else a weight gradient that was put off.

    With several stages on a rank, micro-batches go in groups of as many as there are ranks through
    one local stage after the other, as in interleaved 1F1B (arXiv:2104.04473).
    """

    in_flight: Callable[[int, int, int], int]
    """``(rank, ranks, stages of a rank)`` -> forwards that may wait for their backward. Where that
    many do, a forward may not begin: one forward, one backward."""
    split_backward: bool = False
    """A backward gives the input's gradient (``B``, which the stage before waits for) and later
    the weights' (``W``, for which nobody waits), kept for as many micro-batches as there are
    ranks: arXiv:2401.10241."""

    def queues(self, local_stages: Sequence[int], ranks: int, numbers: range) -> list[list[Work]]:
        """What is to be done on a rank in one step, a queue for each kind, dearest first."""
        first = numbers.start
        groups = [numbers[at : at + ranks] for at in range(0, len(numbers), ranks)]
        ahead = [(k, n) for group in groups for k in local_stages for n in group]
        back = [(k, n) for group in groups for k in reversed(local_stages) for n in group]
        kinds = [("F", ahead), ("B", back), *([("W", back)] if self.split_backward else [])]
        queues = [[Work(kind, k, n) for k, n in pairs] for kind, pairs in kinds]
        return [*queues, [Work("S", k, first) for k in local_stages]]


def _open_limit(rank: int, ranks: int, local_stages: int) -> int:
    """One more than Megatron's warm-up; with one stage a rank that of plain 1F1B."""
    if local_stages == 1:
        return ranks - rank
    return 2 * (ranks - rank - 1) + (local_stages - 1) * ranks + 1


interleaved = Priorities(_open_limit)
"""1F1B with several stages on a rank, for a ``looped`` placement: Narayanan et al. 2021,
arXiv:2104.04473."""

zero_bubble = Priorities(_open_limit, split_backward=True)
"""ZB-H1, which holds no more activations than 1F1B: Qi et al. 2023, arXiv:2401.10241.
Waits (K - 1)(F + B - W) a step where the three take equally long, and about that where a weight
gradient takes no longer than a forward. No rank waits for a global norm."""


def looped(num_stages: int, ranks: int) -> list[list[int]]:
    """Rank r has the stages r, r + ranks, r + 2 ranks ...: the placement of interleaved 1F1B."""
    return [list(range(r, num_stages, ranks)) for r in range(ranks)]


def v_shaped(ranks: int) -> list[list[int]]:
    """Two stages a rank, there and back: rank r has r and 2 ranks - 1 - r."""
    return [[r, 2 * ranks - 1 - r] for r in range(ranks)]


Durations = float | Sequence[float]


def simulate(
    schedule: Schedule | Priorities,
    num_stages: int,
    num_micro_batches: int,
    *,
    forward: Durations = 1,
    backward: Durations = 2,
    gradients_travel_back: bool = False,
    message: float = 0,
    head: Durations = 0,
    step: Durations = 0,
    num_steps: int = 1,
    weight_share: float = 0.5,
    placement: Sequence[Sequence[int]] | None = None,
) -> list[Slot]:
    """When every piece of work of a run runs, in any unit of time.

    A rank does one thing at a time and begins it as soon as it can. A stage begins a step when it
    has ended the step before; no rank waits for another one's optimizer.

    Args:
        schedule: The order of each rank's work, or the priorities it follows.
        num_stages: Stages of the whole model.
        num_micro_batches: Micro-batches of one optimizer step.
        forward: Length of a forward: one for all stages, or one for each.
        backward: Length of a whole backward, likewise.
        gradients_travel_back: A backward also needs the next stage's backward (backprop).
        message: How much later the next rank has an output, and the rank before a gradient. The
            sender goes on meanwhile; nothing is to be sent inside a rank.
        head: Length of a local objective, a third of it before the output leaves (the engine sends
            when the forward has given its loss) and two thirds in backward. As for ``forward``.
        step: Length of an optimizer step, likewise.
        num_steps: Optimizer steps, one after the other.
        weight_share: With a split backward, the weight gradient's share of it.
        placement: The stages of each rank; None is one stage a rank.

    Returns:
        By start; work that takes no time is left out. Micro-batches are counted on from step to
        step.

    Raises:
        ScheduleError: No rank can go on although work is left (a deadlock), the schedule computes a
            micro-batch twice or not at all, or a sequence has another length than ``num_stages``.
    """
    ranks = [[k] for k in range(num_stages)] if placement is None else placement
    if sorted(k for local in ranks for k in local) != list(range(num_stages)):
        raise ScheduleError(
            f"placement {[list(r) for r in ranks]} must name each of {num_stages} stages once."
        )
    split = isinstance(schedule, Priorities) and schedule.split_backward
    heads = _each("head", head, num_stages)
    pairs = zip(_each("forward", forward, num_stages), heads, strict=True)
    ahead = [f + h / 3 if h else f for f, h in pairs]
    pairs = zip(_each("backward", backward, num_stages), heads, strict=True)
    whole = [b + h * 2 / 3 if h else b for b, h in pairs]
    lengths = {"F": ahead, "B": whole, "S": _each("step", step, num_stages)}
    if split:
        lengths["W"] = [b * weight_share for b in whole]
        lengths["B"] = [b * (1 - weight_share) for b in whole]
    lanes: list[Lane] = []
    for r, local in enumerate(ranks):
        queues: list[list[Work]] = []
        for s in range(num_steps):
            numbers = range(s * num_micro_batches, (s + 1) * num_micro_batches)
            if isinstance(schedule, Priorities):
                more = schedule.queues(local, len(ranks), numbers)
            else:
                more = [_ordered(schedule, local, num_stages, numbers)]
            queues = [a + b for a, b in zip(queues or [[] for _ in more], more, strict=True)]
        limit = None
        if isinstance(schedule, Priorities):
            limit = schedule.in_flight(r, len(ranks), len(local))
        lanes.append(Lane(queues, limit, len(ranks) if split else None))
    owner = {k: r for r, local in enumerate(ranks) for k in local}
    parts = ("B", "W") if split else ("B",)

    def needs(work: Work) -> list[tuple[Work, float]]:
        """What must have ended, and how much later that is known here."""
        kind, k, n = work
        if kind == "F":
            found = [(Work("F", k - 1, n), k - 1)] if k > 0 else []
            if n % num_micro_batches == 0 and n > 0:
                found.append((Work("S", k, n - num_micro_batches), k))
        elif kind == "B":
            found = [(Work("F", k, n), k)]
            if gradients_travel_back and k < num_stages - 1:
                found.append((Work("B", k + 1, n), k + 1))
        elif kind == "W":
            found = [(Work("B", k, n), k)]
        else:
            found = [(Work(kind, k, n + i), k) for kind in parts for i in range(num_micro_batches)]
        return [(other, 0 if owner[at] == owner[k] else message) for other, at in found]

    slots = lay_out(lanes, lengths, needs, owner)
    return sorted((s for s in slots if s.end > s.start), key=lambda s: (s.start, s.stage))


def _each(name: str, value: Durations, num_stages: int) -> list[float]:
    each: list[float] = [*value] if isinstance(value, Sequence) else [value] * num_stages
    if len(each) != num_stages:
        raise ScheduleError(f"{name} has {len(each)} numbers, but there are {num_stages} stages.")
    return each


def _ordered(
    schedule: Schedule, local: Sequence[int], num_stages: int, numbers: range
) -> list[Work]:
    """One step of a rank in the schedule's order; a step that it does not mention comes last."""
    found: list[Work] = []
    for action in schedule(list(local), num_stages, len(numbers)):
        if isinstance(action, Forward | Backward):
            kind = "F" if isinstance(action, Forward) else "B"
            found.append(Work(kind, action.stage, numbers.start + action.micro_batch))
        elif isinstance(action, Step):
            found.append(Work("S", action.stage, numbers.start))
    if strange := {work.stage for work in found} - set(local):
        raise ScheduleError(
            f"the schedule of the rank with stages {list(local)} computes stage {min(strange)}, "
            "which is not on it."
        )
    for k in local:
        computed = [w for w in found if w.stage == k and w.kind != "S"]
        if len(set(computed)) != len(computed) or len(computed) != 2 * len(numbers):
            raise ScheduleError(
                f"stage {k} computes {len(set(computed))} different things in {len(computed)} "
                f"actions; {len(numbers)} micro-batches need {2 * len(numbers)}, each once."
            )
    return found + [w for k in local if (w := Work("S", k, numbers.start)) not in found]


def length(slots: Sequence[Slot]) -> float:
    """How long it all takes, from the first start to the last end."""
    return max(slot.end for slot in slots) - min(slot.start for slot in slots)


def bubble_fraction(slots: Sequence[Slot]) -> float:
    """Share of the ranks' time in which they do nothing, from the first start to the last end."""
    ranks = len({slot.rank for slot in slots})
    busy = sum(slot.end - slot.start for slot in slots)
    return 1 - busy / (ranks * length(slots))


def render(slots: Sequence[Slot], *, width: int = 3) -> str:
    """The timeline as text, a line a stage: ``F0`` a forward, ``B0 ==`` a backward of two units.

    Raises:
        ScheduleError: Something does not start or end at a whole unit of time.
    """
    if not all(float(at).is_integer() for slot in slots for at in (slot.start, slot.end)):
        raise ScheduleError("only whole units can be drawn; simulate with whole numbers.")
    stages = max(slot.stage for slot in slots) + 1
    total = int(max(slot.end for slot in slots))
    lines = []
    for k in range(stages):
        cells = [""] * total
        for slot in slots:
            start, end = int(slot.start), int(slot.end)
            if slot.stage == k:
                cells[start] = f"{slot.kind}{slot.micro_batch}"
                cells[start + 1 : end] = ["=="] * (end - start - 1)
        lines.append(f"stage {k} |" + "".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(lines)


def render_both(num_stages: int, num_micro_batches: int) -> str:
    """1F1B with backprop above ``stream``, one step each: the drawing of the README."""
    rival = simulate(one_f_one_b, num_stages, num_micro_batches, gradients_travel_back=True)
    ours = simulate(stream, num_stages, num_micro_batches)
    titles = ("1F1B with backprop: gradients travel back", "scpl_ds: every stage learns on its own")
    return "\n\n".join(
        f"{title:<58} {length(slots):>4g} units\n{render(slots)}"
        for title, slots in zip(titles, (rival, ours), strict=True)
    )
