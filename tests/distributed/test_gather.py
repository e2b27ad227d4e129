"""The rows of all data-parallel ranks are compared as if one rank had them all."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.distributed.collectives import average_gradients
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.rows import row_gatherer
from scpl_ds.objectives._base import GatherRows, ObjectiveOutput
from scpl_ds.objectives.supcon import SupCon, SupConOptions
from tests.support import runs
from tests.support.distributed import distributed, fork_rank, wait_for
from tests.support.reference import Batch

pytestmark = pytest.mark.forks

WIDTH = 8
WHOLE = 2 * runs.MICRO_BATCH


def gatherer(mesh: Mesh) -> GatherRows:
    gather = row_gatherer(mesh)
    assert gather is not None
    return gather


# ------------------------------------------------------------------------------ the function


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numbers", [(3, 3, 3), (1, 4, 2), (0, 2, 5), (0, 0, 0), (1, 1, 1)])
@distributed(3)
def test_all_ranks_see_all_rows_in_rank_order_to_the_bit(
    numbers: tuple[int, ...], dtype: torch.dtype
) -> None:
    mesh = Mesh(1, 3, "cpu", timeout_s=20)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, WIDTH - 1, generator=generator).to(dtype) for n in numbers]
    classes = [torch.arange(n) - 100 * rank for rank, n in enumerate(numbers)]
    own = parts[mesh.dp_rank].clone().requires_grad_()
    rows = gatherer(mesh)(own, classes[mesh.dp_rank])
    assert rows.features.dtype == dtype and not rows.features.requires_grad
    assert torch.equal(rows.features, torch.cat(parts))
    assert torch.equal(rows.labels, torch.cat(classes))
    assert (rows.first, rows.ranks) == (sum(numbers[: mesh.dp_rank]), 3)
    assert rows.with_own(own).requires_grad
    assert torch.equal(rows.with_own(own), torch.cat(parts))


@distributed(2)
def test_one_data_parallel_rank_has_nobody_to_ask() -> None:
    assert row_gatherer(Mesh(2, 1, "cpu", timeout_s=20)) is None


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_is_named_by_those_that_wait_for_its_rows(
    tmp_path: Path, victim: int
) -> None:
    """The timeout is an hour: it is not what ends them."""

    def body() -> None:
        mesh = Mesh(1, 2, "cpu", timeout_s=3600)
        gatherer(mesh)(torch.ones(2, WIDTH), torch.zeros(2).long())
        if mesh.rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        gatherer(mesh)(torch.ones(2, WIDTH), torch.zeros(2).long())

    pids = {fork_rank(rank, 2, tmp_path, body): rank for rank in range(2)}
    began = time.monotonic()
    failed = dict(wait_for(pids, limit_s=60))
    assert time.monotonic() - began < 20
    assert failed == {victim: "signal 9", 1 - victim: "exit code 1"}
    said = (tmp_path / f"error-{1 - victim}").read_text()
    assert "BoundaryError" in said
    assert f"rank {1 - victim} could not compare rows with ranks [0, 1] of its stage" in said


# ----------------------------------------------------------------------------- the objective


def objective(**options: Any) -> SupCon:
    torch.manual_seed(0)
    return SupCon(SupConOptions(**options), hidden_size=WIDTH, num_labels=3)


def rows_of(numbers: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(sum(numbers), 4, WIDTH, generator=generator)
    labels = torch.randint(0, 3, (sum(numbers),), generator=generator)
    return list(hidden.split(numbers)), list(labels.split(numbers))


def backward(head: SupCon, hidden: Tensor, labels: Tensor) -> tuple[ObjectiveOutput, Tensor]:
    leaf = hidden.clone().requires_grad_()
    output = head(leaf, attention_mask=None, labels=labels)
    output.loss.backward()
    assert leaf.grad is not None
    return output, leaf.grad


@pytest.mark.parametrize("pos_norm, chunk_size", [("paper", 1024), ("khosla", 1024), ("paper", 3)])
@pytest.mark.parametrize(
    "numbers, ignored",
    [((4, 4), None), ((5, 1), None), ((1, 6), None), ((6, 0), None), ((4, 3), 1), ((3, 3), 0)],
    ids=["even", "ragged", "a single row", "no row", "last rank ignored", "first rank ignored"],
)
@distributed(2)
def test_loss_metrics_and_averaged_gradients_are_those_of_all_rows_on_one_rank(
    numbers: tuple[int, ...], ignored: int | None, pos_norm: str, chunk_size: int
) -> None:
    mesh = Mesh(1, 2, "cpu", timeout_s=20)
    hidden, labels = rows_of(numbers)
    if ignored is not None:
        labels[ignored] = torch.full_like(labels[ignored], -100)
    options = {"gather": True, "pos_norm": pos_norm, "chunk_size": chunk_size}
    alone, together = (objective(**options) for _ in range(2))
    wanted, wanted_gradient = backward(alone, torch.cat(hidden), torch.cat(labels))
    together.gather_rows = row_gatherer(mesh)
    found, gradient = backward(together, hidden[mesh.dp_rank], labels[mesh.dp_rank])
    average_gradients(list(together.parameters()), mesh)

    assert torch.equal(
        found.metrics["valid_anchor_fraction"], wanted.metrics["valid_anchor_fraction"]
    )
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-6, atol=0)
    # Products of another shape add up in another order, on one processor more so than on another;
    # a wrong gradient would be off by a thousand times as much.
    own = wanted_gradient.split(numbers)[mesh.dp_rank]
    torch.testing.assert_close(gradient / mesh.dp_size, own, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@distributed(2)
def test_bfloat16_features_are_gathered_as_they_are_and_compared_in_float32() -> None:
    mesh = Mesh(1, 2, "cpu", timeout_s=20)
    hidden, labels = rows_of((4, 3))
    alone, together = (objective(gather=True).to(torch.bfloat16) for _ in range(2))
    wanted, _ = backward(alone, torch.cat(hidden).bfloat16(), torch.cat(labels))
    together.gather_rows = row_gatherer(mesh)
    found, gradient = backward(together, hidden[mesh.dp_rank].bfloat16(), labels[mesh.dp_rank])
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-5, atol=0)
    assert torch.isfinite(gradient).all() and gradient.any()


@distributed(2)
def test_outside_training_no_other_rank_is_asked() -> None:
    head = objective(gather=True, feature_queue=4).eval()
    head.gather_rows = row_gatherer(Mesh(1, 2, "cpu", timeout_s=20))
    hidden, labels = rows_of((4, 3))
    if dist.get_rank() == 0:  # the other rank would be waited for
        found = head(hidden[0], attention_mask=None, labels=labels[0]).loss
        assert torch.equal(
            found, objective()(hidden[0], attention_mask=None, labels=labels[0]).loss
        )


# -------------------------------------------------------------------------------- the engine


def share(stream: Iterator[Batch], rank: int, size: int) -> Iterator[Batch]:
    """This rank's rows of every micro-batch."""
    for batch in stream:
        rows = len(batch["labels"]) // size
        yield {name: tensor[rank * rows : (rank + 1) * rows] for name, tensor in batch.items()}


GATHER, AND_QUEUE = {"gather": True}, {"gather": True, "feature_queue": 20}
BACKENDS = {
    "none": {},
    "ddp": {"sharding": "ddp"},
    "fsdp": {"sharding": "fsdp", "zero": 3},
    **{f"zero{n}": {"sharding": "deepspeed", "zero": n} for n in range(4)},
}


@pytest.mark.parametrize(
    "stages, pipeline_ranks, detach, options, backend",
    [
        (2, 1, False, GATHER, "none"),
        (2, 1, "both", AND_QUEUE, "none"),
        (4, 2, False, AND_QUEUE, "none"),
        *((2, 1, False, AND_QUEUE, backend) for backend in BACKENDS if backend != "none"),
    ],
)
@distributed(lambda stages: stages)
def test_two_ranks_that_gather_train_as_one_with_the_whole_batch(
    stages: int, pipeline_ranks: int, detach: bool | str, options: dict, backend: str
) -> None:
    """5 steps, accumulation 2, clipping on, no dropout (its masks are a rank's own): the same ranks
    as two data-parallel halves, and as a pipeline of one stage each."""
    weights, losses = [], []
    for ranks, sharding in ((pipeline_ranks, BACKENDS[backend]), (stages, BACKENDS["none"])):
        engine = runs.engine(
            stages, accumulation=2, pipeline_ranks=ranks, detach=detach, objective=options,
            dropout=0.0, eps=1e-4, **sharding,
        )  # fmt: skip
        data = share(runs.batches(WHOLE), engine.mesh.dp_rank, engine.mesh.dp_size)
        told = {}
        for _ in range(5):
            engine.train_batch(data)
            told = {name: float(value) for name, value in engine.metrics().items()}
        engine.drain()
        losses.append(told)
        weights.append(runs.weights_of_engine(engine))
    halves, whole = weights
    runs.assert_equal(whole, halves, rtol=1e-5, atol=1e-6)
    own = f"stage{dist.get_rank()}/"
    for name, value in losses[1].items():
        # The last stage's task loss is a rank's own.
        if name.startswith(own) and dist.get_rank() < stages - 1:
            assert losses[0][name] == pytest.approx(value, rel=1e-5)


@distributed(2)
def test_gathered_gradients_equal_the_plain_loops_over_the_whole_batch() -> None:
    options = {"objective": {"gather": True}, "dropout": 0.0}
    engine = runs.engine(2, pipeline_ranks=1, **options)
    mesh = engine.mesh
    batch = MicroBatch(next(share(runs.batches(WHOLE), mesh.dp_rank, 2)), Tag(0, 0, 0))
    for stage in engine.stages:
        batch = stage.forward(batch)
        assert stage._loss is not None
        stage.backend.backward(stage._loss, last=True)
    loop = runs.plain_loop(engine, **options)
    loop.gradients(0, runs.batches(WHOLE))
    for stage, body, head in zip(engine.stages, loop.bodies, loop.heads, strict=True):
        average_gradients(list(stage.module.parameters()), mesh)
        for own, theirs in ((stage.module.body, body), (stage.module.objective, head)):
            if theirs is None:
                continue
            assert isinstance(own, torch.nn.Module)
            pairs = zip(own.named_parameters(), theirs.parameters(), strict=True)
            for (name, ours), wanted in pairs:
                assert ours.grad is not None and wanted.grad is not None, name
                torch.testing.assert_close(
                    ours.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}"
                )


@distributed(1)
def test_with_one_rank_gathering_changes_nothing_to_the_bit() -> None:
    weights = []
    for gather in (True, False):
        engine = runs.engine(2, objective={"gather": gather})
        data = runs.batches()
        for _ in range(4):
            engine.train_batch(data)
        weights.append(runs.weights_of_engine(engine))
    runs.assert_equal(weights[0], weights[1])


@distributed(2)
def test_ranks_with_micro_batches_of_different_sizes_train_on() -> None:
    """A user's last batch: the rows of both are compared, and the ranks stay equal."""
    engine = runs.engine(2, pipeline_ranks=1, objective={"gather": True, "feature_queue": 9})
    for step in range(3):
        rows = runs.MICRO_BATCH - 2 * step * engine.mesh.dp_rank
        engine.train_batch(runs.batches(rows, seed=step))
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, runs.weights_of_engine(engine))
    runs.assert_equal(everyone[0], everyone[1])
