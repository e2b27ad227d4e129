"""A profiled run on two ranks: what its trace, its picture and its numbers say of it."""

from __future__ import annotations

import collections
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.trainer import fit
from tests.support.distributed import run_ranks
from tests.support.tiny import recipe_for

pytestmark = pytest.mark.forks

STEPS, MICRO_BATCHES, PROFILED = 4, 2, (2, 3)
SHARES = {
    "busy", "optimizer", "wait_input", "wait_send", "wait_sync", "data", "other",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps of 2 micro-batches on 2 ranks, evaluated and saved after every second step."""
    folder = tmp_path_factory.mktemp("profile") / "run"
    changes = {
        "deepspeed.gradient_accumulation_steps": MICRO_BATCHES,
        "train.profile": True,
        "train.profile_steps": PROFILED,
        "train.eval_steps": 2,
        "train.save_steps": 2,
        "trackers": [{"name": "jsonl"}],
    }
    recipe = recipe_from_mapping(recipe_for(base, "none", folder, **changes))
    run_ranks(2, lambda: fit(recipe) and None)
    return folder


@pytest.fixture(scope="module")
def actions(run: Path) -> list[dict[str, Any]]:
    trace = json.loads((run / "profile" / "trace.json").read_text())
    return [e for e in trace["traceEvents"] if e["ph"] == "X"]


def test_the_trace_has_stages_times_micro_batches_of_the_profiled_steps(
    actions: list[dict[str, Any]],
):
    for kind in ("forward", "backward"):
        found = collections.Counter(
            (e["pid"], e["args"]["stage"], e["args"]["step"], e["args"]["micro_batch"])
            for e in actions
            if e["cat"] == kind
        )
        wanted = itertools.product((0, 1), PROFILED, range(MICRO_BATCHES))
        assert found == {(stage, stage, step, n): 1 for stage, step, n in wanted}
    steps = sorted((e["pid"], e["args"]["step"]) for e in actions if e["cat"] == "step")
    assert steps == sorted(itertools.product((0, 1), PROFILED))


def test_a_rank_does_one_thing_at_a_time(actions: list[dict[str, Any]]):
    for rank in (0, 1):
        own = sorted((e["ts"], e["ts"] + e["dur"]) for e in actions if e["pid"] == rank)
        assert len(own) > 10
        for (_, end), (start, _) in itertools.pairwise(own):
            assert end <= start + 0.002  # microseconds, rounded to a nanosecond


def test_what_was_sent_is_received_later_on_the_same_clock(run: Path):
    trace = json.loads((run / "profile" / "trace.json").read_text())
    starts = {e["id"]: e for e in trace["traceEvents"] if e["ph"] == "s"}
    ends = {e["id"]: e for e in trace["traceEvents"] if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == len(PROFILED) * MICRO_BATCHES
    for number, start in starts.items():
        assert (start["pid"], ends[number]["pid"]) == (0, 1)
        assert start["ts"] < ends[number]["ts"]


def test_the_shares_of_each_rank_sum_to_one_and_are_in_the_result(run: Path):
    result = json.loads((run / "result.json").read_text())
    told = json.loads((run / "profile" / "shares.json").read_text())
    assert [each["rank"] for each in result["time_shares"]] == [0, 1]
    assert [each["stages"] for each in result["time_shares"]] == [[0], [1]]
    for each, again in zip(result["time_shares"], told["ranks"], strict=True):
        assert sum(each[name] for name in SHARES) == pytest.approx(1.0)
        assert each["busy"] > 0 and each["optimizer"] > 0
        assert all(again[name] == each[name] for name in SHARES)
    first, last = result["time_shares"]
    assert first["wait_input"] == last["wait_send"] == last["data"] == 0 < first["data"]
    bubbles = [each["bubble_fraction"] for each in result["time_shares"]]
    assert result["bubble_fraction"] == told["bubble_fraction"] == pytest.approx(sum(bubbles) / 2)
    assert told["clock_error_s"] == 0  # one machine


def test_every_logging_step_has_the_shares_of_its_window_for_each_rank(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        for rank in (0, 1):
            own = [row[f"perf/rank{rank}/{name}"] for name in SHARES]
            assert sum(own) == pytest.approx(1.0) and row[f"perf/rank{rank}/busy"] > 0
        for name in (*SHARES, "bubble_fraction"):
            both = [row[f"perf/rank{rank}/{name}"] for rank in (0, 1)]
            assert row[f"perf/{name}"] == pytest.approx(sum(both) / 2)


def test_evaluating_and_saving_count_nowhere(run: Path):
    """They take longer than these steps: counted, they would be most of `other`."""
    result = json.loads((run / "result.json").read_text())
    assert all(each["other"] < 0.3 for each in result["time_shares"])


def test_the_picture_shows_both_stages(run: Path):
    picture = ET.fromstring((run / "profile" / "timeline.svg").read_text())
    texts = {e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"run: steps 2 to 3", "stage 0 (layers 0-1)", "stage 1 (layers 2-3)"} <= texts


def test_the_first_profiled_step_comes_before_the_last(base: dict[str, Any], tmp_path: Path):
    recipe = recipe_for(base, "none", tmp_path / "run", **{"train.profile_steps": (5, 4)})
    with pytest.raises(Exception, match=r"profile_steps.*the first step comes after the last"):
        recipe_from_mapping(recipe)
