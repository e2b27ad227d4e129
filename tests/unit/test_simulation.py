"""Simulated runs beside what the papers, and a pencil, say they take."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest

from scpl_ds.errors import ScheduleError
from scpl_ds.schedules import (
    Backward,
    Forward,
    Priorities,
    Step,
    bubble_fraction,
    gpipe,
    interleaved,
    length,
    looped,
    one_f_one_b,
    render,
    simulate,
    stream,
    v_shaped,
    zero_bubble,
)
from scpl_ds.simulation import Slot

BACKPROP: dict[str, Any] = {"gradients_travel_back": True}
SHAPES = [(2, 2), (2, 8), (4, 4), (4, 16), (8, 8), (8, 32)]


def ends(slots: list[Slot], rank: int, kind: str = "B") -> list[float]:
    return [s.end for s in slots if s.rank == rank and s.kind == kind]


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b], ids=["gpipe", "1f1b"])
def test_the_bubble_of_gpipe_and_1f1b_is_k_less_1_over_m_and_k_less_1(
    schedule, stages, micro_batches
):
    slots = simulate(schedule, stages, micro_batches, **BACKPROP)
    assert bubble_fraction(slots) == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@pytest.mark.parametrize(("ranks", "micro_batches"), SHAPES)
@pytest.mark.parametrize("virtual", [2, 3])
def test_the_bubble_of_interleaved_1f1b_shrinks_with_the_stages_of_a_rank(
    ranks, micro_batches, virtual
):
    stages = virtual * ranks
    placement = looped(stages, ranks)
    slots = simulate(interleaved, stages, micro_batches, placement=placement, **BACKPROP)
    expected = (ranks - 1) / (virtual * micro_batches + ranks - 1)
    assert bubble_fraction(slots) == pytest.approx(expected)


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
def test_priorities_with_one_stage_a_rank_are_plain_1f1b(stages, micro_batches):
    plain = simulate(one_f_one_b, stages, micro_batches, **BACKPROP)
    assert simulate(interleaved, stages, micro_batches, **BACKPROP) == plain


@pytest.mark.parametrize(("stages", "micro_batches"), SHAPES)
@pytest.mark.parametrize(
    ("forward", "backward", "weights"), [(1, 2, 0.5), (2, 4, 0.5), (2, 3, 1 / 3)]
)
def test_zero_bubble_waits_for_forward_and_input_gradient_less_weight_gradient(
    stages, micro_batches, forward, backward, weights
):
    """(K - 1) (F + B - W), Qi et al., table 2."""
    slots = simulate(
        zero_bubble, stages, micro_batches,
        forward=forward, backward=backward, weight_share=weights, **BACKPROP,
    )  # fmt: skip
    share = backward * weights
    idle = (stages - 1) * (forward + (backward - share) - share)
    assert length(slots) == pytest.approx(micro_batches * (forward + backward) + idle)


@pytest.mark.parametrize("weights", [0.25, 1 / 3, 0.5])
def test_zero_bubble_is_never_slower_than_1f1b_nor_faster_than_the_work(weights):
    split = length(simulate(zero_bubble, 4, 8, backward=3, weight_share=weights, **BACKPROP))
    assert 8 * 4 + 3 <= split < length(simulate(one_f_one_b, 4, 8, backward=3, **BACKPROP))


def test_zero_bubble_is_the_drawing_of_its_paper():
    assert render(simulate(zero_bubble, 3, 4, **BACKPROP)) == dedent("""\
        stage 0 |F0 F1 F2       B0 W0 F3 B1 W1 B2 W2 B3 W3
        stage 1 |   F0 F1    B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
        stage 2 |      F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3""")


def test_zero_bubble_keeps_no_more_micro_batches_than_there_are_ranks():
    slots = simulate(zero_bubble, 4, 16, **BACKPROP)
    for rank in range(4):
        kept = most = 0
        for slot in (s for s in slots if s.rank == rank):
            kept += {"F": 1, "W": -1}.get(slot.kind, 0)
            most = max(most, kept)
        assert most == 4


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 1), (4, 8), (8, 4)])
def test_a_stream_fills_once_a_run(stages, micro_batches, steps):
    slots = simulate(stream, stages, micro_batches, num_steps=steps, forward=1, backward=2)
    fill, work = stages - 1, 3 * steps * micro_batches
    assert length(slots) == work + fill
    assert bubble_fraction(slots) == pytest.approx(fill / (work + fill))


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, interleaved, zero_bubble])
def test_a_backprop_pipeline_empties_every_step(schedule):
    once = length(simulate(schedule, 4, 8, step=2, **BACKPROP))
    many = length(simulate(schedule, 4, 8, step=2, num_steps=5, **BACKPROP))
    assert many == pytest.approx(5 * once)


def test_the_slowest_stage_sets_the_pace_of_a_stream():
    slots = simulate(stream, 4, 10, forward=[1, 1, 4, 1], backward=[2, 2, 8, 2])
    assert length(slots) == ends(slots, 2)[-1] == 2 + 10 * 12  # two fills before it, and its work


def test_a_slow_first_stage_makes_the_others_wait_for_every_micro_batch():
    slots = simulate(stream, 3, 4, forward=[3, 1, 1], backward=[3, 1, 1])
    assert [s.start for s in slots if s.rank == 2 and s.kind == "F"] == [4, 10, 16, 22]


def test_1f1b_is_paced_by_its_slowest_stage_too():
    one, two = (
        length(simulate(one_f_one_b, 3, count, forward=[1, 2, 1], backward=[2, 5, 2], **BACKPROP))
        for count in (20, 21)
    )
    assert two - one == 7


def test_message_time_shifts_the_fill_of_a_stream_only():
    near, far = (simulate(stream, 4, 8, message=late) for late in (0, 0.5))
    assert length(far) - length(near) == 3 * 0.5
    assert [s._replace(start=0, end=0) for s in near if s.rank == 3] == [
        s._replace(start=0, end=0) for s in far if s.rank == 3
    ]
    assert ends(far, 3)[-1] - ends(far, 3)[0] == ends(near, 3)[-1] - ends(near, 3)[0]


def test_message_time_is_paid_there_and_back_by_backprop():
    near, far = (simulate(gpipe, 4, 8, message=late, **BACKPROP) for late in (0, 0.5))
    assert length(far) - length(near) == 2 * 3 * 0.5


def test_no_message_is_sent_inside_a_rank():
    """Of the three boundaries of four stages in a V over two ranks the middle one is within one."""
    near, far = (
        simulate(stream, 4, 1, placement=v_shaped(2), message=late, forward=1, backward=0)
        for late in (0, 1)
    )
    assert v_shaped(2) == [[0, 3], [1, 2]]
    assert (length(near), length(far)) == (4, 6)


def test_a_local_head_costs_a_third_before_the_output_leaves():
    slots = simulate(stream, 2, 4, forward=1, backward=2, head=[3, 0])
    assert [(s.kind, s.start, s.end) for s in slots if s.rank == 0][:2] == [
        ("F", 0, 2),
        ("B", 2, 6),
    ]
    assert next(s.start for s in slots if s.rank == 1) == 2


def test_an_optimizer_step_comes_after_the_last_backward_and_before_the_next_forward():
    slots = simulate(stream, 1, 2, step=5, num_steps=2)
    assert render(slots) == (
        "stage 0 |F0 B0 == F1 B1 == S0 == == == == F2 B2 == F3 B3 == S2 == == == =="
    )


def test_a_schedule_that_steps_before_its_backwards_is_a_deadlock():
    def too_early(local, stages, count):
        yield Step(local[0])
        yield from (
            action for n in range(count) for action in (Forward(local[0], n), Backward(local[0], n))
        )

    with pytest.raises(ScheduleError, match=r"deadlock.*Step\(stage 0"):
        simulate(too_early, 2, 2)


def test_priorities_that_let_no_forward_begin_are_a_deadlock():
    with pytest.raises(ScheduleError, match=r"deadlock.*Forward\(stage 0, micro-batch 0\)"):
        simulate(Priorities(lambda rank, ranks, local: 0), 2, 2, **BACKPROP)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"forward": [1, 2]}, "forward has 2 numbers, but there are 3 stages"),
        ({"placement": [[0, 1], [1, 2]]}, "must name each of 3 stages once"),
    ],
)
def test_what_does_not_fit_the_stages_is_refused(wrong, message):
    with pytest.raises(ScheduleError, match=message):
        simulate(stream, 3, 2, **wrong)


def test_a_schedule_that_computes_other_stages_than_its_own_is_refused():
    with pytest.raises(ScheduleError, match=r"stages \[0\] computes stage 1"):
        simulate(lambda local, stages, count: stream([1], stages, count), 3, 2)


def test_half_units_cannot_be_drawn():
    with pytest.raises(ScheduleError, match="whole units"):
        render(simulate(stream, 2, 1, forward=0.5))
