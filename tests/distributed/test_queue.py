"""The feature queue of a running engine: resumed, rolled back, equal on all ranks of a stage."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import scpl_ds
from scpl_ds.batch import MicroBatch, Tag
from tests.support import runs
from tests.support.distributed import distributed

pytestmark = pytest.mark.forks

STEPS = 3
QUEUE = {"objective": {"feature_queue": 16}}
FEATURES, LABELS = (f"scpl_heads.layer_1.queue.{name}" for name in ("features", "labels"))


def trained(steps: int, **options: Any) -> scpl_ds.Engine:
    engine = runs.engine(2, **options)
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, engine.mesh.dp_size)
    for _ in range(steps):
        engine.train_batch(data)
    return engine


@pytest.mark.parametrize(
    "backend", [{}, {"sharding": "deepspeed", "zero": 1}], ids=["none", "zero1"]
)
@pytest.mark.parametrize("ranks, dp", [(1, 1), (2, 1), (1, 2)])
@distributed(lambda ranks, dp: ranks * dp)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit_queue_and_all(
    tmp_path: Path, ranks: int, dp: int, backend: dict
) -> None:
    options = {"accumulation": 2, "pipeline_ranks": ranks, **QUEUE, **backend}
    whole = trained(2 * STEPS, **options)
    trained(STEPS, **options).save_checkpoint(tmp_path)
    resumed = runs.engine(2, **options)
    resumed.load_checkpoint(tmp_path)
    lane = runs.lane(runs.batches(), resumed.mesh.dp_rank, dp)
    data = itertools.islice(lane, 2 * STEPS, None)
    for _ in range(STEPS):
        resumed.train_batch(data)
    resumed.drain()
    found = runs.weights_of_engine(resumed)
    runs.assert_equal(found, runs.weights_of_engine(whole))
    if resumed.is_first_stage():
        assert (found[LABELS] != -100).all() and found[FEATURES].any(dim=1).all()


@pytest.mark.parametrize("gather", [False, True])
@distributed(2)
def test_rows_of_all_data_parallel_ranks_enter_in_rank_order(gather: bool) -> None:
    """Also where the ranks compare only their own rows with it: the queue is equal on all ranks."""
    objective = {"feature_queue": 16, "gather": gather}
    engine = trained(1, pipeline_ranks=1, objective=objective)
    own = runs.weights_of_engine(engine)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, own)
    runs.assert_equal(everyone[0], everyone[1])
    labels = torch.cat([b["labels"] for b in itertools.islice(runs.batches(), 2)])
    assert own[LABELS].tolist() == [-100] * 4 + labels.tolist()


@pytest.mark.parametrize("ranks", [1, 2])
@distributed(lambda ranks: ranks)
def test_a_step_that_is_not_finished_leaves_no_trace_in_the_queue(ranks: int) -> None:
    """Accumulation 2, three micro-batches, then one more step: as if the third never came."""
    queues = []
    for numbers in ([0, 1, 2], [0, 1]):
        engine = runs.engine(2, accumulation=2, **QUEUE)
        batches = list(itertools.islice(runs.batches(), 5))
        epoch = iter([batches[n] for n in numbers])
        engine.train_batch(epoch)
        if len(numbers) == 3:
            with pytest.raises(StopIteration):
                engine.train_batch(epoch)
        engine.train_batch(iter(batches[3:]))
        engine.drain()
        queues.append(runs.weights_of_engine(engine))
    runs.assert_equal(queues[0], queues[1])


@distributed(1)
def test_evaluation_leaves_the_queue_alone() -> None:
    engine = trained(1, **QUEUE)
    before = runs.weights_of_engine(engine)
    engine.eval_batch(runs.batches(), num_micro_batches=2)
    runs.assert_equal(runs.weights_of_engine(engine), before)


@pytest.mark.parametrize("saved", [0, 8, 32])
@distributed(1)
def test_a_checkpoint_with_no_queue_or_another_loads_with_an_empty_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    monkeypatch.setattr(logging.getLogger("scpl_ds"), "propagate", True)
    before = trained(STEPS, objective={"feature_queue": saved})
    before.save_checkpoint(tmp_path)
    engine = trained(1, **QUEUE)  # its queue is not empty
    engine.load_checkpoint(tmp_path)
    found, wanted = runs.weights_of_engine(engine), runs.weights_of_engine(before)
    assert (found.pop(LABELS) == -100).all() and not found.pop(FEATURES).any()
    runs.assert_equal(found, wanted)
    assert "stage 0" in caplog.text and f"{LABELS} [16]" in caplog.text
    assert "starts with an empty memory" in caplog.text
    engine.train_batch(runs.batches())


@distributed(1)
def test_a_checkpoint_with_a_queue_loads_without_one(tmp_path: Path) -> None:
    trained(STEPS, **QUEUE).save_checkpoint(tmp_path)
    engine = runs.engine(2)
    engine.load_checkpoint(tmp_path)
    engine.train_batch(runs.batches())


@distributed(1)
def test_loading_in_the_middle_of_a_step_gives_the_saved_queue(tmp_path: Path) -> None:
    engine = trained(STEPS, **QUEUE)
    engine.save_checkpoint(tmp_path)
    saved = runs.weights_of_engine(engine)
    engine.stages[0].forward(MicroBatch(next(runs.batches(seed=8)), Tag(STEPS, 0, 0)))
    assert not torch.equal(runs.weights_of_engine(engine)[FEATURES], saved[FEATURES])
    engine.load_checkpoint(tmp_path)
    engine.stages[0].discard_step()
    runs.assert_equal(runs.weights_of_engine(engine), saved)
