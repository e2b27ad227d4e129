"""What is predicted for many GPUs, beside arithmetic that can be done by hand."""

from __future__ import annotations

import dataclasses

import pytest

from scpl_ds.bench.predict import Cost, Inputs, predict, render
from scpl_ds.errors import ScheduleError

FREE = Inputs(
    layers=8,
    forward=Cost(0, 1),
    backward=Cost(0, 2),
    head=Cost(0, 0),
    step=0,
    parameter_bytes=0,
    boundary_bytes=0,
    bandwidth=1,
    latency=0,
    global_batch=64,
    micro_batch=8,
)
"""24 seconds a sample, everything else free."""


def speed(inputs: Inputs, gpus: int, name: str) -> float:
    (row,) = predict(inputs, [gpus])
    found = row.methods[name]
    assert found is not None
    return found.samples_per_s


@pytest.mark.parametrize("name", ["scpl stream", "DDP or ZeRO-1", "FSDP"])
@pytest.mark.parametrize("gpus", [2, 8, 32])
def test_with_nothing_to_pay_for_streams_and_data_parallelism_scale_perfectly(gpus, name):
    assert speed(FREE, gpus, name) == pytest.approx(gpus / 24)


@pytest.mark.parametrize(("name", "virtual"), [("1F1B", 1), ("interleaved 1F1B", 4)])
def test_a_backprop_pipeline_loses_its_bubble_every_step(name, virtual):
    """Two GPUs, two ranks, 16 micro-batches of four samples: 8 a rank, the most that is tried."""
    wide = dataclasses.replace(FREE, micro_batch=4)
    assert speed(wide, 2, name) == pytest.approx(2 / 24 * (1 - 1 / (virtual * 16 + 1)))


def test_a_local_head_is_paid_by_every_stage_but_the_last():
    """The slowest of the stages has 4 layers and a head: 12 + 12 seconds a sample."""
    assert speed(dataclasses.replace(FREE, head=Cost(0, 12)), 2, "scpl stream") == pytest.approx(
        1 / 24
    )


def test_a_slow_network_is_paid_by_fsdp_and_not_by_a_stream():
    slow = dataclasses.replace(FREE, parameter_bytes=1e3, boundary_bytes=1, bandwidth=10)
    (row,) = predict(slow, [8])
    assert speed(slow, 8, "FSDP") < speed(slow, 8, "scpl stream")
    assert not row.fsdp_is_better and row.verdict().startswith("scpl (")


@pytest.mark.parametrize(("name", "ways"), [("scpl stream", 1), ("1F1B", 2)])
def test_no_pipeline_is_faster_than_its_links(name, ways):
    """A sample takes 100 s on the way, and with backprop its gradient as long; two GPUs."""
    slow = dataclasses.replace(FREE, boundary_bytes=1000, bandwidth=10)
    assert speed(slow, 2, name) <= 1 / (100 * ways)
    if name == "scpl stream":
        assert speed(slow, 2, name) == pytest.approx(1 / 100, rel=0.01)


def test_where_a_head_costs_more_than_the_network_data_parallelism_is_the_better_choice():
    (row,) = predict(dataclasses.replace(FREE, head=Cost(0, 12)), [8])
    assert row.fsdp_is_better and "x scpl" in row.verdict()


def test_more_gpus_than_samples_leave_no_data_parallelism():
    (row,) = predict(FREE, [128])
    assert row.methods["DDP or ZeRO-1"] is None and row.methods["FSDP"] is None
    assert row.verdict() == "scpl; no data parallelism"
    found = row.methods["scpl stream"]
    assert found is not None and found.stages * found.copies == 128 and found.stages <= 8


def test_fixed_costs_make_a_stream_keep_its_micro_batch_large():
    fixed = dataclasses.replace(FREE, forward=Cost(5, 1))
    (row,) = predict(fixed, [4])
    found = row.methods["scpl stream"]
    assert found is not None and found.micro_batch == 8


def test_every_number_of_gpus_gets_a_line_and_a_verdict():
    lines = render(predict(FREE, [2, 4])).splitlines()
    assert lines[0].startswith("Predicted")
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| 2", "| 4"]
    assert all("scpl" in line.split(" | ")[-1] for line in lines[4:])


def test_inputs_that_cannot_be_are_refused():
    with pytest.raises(ScheduleError, match="bandwidth must be greater than 0, got 0"):
        predict(dataclasses.replace(FREE, bandwidth=0))
