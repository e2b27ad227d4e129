"""Schedules, drawn: one line a stage, three characters a unit; a forward takes 1, a backward 2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import dedent

import pytest

from scpl_ds.errors import ScheduleError
from scpl_ds.schedules import (
    Action,
    Backward,
    Forward,
    Load,
    Receive,
    Schedule,
    Send,
    Step,
    bubble_fraction,
    length,
    one_f_one_b,
    render,
    render_both,
    simulate,
    stream,
)


def drawn(text: str) -> str:
    return dedent(text).strip("\n")


def test_stream_starts_each_stage_one_forward_later_and_never_pauses():
    assert render(simulate(stream, 3, 2)) == drawn("""
        stage 0 |F0 B0 == F1 B1 ==
        stage 1 |   F0 B0 == F1 B1 ==
        stage 2 |      F0 B0 == F1 B1 ==
    """)


def test_stream_on_one_stage_is_plain_training():
    assert render(simulate(stream, 1, 3)) == "stage 0 |F0 B0 == F1 B1 == F2 B2 =="


def test_1f1b_waits_for_gradients_to_travel_back():
    assert render(simulate(one_f_one_b, 3, 2, gradients_travel_back=True)) == drawn("""
        stage 0 |F0 F1                B0 ==    B1 ==
        stage 1 |   F0 F1       B0 ==    B1 ==
        stage 2 |      F0 B0 == F1 B1 ==
    """)


def test_1f1b_holds_one_forward_more_in_flight_for_every_stage_behind_it():
    assert render(simulate(one_f_one_b, 4, 4, gradients_travel_back=True)) == drawn("""
        stage 0 |F0 F1 F2 F3                   B0 ==    B1 ==    B2 ==    B3 ==
        stage 1 |   F0 F1 F2             B0 == F3 B1 ==    B2 ==    B3 ==
        stage 2 |      F0 F1       B0 == F2 B1 == F3 B2 ==    B3 ==
        stage 3 |         F0 B0 == F1 B1 == F2 B2 == F3 B3 ==
    """)


def test_the_drawing_of_the_readme_has_both_and_their_lengths():
    text = render_both(3, 2)
    assert "gradients travel back                    12 units\nstage 0 |F0 F1 " in text
    assert "learns on its own                        8 units\nstage 0 |F0 B0 ==" in text


@pytest.mark.parametrize(
    ("schedule", "travel_back", "units", "bubble"),
    [(one_f_one_b, True, 33, 3 / 11), (stream, False, 27, 1 / 9)],
    ids=["1f1b", "stream"],
)
def test_the_bubble_of_4_stages_and_8_micro_batches(
    schedule: Schedule, travel_back: bool, units: int, bubble: float
):
    """27.3 % and 11.1 % of one flushed step: (S-1) / (M+S-1), and a third of the ramp alone."""
    slots = simulate(schedule, 4, 8, gradients_travel_back=travel_back)
    assert length(slots) == units
    assert bubble_fraction(slots) == pytest.approx(bubble)


def test_an_unflushed_stream_has_no_bubble_but_the_first():
    """Steps follow each other without a gap, so many steps are one long one."""
    assert bubble_fraction(simulate(stream, 4, 800)) < 0.002


@pytest.mark.parametrize("stages", range(1, 6))
@pytest.mark.parametrize("micro_batches", [1, 2, 7])
@pytest.mark.parametrize("schedule", [stream, one_f_one_b])
def test_no_shape_deadlocks(schedule: Schedule, stages: int, micro_batches: int):
    for travel_back in (False, True):
        slots = simulate(schedule, stages, micro_batches, gradients_travel_back=travel_back)
        assert len(slots) == 2 * stages * micro_batches


def test_stream_under_backprop_would_still_end_but_one_micro_batch_at_a_time():
    assert length(simulate(stream, 3, 2, gradients_travel_back=True)) == 2 * 9


def test_a_rank_with_two_stages_frees_one_before_it_begins_the_other():
    assert list(stream([0, 1], 3, 1)) == [
        Load(0), Forward(0, 0), Backward(0, 0), Step(0),
        Forward(1, 0), Send(0), Backward(1, 0), Step(1),
    ]  # fmt: skip


def test_all_micro_batches_go_through_a_stage_and_its_step_before_the_next_one_begins():
    assert list(stream([1, 2], 4, 2)) == [
        Receive(0), Forward(1, 0), Backward(1, 0), Receive(1), Forward(1, 1), Backward(1, 1),
        Step(1),
        Forward(2, 0), Send(0), Backward(2, 0), Forward(2, 1), Send(1), Backward(2, 1),
        Step(2),
    ]  # fmt: skip


def test_without_step_in_backward_a_micro_batch_goes_through_all_stages_first():
    assert list(stream([0, 1], 2, 2, step_in_backward=False)) == [
        Load(0), Forward(0, 0), Backward(0, 0), Forward(1, 0), Backward(1, 0),
        Load(1), Forward(0, 1), Backward(0, 1), Step(0), Forward(1, 1), Backward(1, 1), Step(1),
    ]  # fmt: skip


def test_the_last_rank_receives_and_sends_nothing_on():
    assert list(stream([2], 3, 1)) == [Receive(0), Forward(2, 0), Backward(2, 0), Step(2)]


def test_the_output_leaves_before_the_backward_begins():
    actions = list(stream([1], 3, 2))
    for n in range(2):
        assert actions.index(Send(n)) < actions.index(Backward(1, n))


def backward_first(local: Sequence[int], stages: int, count: int) -> Iterator[Action]:
    for n in range(count):
        yield Backward(local[0], n)
        yield Forward(local[0], n)


def forgets_one(local: Sequence[int], stages: int, count: int) -> Iterator[Action]:
    yield from list(stream(local, stages, count))[:-2]


def twice(local: Sequence[int], stages: int, count: int) -> Iterator[Action]:
    yield from stream(local, stages, count)
    yield Forward(local[0], 0)


def test_a_schedule_that_can_never_go_on_is_a_deadlock():
    with pytest.raises(ScheduleError, match=r"deadlock.*Backward"):
        simulate(backward_first, 2, 2)


@pytest.mark.parametrize("schedule", [forgets_one, twice])
def test_a_schedule_that_skips_or_repeats_work_is_refused(schedule: Schedule):
    with pytest.raises(ScheduleError, match=r"stage 0 computes .* 2 micro-batches need 4"):
        simulate(schedule, 2, 2)
