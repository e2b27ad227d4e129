"""The streamed run is the sequential loop: same parameters, whatever the ranks."""

from __future__ import annotations

import pytest
import torch

from tests.support import runs
from tests.support.distributed import distributed
from tests.support.reference import average_gradients

pytestmark = pytest.mark.forks

STEPS = 20


@pytest.mark.parametrize(
    "stages, ranks, detach",
    [
        *((k, p, False) for k, p in [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (3, 3), (4, 4)]),
        *((k, p, detach) for k, p in [(2, 1), (2, 2)] for detach in (True, "both")),
    ],
)
@distributed(lambda ranks: ranks)
def test_streamed_parameters_equal_the_plain_loops_to_the_bit_with_dropout(
    stages: int, ranks: int, detach: bool | str
) -> None:
    """20 steps, dropout on, 2 micro-batches a step, clipping and warm-up on; K stages on P
    ranks."""
    engine = runs.engine(stages, accumulation=2, detach=detach)
    data = runs.batches()
    losses, metrics = [], []
    for _ in range(STEPS):
        losses.append(engine.train_batch(data))
        metrics.append(engine.stages[-1].metrics)

    loop = runs.plain_loop(engine, accumulation=2, detach=detach)
    data = runs.batches()
    wanted = [loop.step(number, data) for number in range(STEPS)]

    runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_loop(loop))
    k = engine.stages[-1].index
    optimised = [float(m["loss"]) for m in metrics]
    assert optimised == pytest.approx([w[k] for w in wanted], rel=1e-6)
    task_losses = [float(m.get("head_loss", m["loss"])) for m in metrics]
    assert [float(loss) for loss in losses] == task_losses


@distributed(4)
def test_two_by_two_ranks_equal_two_plain_loops_with_averaged_gradients() -> None:
    engine = runs.engine(2, accumulation=2, pipeline_ranks=2)
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, 2)
    for _ in range(STEPS):
        engine.train_batch(data)

    loops = [runs.plain_loop(engine, accumulation=2, dp_rank=rank) for rank in range(2)]
    lanes = [runs.lane(runs.batches(), rank, 2) for rank in range(2)]
    for number in range(STEPS):
        for loop, own in zip(loops, lanes, strict=True):
            loop.gradients(number, own)
        average_gradients(loops)
        for loop in loops:
            loop.update(number)
    runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_loop(loops[0]))


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("stages, pipeline_ranks, dp", [(2, 1, 1), (2, 2, 1), (2, 2, 2), (4, 2, 2)])
@distributed(lambda pipeline_ranks, dp: pipeline_ranks * dp)
def test_deepspeed_stages_equal_plain_torch_stages(
    stages: int, pipeline_ranks: int, dp: int, zero: int
) -> None:
    """fp32, 10 steps, accumulation 2, clipping on: the same run under both backends.

    Adam's eps is large because the gradient of a key's bias is zero but for rounding, and Adam
    would blow that rounding up to the size of the learning rate.
    """
    weights = []
    for options in ({"sharding": "none"}, {"sharding": "deepspeed", "zero": zero}):
        engine = runs.engine(
            stages, accumulation=2, pipeline_ranks=pipeline_ranks, eps=1e-4, **options
        )
        data = runs.lane(runs.batches(), engine.mesh.dp_rank, dp)
        for _ in range(10):
            engine.train_batch(data)
        engine.drain()
        weights.append(runs.weights_of_engine(engine))
    # ZeRO adds up a flat buffer's norm in another order, so the last bits may differ.
    runs.assert_equal(weights[1], weights[0], rtol=1e-5, atol=1e-6)


def test_no_gradient_crosses_a_boundary() -> None:
    """Stage 0's gradients are its own loss's alone, with the later stages in the same process."""
    from tests.support.distributed import run_ranks

    def body() -> None:
        whole, alone = runs.engine(2), runs.engine(2)
        batch = next(runs.batches())
        for engine, stages in ((whole, [0, 1]), (alone, [0])):
            from scpl_ds.batch import MicroBatch, Tag

            current = MicroBatch(batch, Tag(0, 0, 0))
            for k in stages:
                current = engine.stages[k].forward(current)
                assert current.hidden_states is not None
                assert not current.hidden_states.requires_grad
            for k in stages:
                engine.stages[k].backend.backward(engine.stages[k]._loss, last=True)
        for (name, a), (_, b) in zip(
            whole.stages[0].module.named_parameters(),
            alone.stages[0].module.named_parameters(),
            strict=True,
        ):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)

    run_ranks(1, body)
