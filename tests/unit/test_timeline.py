"""Where a rank's time goes, against a clock the test moves by hand; its trace and its picture."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET

import pytest
import torch

from scpl_ds.timeline import KINDS, Kind, Span, Timeline, shares, since
from scpl_ds.timeline_files import (
    RankTimeline,
    clock_offsets,
    name_of,
    render_shares,
    svg,
    trace,
)

SVG = "{http://www.w3.org/2000/svg}"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def act(timeline: Timeline, clock: Clock, kind: Kind, seconds: float, **where: int) -> None:
    start = timeline.begin(kind)
    clock.now += seconds
    timeline.end(kind, start, **{"stage": 0, "step": 0, "micro_batch": 0, **where})


# -- the timeline --------------------------------------------------------------------------


def test_a_rank_that_waits_half_the_time_has_a_bubble_of_one_half(clock: Clock):
    timeline = Timeline(clock=clock)
    for _ in range(3):
        act(timeline, clock, "receive", 2.0)
        act(timeline, clock, "forward", 0.5)
        act(timeline, clock, "backward", 1.0)
        act(timeline, clock, "step", 0.5)
    found = shares(timeline.totals())
    assert found["bubble_fraction"] == found["wait_input"] == 0.5
    assert (found["busy"], found["optimizer"], found["other"]) == (0.375, 0.125, 0.0)


def test_every_share_but_the_bubble_adds_up_to_the_whole(clock: Clock):
    timeline = Timeline(clock=clock)
    for number, kind in enumerate(KINDS, 1):
        act(timeline, clock, kind, float(number))
    clock.now += 8.0  # in none of them
    found = shares(timeline.totals())
    bubble = found.pop("bubble_fraction")
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["other"] == 8.0 / sum(range(1, 9))
    assert bubble == found["wait_input"] + found["wait_send"] + found["wait_sync"] > 0


def test_a_pause_counts_nowhere(clock: Clock):
    timeline = Timeline(clock=clock)
    act(timeline, clock, "forward", 1.0)
    clock.now += 100.0
    timeline.pause(100.0)
    act(timeline, clock, "receive", 1.0)
    assert timeline.totals()["total"] == 2.0
    assert shares(timeline.totals())["bubble_fraction"] == 0.5


def test_a_window_is_what_came_after_its_beginning(clock: Clock):
    timeline = Timeline(clock=clock)
    act(timeline, clock, "forward", 9.0)
    before = timeline.totals()
    act(timeline, clock, "receive", 3.0)
    act(timeline, clock, "forward", 1.0)
    found = shares(since(before, timeline.totals()))
    assert (found["wait_input"], found["busy"]) == (0.75, 0.25)


def test_actions_are_kept_only_while_asked_for_and_counted_always(clock: Clock):
    timeline = Timeline(clock=clock)
    for step, keep in enumerate([False, True, True, False]):
        timeline.keep = keep
        act(timeline, clock, "forward", 1.0, step=step)
    assert [span.step for span in timeline.spans()] == [1, 2]
    assert timeline.spans()[0] == Span("forward", 0, 1, 0, 1001.0, 1002.0)
    assert timeline.totals()["forward"] == 4.0


def test_a_timeline_that_has_just_begun_divides_by_nothing(clock: Clock):
    assert set(shares(Timeline(clock=clock).totals()).values()) == {0.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_hosts_wait_counts_only_where_the_device_was_idle():
    """The host issues in microseconds what the device computes in many milliseconds."""
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    timeline = Timeline(device=device, keep=True)
    for step in range(3):
        start = timeline.begin("forward")
        for _ in range(50):
            a @ a  # pyright: ignore[reportUnusedExpression]
        timeline.end("forward", start, stage=0, step=step, micro_batch=0)
        start = timeline.begin("receive")
        torch.cuda.synchronize(device)
        timeline.end("receive", start, stage=-1, step=step, micro_batch=0)
    found = shares(timeline.totals())
    assert found["busy"] > 0.8 and found["wait_input"] < 0.1
    computed = [span for span in timeline.spans() if span.kind == "forward"]
    assert len(computed) == 3
    assert all(a.end <= b.start + 1e-4 for a, b in itertools.pairwise(computed))


# -- clocks of several machines ------------------------------------------------------------


def test_offsets_between_clocks_are_found_within_the_error_they_state():
    """Rank 1's clock is 5 s ahead; all leave a barrier a little after the last one entered."""
    true_offset = [0.0, 5.0]
    enter = [[10.0, 11.2, 12.0], [10.3, 11.0, 12.1]]  # on rank 0's clock
    leave = [[10.35, 11.21, 12.15], [10.31, 11.27, 12.11]]
    entered, left = (
        [[t + off for t in times] for times, off in zip(table, true_offset, strict=True)]
        for table in (enter, leave)
    )
    for (found, error), true in zip(clock_offsets(entered, left), true_offset, strict=True):
        assert abs(found - true) <= error <= 0.1


# -- trace and picture ---------------------------------------------------------------------


def streamed(steps: int = 3, micro_batches: int = 2) -> list[RankTimeline]:
    """Two ranks, rank 1 with two stages: forward 10 ms, backward 20 ms, step 5 ms a stage."""
    spans: list[list[Span]] = [[], []]
    ready: dict[tuple[int, int], float] = {}
    for rank, stages in ((0, (0,)), (1, (1, 2))):
        now = 50.0
        for step, n in itertools.product(range(steps), range(micro_batches)):

            def add(kind: Kind, stage: int, ms: float, n=n, step=step, rank=rank) -> None:
                nonlocal now
                now, start = now + ms / 1e3, now
                spans[rank].append(Span(kind, stage, step, n, start, now))

            if rank == 0:
                add("data", -1, 1)
            else:
                add("receive", -1, max(1.0, 1e3 * (ready[step, n] - now)))
            for stage in stages:
                add("forward", stage, 10)
                if rank == 0:
                    add("send", -1, 2)
                    ready[step, n] = now
                add("backward", stage, 20)
            if n == micro_batches - 1:
                for stage in stages:
                    add("step", stage, 5, -1)
    share = shares(dict.fromkeys((*KINDS, "other"), 1.0) | {"total": 8.0})
    return [
        RankTimeline(0, (0,), "0-1", 1, share, spans[0]),
        RankTimeline(1, (1, 2), "2-5", None, share, spans[1]),
    ]


def test_every_span_is_one_complete_event_of_its_rank():
    ranks = streamed()
    events = [e for e in trace(ranks)["traceEvents"] if e["ph"] == "X"]
    assert len(events) == sum(len(each.spans) for each in ranks)
    found = {(e["pid"], e["name"], e["cat"], e["args"]["stage"]) for e in events}
    assert found == {(r.rank, name_of(s), s.kind, s.stage) for r in ranks for s in r.spans}
    forward = next(e for e in events if e["name"] == "F 1.0" and e["pid"] == 0)
    assert (forward["ts"], forward["dur"]) == (1000.0, 10000.0)  # after 1 ms of loading
    assert forward["args"] == {"step": 1, "micro_batch": 0, "stage": 0}


def test_a_rank_is_a_process_named_by_its_stages_and_layers():
    names = {
        e["pid"]: e["args"]["name"]
        for e in trace(streamed())["traceEvents"]
        if e["name"] == "process_name"
    }
    assert names == {0: "rank 0: stage 0 (layers 0-1)", 1: "rank 1: stages 1, 2 (layers 2-5)"}


def test_every_send_has_an_arrow_to_its_receive_and_no_other():
    events = trace(streamed())["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    slices = [e for e in events if e["ph"] == "X"]

    def under(arrow: dict) -> dict:
        (found,) = (
            e for e in slices
            if (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])
            and e["ts"] <= arrow["ts"] < e["ts"] + e["dur"]
        )  # fmt: skip
        return found

    assert starts.keys() == ends.keys() and len(starts) == 6
    for number, start in starts.items():
        sent, received = under(start), under(ends[number])
        assert (sent["cat"], received["cat"]) == ("send", "receive")
        assert (sent["pid"], received["pid"]) == (0, 1)
        for key in ("step", "micro_batch"):
            assert sent["args"][key] == received["args"][key]
        assert start["ts"] < ends[number]["ts"]


def test_a_send_whose_receive_was_not_kept_has_no_arrow():
    first, second = streamed()
    second = second._replace(spans=[s for s in second.spans if s.kind != "receive"])
    assert not [e for e in trace([first, second])["traceEvents"] if e["ph"] in "sf"]


def test_events_of_one_thread_do_not_overlap_and_the_trace_is_json():
    data = json.loads(json.dumps(trace(streamed())))
    by_thread: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in data["traceEvents"]:
        if e["ph"] == "X":
            place = by_thread.setdefault((e["pid"], e["tid"]), [])
            place.append((e["ts"], e["ts"] + e["dur"]))
    assert len(by_thread) == 5  # three stages, and data and messages of two ranks
    for places in by_thread.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(places)):
            assert end <= start + 0.002  # both are rounded to a nanosecond


def test_the_picture_has_a_lane_a_stage_and_a_box_a_span():
    ranks = streamed()
    picture = ET.fromstring(svg(ranks, title="a <run> & more"))
    boxes = [e for e in picture.iter(f"{SVG}rect") if e.find(f"{SVG}title") is not None]
    drawn = sum(e.get("class") != "lane" for e in boxes)
    # What lies before the first forward and after the last step of the window is cut off.
    assert drawn == sum(len(each.spans) for each in ranks) - 1
    lanes = [e for e in picture.iter(f"{SVG}rect") if e.get("class") == "lane"]
    assert len(lanes) == 3
    texts = [e.text for e in picture.iter(f"{SVG}text")]
    assert "a <run> & more: steps 1 to 3" in texts
    assert texts.count("37.5 %") == 2  # three of eight kinds are waiting, on both ranks
    assert {"stage 0 (layers 0-1)", "forward", "backward", "0 ms"} <= set(texts)


def test_numbers_are_in_the_boxes_that_are_wide_enough_and_no_box_leaves_its_lane():
    picture = ET.fromstring(svg(streamed()))
    lane = next(e for e in picture.iter(f"{SVG}rect") if e.get("class") == "lane")
    left, right = float(lane.get("x", 0)), float(lane.get("x", 0)) + float(lane.get("width", 0))
    for box in picture.iter(f"{SVG}rect"):
        if box.find(f"{SVG}title") is not None:
            x = float(box.get("x", 0))
            assert left <= x and x + float(box.get("width", 0)) <= right + 0.5
    numbers = [e.text for e in picture.iter(f"{SVG}text") if e.get("class") == "in"]
    assert numbers.count("2.1") == 3  # backward, on three stages
    assert numbers.count("1") == 9  # forward, too narrow for the step: three stages and steps
    narrow = svg(streamed(steps=1, micro_batches=200))
    assert 'class="in"' not in narrow


def test_long_profiles_are_drawn_from_their_middle():
    texts = [e.text for e in ET.fromstring(svg(streamed(steps=20))).iter(f"{SVG}text")]
    assert "steps 8 to 12" in texts


def test_a_profile_without_a_step_is_still_a_picture():
    empty = [each._replace(spans=[]) for each in streamed()]
    assert ET.fromstring(svg(empty)).tag == f"{SVG}svg"
    assert [e for e in trace(empty)["traceEvents"] if e["ph"] == "X"] == []


def test_the_table_has_a_row_a_rank():
    share = streamed()[0].shares
    head, row = render_shares([("0: stage 0", share)]).splitlines()
    assert head.split() == [
        "rank", "busy", "optimizer", "wait_input", "wait_send", "wait_sync", "data", "other",
        "bubble",
    ]  # fmt: skip
    assert row.split()[3:] == ["25.0%", *["12.5%"] * 6, "37.5%"]
