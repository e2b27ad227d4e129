"""What crosses a boundary, and what happens when it does not."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, Expected
from scpl_ds.errors import BoundaryError, RecipeError
from tests.support import runs
from tests.support.distributed import distributed, fork_rank, wait_for

pytestmark = pytest.mark.forks


def channel(max_in_flight: int = 2, timeout_s: float = 20) -> BoundaryChannel:
    mesh = Mesh(dist.get_world_size(), 1, "cpu", timeout_s=timeout_s)
    return BoundaryChannel(mesh, torch.device("cpu"), max_in_flight=max_in_flight)


def micro_batch(step: int, n: int, batch_id: int, *, length: int = 5) -> MicroBatch:
    generator = torch.Generator().manual_seed(batch_id)
    return MicroBatch(
        {
            "input_ids": torch.randint(0, 9, (3, length), generator=generator),
            "attention_mask": torch.ones(3, length, dtype=torch.bool),
            "labels": torch.arange(3),
        },
        Tag(step, n, batch_id),
        torch.randn(3, length, 4, generator=generator).to(torch.bfloat16),
        {"weights": torch.rand(3, dtype=torch.float64, generator=generator)},
    )


@distributed(2)
def test_a_micro_batch_arrives_as_it_was_sent_whatever_its_shapes_and_dtypes() -> None:
    lengths = [5, 1, 9, 5]
    boundary = channel()
    for n, length in enumerate(lengths):
        batch = micro_batch(0, n, n, length=length)
        if dist.get_rank() == 0:
            boundary.send(batch, "train")
            continue
        found = boundary.receive(Expected("train", 0, n))
        assert found.tag == batch.tag
        assert found.hidden_states is not None and batch.hidden_states is not None
        assert torch.equal(found.hidden_states, batch.hidden_states)
        assert found.hidden_states.dtype == torch.bfloat16
        for mine, theirs in ((found.inputs, batch.inputs), (found.extras, batch.extras)):
            assert list(mine) == list(theirs)
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
            assert all(mine[key].dtype == theirs[key].dtype for key in mine)
    boundary.drain()


@distributed(2)
def test_an_empty_tensor_crosses_a_boundary() -> None:
    boundary = channel()
    batch = MicroBatch({"input_ids": torch.zeros(0, 7).long()}, Tag(0, 0, 0), torch.zeros(0, 7, 4))
    if dist.get_rank() == 0:
        boundary.send(batch, "train")
        boundary.drain()
    else:
        found = boundary.receive(Expected("train", 0, 0))
        assert found.inputs["input_ids"].shape == (0, 7)


@pytest.mark.parametrize(
    "sent, expected",
    [((3, 0, 0), (2, 0)), ((2, 1, 0), (2, 0)), ((2, 0, 0), (2, 1))],
    ids=["another step", "another micro-batch", "expected another"],
)
@distributed(2)
def test_another_micro_batch_than_expected_is_an_error_that_names_both(
    sent: tuple[int, int, int], expected: tuple[int, int]
) -> None:
    boundary = channel()
    if dist.get_rank() == 0:
        boundary.send(micro_batch(*sent), "train")
        boundary.drain()
        return
    step, n = expected
    message = rf"expected micro-batch {n} of train step {step}.*micro-batch {sent[1]} of train step"
    with pytest.raises(BoundaryError, match=message):
        boundary.receive(Expected("train", *expected))


@distributed(2)
def test_a_lost_batch_is_noticed_by_its_running_number() -> None:
    boundary = channel()
    if dist.get_rank() == 0:
        boundary.send(micro_batch(0, 0, 7), "train")
        boundary.send(micro_batch(0, 1, 9), "train")
        boundary.drain()
        return
    boundary.receive(Expected("train", 0, 0))
    with pytest.raises(BoundaryError, match=r"batch 8.*batch 9"):
        boundary.receive(Expected("train", 0, 1))


@distributed(2)
def test_a_train_batch_is_not_taken_for_an_eval_batch() -> None:
    boundary = channel()
    if dist.get_rank() == 0:
        boundary.send(micro_batch(0, 0, 0), "eval")
        boundary.drain()
        return
    with pytest.raises(BoundaryError, match="of eval step 0"):
        boundary.receive(Expected("train", 0, 0))


@distributed(2)
def test_a_sender_waits_only_when_max_in_flight_messages_are_untaken() -> None:
    """Rank 1 takes nothing until rank 0 says, through the store, that two sends have returned."""
    boundary = channel(max_in_flight=2)
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        boundary.send(micro_batch(0, 0, 0), "train")
        boundary.send(micro_batch(0, 1, 1), "train")
        assert len(boundary._in_flight) == 2
        store.set("sent", "2")
        boundary.send(micro_batch(0, 2, 2), "train")  # returns once the first has been taken
        assert len(boundary._in_flight) == 2
        boundary.drain()
        assert not boundary._in_flight
        return
    store.wait(["sent"])
    for n in range(3):
        boundary.receive(Expected("train", 0, n))


@distributed(2)
def test_a_silent_neighbour_is_named_with_what_was_waited_for() -> None:
    boundary = channel(timeout_s=1)
    if dist.get_rank() == 1:
        with pytest.raises(
            BoundaryError, match=r"waited \d s for micro-batch 5 of train step 120 from rank 0"
        ):
            boundary.receive(Expected("train", 120, 5))
    dist.barrier()


@distributed(3)
def test_the_end_of_the_data_reaches_every_stage_as_stop_iteration() -> None:
    engine = runs.engine(3)
    data = iter([next(runs.batches()) for _ in range(2)])
    engine.train_batch(data)
    engine.train_batch(data)
    with pytest.raises(StopIteration, match="step 2"):
        engine.train_batch(data)
    assert engine.global_steps == 2


def test_a_rank_that_fails_and_leaves_has_told_the_later_ones_why(tmp_path: Path) -> None:
    """Rank 0 raises and its process ends while rank 1 is still computing the step before."""

    def body() -> None:
        engine = runs.engine(3)
        good = next(runs.batches())
        if dist.get_rank() == 1:  # its forward of the good batch takes until rank 0 has raised
            forward, store = engine.stages[0].forward, dist.distributed_c10d._get_default_store()

            def slow(batch: MicroBatch) -> MicroBatch:
                store.wait(["rank 0 has raised"])
                return forward(batch)

            engine.stages[0].forward = slow  # type: ignore[method-assign]
        engine.train_batch(iter([good]))
        if dist.get_rank() == 0:
            store = dist.distributed_c10d._get_default_store()
            send_error = engine.channel.send_error

            def say(message: str) -> None:
                store.set("rank 0 has raised", "")
                send_error(message)

            engine.channel.send_error = say  # type: ignore[method-assign]
        engine.train_batch(iter([{**good, "labels": good["labels"].double()}]))

    pids = {fork_rank(rank, 3, tmp_path, body): rank for rank in range(3)}
    assert sorted(rank for rank, _ in wait_for(pids, limit_s=60)) == [0, 1, 2]
    told = [(tmp_path / f"error-{rank}").read_text() for rank in range(3)]
    assert "label" in told[0] and "BoundaryError" not in told[0]
    for text in told[1:]:
        assert "before it failed with" in text and "label" in text


def test_a_killed_rank_ends_the_others_with_its_name(tmp_path: Path) -> None:
    """Rank 1 of 3 is killed in the middle of training: its neighbours end within seconds."""

    def body() -> None:
        engine = runs.engine(3, max_in_flight=1)
        data = runs.batches()
        while True:
            engine.train_batch(data)
            if engine.global_steps == 3 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    pids = {fork_rank(rank, 3, tmp_path, body): rank for rank in range(3)}
    began = time.monotonic()
    failed = dict(wait_for(pids, limit_s=60))
    assert time.monotonic() - began < 30
    assert failed == {0: "exit code 1", 1: "signal 9", 2: "exit code 1"}
    assert "for micro-batch" in (tmp_path / "error-2").read_text()
    for rank in (0, 2):
        assert "rank 1, which is no longer running" in (tmp_path / f"error-{rank}").read_text()


@distributed(2)
def test_a_mesh_that_does_not_fit_the_world_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"3 pipeline ranks x 1 .* but WORLD_SIZE is 2"):
        Mesh(3, 1, "cpu", timeout_s=5)


@distributed(4)
def test_ranks_are_laid_out_as_deepspeed_does_it() -> None:
    mesh = Mesh(2, 2, "cpu", timeout_s=20)
    rank = dist.get_rank()
    assert (mesh.pp_rank, mesh.dp_rank) == ((0, 0), (0, 1), (1, 0), (1, 1))[rank]
    assert mesh.previous_rank == (None, None, 0, 1)[rank]
    assert mesh.next_rank == (2, 3, None, None)[rank]
    assert mesh.stage_ranks == ([0, 1], [0, 1], [2, 3], [2, 3])[rank]
    assert dist.get_process_group_ranks(mesh.dp_group) == mesh.stage_ranks
