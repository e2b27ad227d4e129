"""Which samples each step of a run takes that is interrupted twice and goes on with another number
of ranks: those of the run that never was, of data in memory, grouped by length, and streamed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from scpl_ds.data._base import DataSource
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.stream_loader import StreamLoader
from scpl_ds.errors import DataError
from tests.unit.test_data_stream import ROWS, file_of, said, shards, stream_of, texts

GLOBAL_BATCH = 8
STEPS_PER_EPOCH = ROWS // GLOBAL_BATCH
LENGTHS = np.random.default_rng(1).integers(1, 90, ROWS)
Make = Callable[[int, int, int], BatchLoader | StreamLoader]
"""(rank, ranks, micro-batch) -> its loader."""


class Part(NamedTuple):
    """A run until it is interrupted."""

    ranks: int
    micro_batch: int
    steps: int


CHAINS = [
    [Part(1, 4, 3), Part(2, 4, 4), Part(1, 2, 8)],
    [Part(1, 2, 7), Part(2, 2, 1), Part(4, 1, 7)],
    [Part(2, 2, 3), Part(1, 8, 4), Part(4, 2, 8)],
    [Part(4, 2, 6), Part(2, 1, 3), Part(1, 4, 6)],
]
"""Three epochs, each with both interruptions within one."""


def run(make: Make, parts: Iterable[Part]) -> list[list[str]]:
    """What each step's global batch says: micro-batch by micro-batch, rank by rank."""
    steps, saved = [], None
    for part in parts:
        loaders = [make(rank, part.ranks, part.micro_batch) for rank in range(part.ranks)]
        if saved is not None:
            for each in loaders:
                each.restore(saved)
        batches = [iter(each) for each in loaders]
        for _ in range(part.steps):
            micro_batches = GLOBAL_BATCH // (part.micro_batch * part.ranks)
            found = [next(each) for _ in range(micro_batches) for each in batches]
            assert all(len(batch["said"]) == part.micro_batch for batch in found)
            steps.append([text for batch in found for text in batch["said"]])
        saved = json.loads(json.dumps(position_of(loaders)))  # as a checkpoint keeps it
    return steps


def position_of(loaders: list[Any]) -> dict[str, Any]:
    """As ``saved_position`` has it; a rank that reads no data is among those of a stream."""
    if isinstance(loaders[0], BatchLoader):
        assert all(each.position == loaders[0].position for each in loaders)
        return loaders[0].position
    return loaders[0].saved([*(each.position for each in loaders), None])


def uninterrupted(parts: list[Part]) -> list[Part]:
    return [parts[0]._replace(steps=sum(part.steps for part in parts))]


def assert_every_sample_once_an_epoch(steps: list[list[str]]) -> None:
    assert len(steps) == 3 * STEPS_PER_EPOCH
    orders = set()
    for epoch in range(3):
        span = steps[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        seen = list(itertools.chain(*span))
        assert sorted(seen) == sorted(texts())
        orders.add(tuple(seen))
    assert len(orders) == 3


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["random", "grouped"])
@pytest.mark.parametrize("parts", CHAINS, ids=str)
def test_two_interruptions_and_other_ranks_leave_the_order_of_samples_as_it_is(
    parts: list[Part], lengths: np.ndarray | None
):
    rows = texts()

    def make(rank: int, ranks: int, micro_batch: int) -> BatchLoader:
        return BatchLoader(
            rows, micro_batch_size=micro_batch, dp_rank=rank, dp_size=ranks, seed=4, shuffle=True,
            collate=lambda found: {"said": found},  # pyright: ignore
            drop_last=True, global_batch_size=GLOBAL_BATCH, lengths=lengths,
        )  # fmt: skip

    found = run(make, parts)
    assert_every_sample_once_an_epoch(found)
    assert found == run(make, uninterrupted(parts))


def streamed(source: DataSource, *, packing: bool = False, **options: Any) -> Make:
    def make(rank: int, ranks: int, micro_batch: int) -> StreamLoader:
        return StreamLoader(
            stream_of(source, packing=packing, max_length=20 if packing else 24),
            micro_batch_size=micro_batch, dp_rank=rank, dp_size=ranks,
            collate=lambda found: {"said": [said(s) for s in found]},  # pyright: ignore
            global_batch_size=GLOBAL_BATCH, **options,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
@pytest.mark.parametrize("parts", CHAINS, ids=str)
def test_two_interruptions_and_other_ranks_leave_every_global_batch_of_a_stream_as_it_is(
    tmp_path: Path, parts: list[Part], sharded: bool
):
    """It used to be refused: a stream went on with as many data-parallel ranks as before only."""
    make = streamed(shards(tmp_path) if sharded else file_of(tmp_path, "jsonl"))
    found = run(make, parts)
    assert_every_sample_once_an_epoch(found)
    whole = run(make, uninterrupted(parts))
    # Where the size of a micro-batch changes, the lanes of a step come in other turns within it.
    assert [sorted(step) for step in found] == [sorted(step) for step in whole]
    same = [part.micro_batch == parts[0].micro_batch for part in parts for _ in range(part.steps)]
    alike = [k for k, alike in enumerate(same) if alike or parts[0].ranks == 1]
    assert [found[k] for k in alike] == [whole[k] for k in alike]


@pytest.mark.parametrize("how", [{}, {"ahead": 2}, {"num_workers": 1}], ids=str)
def test_rows_packed_on_the_fly_go_on_with_other_ranks(
    tmp_path: Path, how: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("scpl_ds.data.stream.PACKED_TOGETHER", 3)
    source = shards(tmp_path)
    parts = [Part(1, 4, 3), Part(2, 2, 2), Part(1, 4, 2)]
    found = run(streamed(source, packing=True, **how), parts)
    assert found == run(streamed(source, packing=True), uninterrupted(parts))


def test_a_rank_reads_no_more_of_a_stream_than_what_its_micro_batches_need(tmp_path: Path):
    """Four lanes on two ranks are two lanes each; one on two ranks is read by both."""
    make = streamed(file_of(tmp_path, "jsonl"))
    four = [make(rank, 4, 2) for rank in range(4)]
    saved = position_of(four)
    for rank, lanes in enumerate([{0, 2}, {1, 3}]):
        resumed = make(rank, 2, 2)
        resumed.restore(saved)
        assert isinstance(resumed, StreamLoader) and set(resumed.position or {}) == lanes
    one = position_of([make(0, 1, 4)])
    for rank in range(2):
        resumed = make(rank, 2, 4)
        resumed.restore(one)
        assert set(resumed.position or {}) == {0}


def test_a_global_batch_that_the_lanes_of_a_stream_do_not_share_equally_is_refused(tmp_path: Path):
    source = file_of(tmp_path, "jsonl")
    saved = position_of([streamed(source)(rank, 2, 4) for rank in range(2)])
    alone = StreamLoader(
        stream_of(source), micro_batch_size=3, dp_rank=0, dp_size=1, collate=dict,  # pyright: ignore
        global_batch_size=9,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"begun by 2 data-parallel ranks.* batch is 9 samples"):
        alone.restore(saved)
