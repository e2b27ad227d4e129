"""How a message travels: taken ahead, of any size, rounded on request."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.distributed import links
from scpl_ds.distributed.coding import NAMES, encode, round_trip
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, EndOfData, Expected
from scpl_ds.errors import BoundaryError, RecipeError
from tests.support import runs
from tests.support.distributed import distributed, fork_rank, wait_for

CPU = torch.device("cpu")


def sent(n: int, rows: int) -> MicroBatch:
    hidden = torch.randn(rows, 7, 16, generator=torch.Generator().manual_seed(n))
    return MicroBatch({"input_ids": torch.arange(rows)}, Tag(0, n, n), hidden)


@distributed(2)
def test_messages_larger_and_smaller_than_any_before_arrive_whole() -> None:
    """Around the first room of 64 KiB: inside it, just beyond, far beyond, and back."""
    channel = BoundaryChannel(Mesh(2, 1, "cpu", timeout_s=20), CPU, max_in_flight=2)
    for n, rows in enumerate([1, 140, 144, 145, 146, 150, 9000, 2, 9001, 9000, 146, 40_000, 1]):
        batch = sent(n, rows)
        if dist.get_rank() == 0:
            channel.send(batch, "train")
            continue
        found = channel.receive(Expected("train", 0, n))
        assert found.hidden_states is not None and batch.hidden_states is not None
        assert torch.equal(found.hidden_states, batch.hidden_states)
        assert torch.equal(found.inputs["input_ids"], batch.inputs["input_ids"])
    channel.drain()


@distributed(2)
def test_the_next_message_is_taken_while_the_receiver_computes() -> None:
    """Rank 1 stays with micro-batch 0 until rank 0 has got rid of micro-batch 1."""
    channel = BoundaryChannel(Mesh(2, 1, "cpu", timeout_s=20), CPU, max_in_flight=1)
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        for n in (0, 1):
            channel.send(sent(n, 2), "train")
        channel.drain()
        store.set("taken", "1")
        return
    channel.receive(Expected("train", 0, 0))
    store.wait(["taken"])
    channel.receive(Expected("train", 0, 1))


@distributed(2)
def test_two_channels_over_one_mesh_do_not_take_each_others_messages() -> None:
    mesh = Mesh(2, 1, "cpu", timeout_s=20)
    first, second = (BoundaryChannel(mesh, CPU, max_in_flight=2) for _ in range(2))
    if dist.get_rank() == 0:
        first.send(sent(0, 2), "train")
        second.send(sent(0, 5), "train")
        first.drain()
        second.drain()
        return
    rows = [c.receive(Expected("train", 0, 0)).hidden_states for c in (first, second)]
    assert [len(r) for r in rows if r is not None] == [2, 5]


@pytest.mark.parametrize("name", NAMES)
@distributed(2)
def test_hidden_states_are_rounded_in_training_and_whole_in_evaluation(name: str) -> None:
    mesh = Mesh(2, 1, "cpu", timeout_s=20)
    channel = BoundaryChannel(mesh, CPU, max_in_flight=2, boundary_dtype=name)
    batch = sent(0, 6)
    assert batch.hidden_states is not None
    if dist.get_rank() == 0:
        channel.send(batch, "train")
        sent_bytes = channel.bytes_sent
        channel.send(batch, "eval")
        channel.drain()
        assert sent_bytes < 0.6 * (channel.bytes_sent - sent_bytes)
        return
    found = channel.receive(Expected("train", 0, 0)).hidden_states
    assert found is not None and found.dtype == torch.float32
    assert torch.equal(found, round_trip(batch.hidden_states, name))
    assert not torch.equal(found, batch.hidden_states)
    whole = channel.receive(Expected("eval", 0, 0)).hidden_states
    assert whole is not None and torch.equal(whole, batch.hidden_states)


@pytest.mark.parametrize(
    "name, error", [("bf16", 2**-8), ("fp16", 2**-11), ("fp8", 2**-4), ("int8", 1 / 127)]
)
def test_a_rounded_row_is_off_by_no_more_than_its_dtype_says(name: str, error: float) -> None:
    rows = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-3, 3, 50)[:, None]
    rows[0] = 0
    off = (round_trip(rows, name) - rows).abs()
    assert (off <= error * rows.abs().amax(dim=1, keepdim=True)).all()
    assert off[1:].max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_rounding_hides_no_broken_number_and_keeps_large_ones_finite(name: str) -> None:
    rows = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [1e30, -1.0]])
    found = round_trip(rows, name)
    assert found[1].isnan().any()
    assert found[[0, 2]].isfinite().all()
    assert not round_trip(torch.tensor([[float("inf"), 1.0]]), name).isfinite().all()
    assert found[0].tolist() == [1.0, 2.0] or name == "int8"
    if name in ("fp8", "int8"):
        assert encode(rows, name).values.element_size() == 1
        assert round_trip(torch.tensor([[float("inf"), 1.0]]), name).isnan().all()


@pytest.mark.parametrize("pipeline_ranks", [1, 2, 4])
@distributed(lambda pipeline_ranks: pipeline_ranks)
def test_rounded_boundaries_give_the_same_weights_on_any_number_of_ranks(
    pipeline_ranks: int,
) -> None:
    """To the bit: a boundary inside a rank rounds as one between ranks does."""
    engine = runs.engine(4, pipeline_ranks=pipeline_ranks, boundary_dtype="int8", accumulation=2)
    loop = runs.plain_loop(engine, accumulation=2, cross=lambda hidden: round_trip(hidden, "int8"))
    ours, theirs = runs.batches(), runs.batches()
    for step in range(6):
        engine.train_batch(ours)
        loop.step(step, theirs)
    engine.drain()
    runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_loop(loop))


@distributed(3)
def test_what_goes_apart_arrives_through_a_rank_in_the_middle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing fits the first room: training, a larger evaluation, training again, the end."""
    monkeypatch.setattr(links, "_FIRST_ROOM", links._HEAD_ROOM)
    engine = runs.engine(3)
    loop = runs.plain_loop(engine)
    ours, theirs = runs.batches(), runs.batches()
    for step in range(2):
        engine.train_batch(ours)
        loop.step(step, theirs)
    first = engine.is_first_stage()
    engine.eval_batch(runs.batches(rows=40) if first else None, num_micro_batches=3)
    engine.train_batch(iter([next(ours)]))
    loop.step(2, theirs)
    with pytest.raises(StopIteration):
        engine.train_batch(iter([]))
    runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_loop(loop))


def is_running(pid: int) -> bool:
    """A process that nobody has waited for yet is a zombie, and has left."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("last", ["data", "the end", "an error"])
def test_what_a_rank_that_has_left_sent_last_still_counts(tmp_path: Path, last: str) -> None:
    """Rank 1 asks for it when rank 0's process is gone."""

    def body() -> None:
        channel = BoundaryChannel(Mesh(2, 1, "cpu", timeout_s=20), CPU, max_in_flight=2)
        if dist.get_rank() == 0:
            (tmp_path / "pid").write_text(str(os.getpid()))
            channel.send(sent(0, 2), "train")
            if last == "data":
                channel.send(sent(1, 2), "train")
            elif last == "the end":
                channel.send_end()
            else:
                channel.send_error("it broke")
            channel.drain()
            os._exit(0)
        channel.receive(Expected("train", 0, 0))
        pid = int((tmp_path / "pid").read_text())
        while is_running(pid):
            os.sched_yield()
        if last == "data":
            found = channel.receive(Expected("train", 0, 1)).hidden_states
            assert found is not None and torch.equal(found, sent(1, 2).hidden_states)
        else:
            wanted = EndOfData if last == "the end" else BoundaryError
            with pytest.raises(wanted, match="" if last == "the end" else "it broke"):
                channel.receive(Expected("train", 0, 1))
        os._exit(0)

    pids = {fork_rank(rank, 2, tmp_path, body): rank for rank in range(2)}
    assert wait_for(pids, limit_s=60) == []


@distributed(2)
def test_nccl_without_gpus_is_refused_by_its_key() -> None:
    with pytest.raises(RecipeError, match=r"scpl.transport: nccl needs a CUDA device.*'cpu'"):
        runs.engine(2, transport="nccl")
