"""Rates against a clock the test moves by hand."""

from __future__ import annotations

import pytest
import torch

from scpl_ds.meter import MemoryWatch, Meter, peak_memory_gib


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_window_is_what_happened_since_the_last_one(clock):
    meter = Meter(clock=clock)
    meter.update(8, 400)
    meter.update(8, 200)
    clock.now += 4
    first = meter.window()
    meter.update(8, 100)
    clock.now += 1
    second = meter.window()
    assert (first["perf/samples_per_s"], first["perf/tokens_per_s"]) == (4.0, 150.0)
    assert (second["perf/samples_per_s"], second["perf/tokens_per_s"]) == (8.0, 100.0)


def test_the_total_covers_every_window_and_the_open_one_without_closing_it(clock):
    meter = Meter(clock=clock)
    meter.update(8, 80)
    clock.now += 2
    meter.window()
    meter.update(12, 120)
    clock.now += 3
    assert meter.total()["perf/samples_per_s"] == 4.0
    assert meter.total()["perf/tokens_per_s"] == 40.0
    assert meter.seconds == 5.0
    assert meter.window()["perf/samples_per_s"] == 4.0


def test_a_pause_counts_nowhere_even_when_it_ends_in_an_error(clock):
    meter = Meter(clock=clock)
    meter.update(10, 10)
    clock.now += 1
    with pytest.raises(KeyError), meter.paused():
        clock.now += 100
        raise KeyError
    clock.now += 1
    assert meter.window()["perf/samples_per_s"] == 5.0
    assert meter.seconds == 2.0


def test_restart_forgets_everything(clock):
    meter = Meter(clock=clock)
    meter.update(10, 10)
    clock.now += 1
    meter.restart()
    clock.now += 1
    assert meter.total()["perf/samples_per_s"] == 0.0


def test_no_time_passed_gives_zero_and_no_division_error(clock):
    meter = Meter(clock=clock)
    meter.update(10, 10)
    assert meter.window()["perf/tokens_per_s"] == 0.0


def test_peak_memory_on_cpu_sees_what_this_process_touched():
    before = peak_memory_gib(torch.device("cpu"))
    block = torch.ones(int((before + 0.05) * 2**30))  # one byte would do; four make it sure
    del block
    assert 0.05 < before < peak_memory_gib() < 256
    assert Meter().window()["perf/peak_memory_gib"] == peak_memory_gib()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_cuda_is_the_allocators():
    device = torch.device("cuda", 0)
    block = torch.ones(2**28, device=device)
    assert peak_memory_gib(device) == pytest.approx(torch.cuda.max_memory_allocated(device) / 2**30)
    assert peak_memory_gib(device) >= block.numel() * 4 / 2**30


def test_a_memory_watch_counts_from_its_own_beginning():
    watch = MemoryWatch(torch.device("cpu"))
    block = torch.ones(32 * 2**20)  # 128 MiB, written to
    watch.restart()
    assert 0.9 * block.nbytes < watch.peak() < 1.3 * block.nbytes
    assert 0.9 * block.nbytes < watch.now() <= watch.peak() + 2**20


def test_a_paused_memory_watch_keeps_the_peak_before_and_forgets_the_one_inside():
    watch = MemoryWatch(torch.device("cpu"))
    watch.restart()
    torch.ones(32 * 2**20)  # 128 MiB, freed at once
    with watch.paused():
        torch.ones(128 * 2**20)
    assert 120 * 2**20 < watch.peak() < 256 * 2**20
    watch.restart()
    assert watch.peak() < 120 * 2**20
