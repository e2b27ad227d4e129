"""In which order: a schedule is a list of actions, drawn and checked without any process.

The engine walks the actions of ``stream``; ``simulate`` and ``render`` lay any schedule out in
time, so that the drawings in the docs are made by the code they explain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scpl_ds.errors import ScheduleError


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


class Slot(NamedTuple):
    """One forward or backward, placed in time."""

    stage: int
    micro_batch: int
    kind: str
    """``F`` or ``B``."""
    start: int
    end: int


def simulate(
    schedule: Schedule,
    num_stages: int,
    num_micro_batches: int,
    *,
    forward: int = 1,
    backward: int = 2,
    gradients_travel_back: bool = False,
) -> list[Slot]:
    """When each forward and backward of one step runs, one rank a stage, messages free.

    Args:
        forward: Length of a forward, in any unit of time.
        backward: Length of a backward, in the same unit.
        gradients_travel_back: A backward also needs the next stage's backward (backprop).

    Raises:
        ScheduleError: No stage can go on although work is left (a deadlock), or the schedule
            computes a micro-batch twice or not at all.
    """
    todo = [
        [
            a
            for a in schedule([k], num_stages, num_micro_batches)
            if isinstance(a, Forward | Backward)
        ]
        for k in range(num_stages)
    ]
    wanted = 2 * num_micro_batches
    for k, actions in enumerate(todo):
        if len(set(actions)) != len(actions) or len(actions) != wanted:
            raise ScheduleError(
                f"stage {k} computes {len(set(actions))} different things in {len(actions)} "
                f"actions; {num_micro_batches} micro-batches need {wanted}, each once."
            )
    done: dict[Action, int] = {}
    free = [0] * num_stages
    slots: list[Slot] = []
    while any(todo):
        progress = False
        for k, actions in enumerate(todo):
            while actions and all(
                need in done for need in _needs(actions[0], num_stages, gradients_travel_back)
            ):
                action = actions.pop(0)
                needs = _needs(action, num_stages, gradients_travel_back)
                start = max([free[k], *(done[need] for need in needs)])
                is_forward = isinstance(action, Forward)
                free[k] = done[action] = start + (forward if is_forward else backward)
                kind = "F" if is_forward else "B"
                slots.append(Slot(k, action.micro_batch, kind, start, free[k]))
                progress = True
        if not progress:
            stuck = {k: actions[0] for k, actions in enumerate(todo) if actions}
            raise ScheduleError(f"deadlock: no stage can go on; they wait at {stuck}.")
    return sorted(slots, key=lambda s: (s.start, s.stage))


def _needs(action: Forward | Backward, num_stages: int, travel_back: bool) -> list[Action]:
    k, n = action.stage, action.micro_batch
    if isinstance(action, Forward):
        return [Forward(k - 1, n)] if k > 0 else []
    needs: list[Action] = [Forward(k, n)]
    if travel_back and k < num_stages - 1:
        needs.append(Backward(k + 1, n))
    return needs


def length(slots: Sequence[Slot]) -> int:
    """How long the step takes, from the first start to the last end."""
    return max(slot.end for slot in slots) - min(slot.start for slot in slots)


def bubble_fraction(slots: Sequence[Slot]) -> float:
    """Share of the stages' time in which they do nothing, over one flushed step."""
    stages = len({slot.stage for slot in slots})
    busy = sum(slot.end - slot.start for slot in slots)
    return 1 - busy / (stages * length(slots))


def render(slots: Sequence[Slot], *, width: int = 3) -> str:
    """The timeline as text, a line a stage: ``F0`` a forward, ``B0 ==`` a backward of two units."""
    stages = max(slot.stage for slot in slots) + 1
    total = max(slot.end for slot in slots)
    lines = []
    for k in range(stages):
        cells = [""] * total
        for slot in slots:
            if slot.stage == k:
                cells[slot.start] = f"{slot.kind}{slot.micro_batch}"
                cells[slot.start + 1 : slot.end] = ["=="] * (slot.end - slot.start - 1)
        lines.append(f"stage {k} |" + "".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(lines)


def render_both(num_stages: int, num_micro_batches: int) -> str:
    """1F1B with backprop above ``stream``, one step each: the drawing of the README."""
    rival = simulate(one_f_one_b, num_stages, num_micro_batches, gradients_travel_back=True)
    ours = simulate(stream, num_stages, num_micro_batches)
    titles = ("1F1B with backprop: gradients travel back", "scpl_ds: every stage learns on its own")
    return "\n\n".join(
        f"{title:<58} {length(slots):>4} units\n{render(slots)}"
        for title, slots in zip(titles, (rival, ours), strict=True)
    )
