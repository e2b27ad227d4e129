"""The engine over ranks: evaluation, metrics, checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scpl_ds.distributed.collectives import MetricsMailbox, average_gradients, barrier
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import CheckpointError, DataError
from tests.support import runs
from tests.support.distributed import distributed

STEPS = 4


@pytest.mark.parametrize("stages, ranks", [(2, 2), (4, 2)])
@distributed(lambda ranks: ranks)
def test_eval_batch_gives_the_whole_models_loss_and_logits(stages: int, ranks: int) -> None:
    engine = runs.engine(stages)
    batches = list(itertools.islice(runs.batches(), 3))
    loss, logits = engine.eval_batch(iter(batches), return_logits=True, num_micro_batches=3)
    whole = runs.model()
    with torch.no_grad():
        outputs = [whole(**batch) for batch in batches]
    torch.testing.assert_close(loss, torch.stack([o.loss for o in outputs]).mean())
    if engine.is_last_stage():
        assert torch.equal(logits, torch.cat([o.logits for o in outputs]))
    else:
        assert logits is None


@distributed(2)
def test_evaluation_between_steps_changes_no_parameter_and_no_dropout() -> None:
    weights = []
    for evaluate in (False, True):
        engine = runs.engine(2)
        data = runs.batches()
        for _ in range(3):
            engine.train_batch(data)
            if evaluate:
                engine.eval_batch(runs.batches(), num_micro_batches=2)
        engine.drain()
        weights.append(runs.weights_of_engine(engine))
    runs.assert_equal(weights[1], weights[0])


@distributed(2)
def test_reduce_loss_is_the_last_stages_on_every_rank() -> None:
    engine = runs.engine(2)
    own = engine.train_batch(runs.batches())
    whole = engine.reduce_loss()
    told = [None, None]
    dist.all_gather_object(told, float(own))
    assert float(whole) == pytest.approx(told[1])


@distributed(4)
def test_metrics_reach_rank_0_in_step_order_and_only_once_all_ranks_have_posted() -> None:
    mesh = Mesh(2, 2, "cpu", timeout_s=20)
    mailbox = MetricsMailbox(mesh)
    mailbox.post(10, {f"stage{mesh.pp_rank}/loss": float(mesh.dp_rank), "perf/peak": mesh.rank})
    if mesh.rank != 3:
        mailbox.post(20, {"x": 1.0})
    barrier(mesh)
    if mesh.rank == 0:
        assert list(mailbox.poll()) == [
            (10, {"stage0/loss": 0.5, "stage1/loss": 0.5, "perf/peak": 3})
        ]
        assert list(mailbox.poll()) == []
    barrier(mesh)
    if mesh.rank == 3:
        mailbox.post(20, {"x": 3.0})
    barrier(mesh)
    if mesh.rank == 0:
        assert list(mailbox.poll()) == [(20, {"x": 1.5})]


@pytest.mark.parametrize(
    "options", [{}, {"sharding": "deepspeed", "zero": 1}], ids=["none", "zero1"]
)
@pytest.mark.parametrize("stages, ranks, dp", [(2, 2, 1), (2, 2, 2), (4, 2, 1)])
@distributed(lambda ranks, dp: ranks * dp)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, stages: int, ranks: int, dp: int, options: dict
) -> None:
    def start():
        return runs.engine(stages, accumulation=2, pipeline_ranks=ranks, **options)

    def data(engine, skip: int):
        stream = runs.lane(runs.batches(), engine.mesh.dp_rank, dp)
        return itertools.islice(stream, skip, None)

    whole = start()
    batches = data(whole, 0)
    for _ in range(2 * STEPS):
        whole.train_batch(batches)
    first = start()
    batches = data(first, 0)
    for _ in range(STEPS):
        first.train_batch(batches)
    first.save_checkpoint(tmp_path, client_state={"note": "half way"})
    second = start()
    folder, state = second.load_checkpoint(tmp_path)
    assert (folder.name, state) == (f"checkpoint-{STEPS}", {"note": "half way"})
    assert second.global_steps == STEPS
    batches = data(second, 2 * STEPS)
    for _ in range(STEPS):
        second.train_batch(batches)
    second.drain()
    runs.assert_equal(runs.weights_of_engine(second), runs.weights_of_engine(whole))


@distributed(2)
def test_a_checkpoint_loads_under_another_cut_with_equal_weights_and_moments(
    tmp_path: Path,
) -> None:
    """Saved by 2 stages, loaded by 4: every layer's tensors and moments are those saved; the head
    of layer 1, whose boundary stays, is kept."""
    saved = runs.engine(2)
    data = runs.batches()
    for _ in range(STEPS):
        saved.train_batch(data)
    saved.save_checkpoint(tmp_path, tag="mine")
    loaded = runs.engine(4)
    loaded.load_checkpoint(tmp_path, tag="mine")
    states = [stage.optimizer_state() for stage in saved.stages]
    moments = {n: t for s in states for n, t in s.moments["exp_avg"].items()}
    everything = [None, None]
    dist.all_gather_object(everything, (runs.weights_of_engine(saved), moments))
    weights = {n: t for part in everything for n, t in part[0].items()}
    moments = {n: t for part in everything for n, t in part[1].items()}
    own = runs.weights_of_engine(loaded)
    kept = {name: tensor for name, tensor in own.items() if name in weights}
    runs.assert_equal(kept, weights)
    missing = {name.split(".")[1] for name in own if name not in weights}
    assert missing <= {"layer_0", "layer_2"}
    if dist.get_rank() == 0:
        assert any(name.startswith("scpl_heads.layer_1.") for name in kept)
    for stage in loaded.stages:
        state = stage.optimizer_state()
        assert state.step == STEPS
        runs.assert_equal(
            {n: t for n, t in state.moments["exp_avg"].items() if n in moments}, moments
        )


@distributed(2)
def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    engine = runs.engine(2)
    engine.train_batch(runs.batches())
    engine.save_checkpoint(tmp_path)
    import scpl_ds

    other = scpl_ds.initialize(model=runs.model(layers=6), config=runs.config(2), seed=1).engine
    with pytest.raises(CheckpointError, match="it has 4 layers, this one 6"):
        other.load_checkpoint(tmp_path)


BACKENDS = [{}, {"sharding": "deepspeed"}, {"sharding": "deepspeed", "zero": 1}]


@pytest.mark.parametrize("options", BACKENDS, ids=["none", "zero0", "zero1"])
@pytest.mark.parametrize("ranks", [1, 2])
@distributed(lambda ranks: ranks)
def test_data_that_end_in_the_middle_of_a_step_leave_no_trace(ranks: int, options: dict) -> None:
    """Accumulation 2, five micro-batches, then two more steps: as if the fifth had never come."""
    weights = []
    for numbers in ([0, 1, 2, 3, 4], [0, 1, 2, 3]):
        engine = runs.engine(2, accumulation=2, **options)
        batches = list(itertools.islice(runs.batches(), 9))
        epoch = iter([batches[n] for n in numbers])
        engine.train_batch(epoch)
        engine.train_batch(epoch)
        if len(numbers) == 5:
            with pytest.raises(StopIteration):
                engine.train_batch(epoch)
        again = iter(batches[5:])
        for _ in range(2):
            engine.train_batch(again)
        engine.drain()
        weights.append(runs.weights_of_engine(engine))
        assert engine.global_steps == 4
    runs.assert_equal(weights[0], weights[1])


@distributed(4)
def test_eval_batch_is_the_mean_over_data_parallel_ranks_on_every_rank() -> None:
    engine = runs.engine(2, pipeline_ranks=2)
    batches = list(itertools.islice(runs.batches(), 4))
    lane = iter(batches[engine.mesh.dp_rank :: 2])
    loss = engine.eval_batch(lane, num_micro_batches=2)
    with torch.no_grad():
        wanted = torch.stack([runs.model()(**batch).loss for batch in batches]).mean()
    torch.testing.assert_close(loss, wanted)
    lane = iter(batches[engine.mesh.dp_rank :: 2])
    own = engine.eval_batch(lane, num_micro_batches=2, reduce_output=None, bcast_loss=False)
    assert (own is not None) is engine.is_last_stage()
    with pytest.raises(ValueError, match="'avg' or None, got 'sum'"):
        engine.eval_batch(None, reduce_output="sum")


@distributed(3)
def test_evaluation_data_that_end_early_are_told_to_every_stage() -> None:
    engine = runs.engine(3)
    with pytest.raises(DataError, match="ended after 1 of 2 micro-batches"):
        engine.eval_batch(iter([next(runs.batches())]), num_micro_batches=2)


@distributed(2)
def test_a_parameter_without_a_gradient_on_one_lane_counts_as_zeros_there() -> None:
    mesh = Mesh(1, 2, "cpu", timeout_s=20)
    first, second, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    (first if mesh.rank == 0 else second).grad = torch.full((3,), 4.0)
    average_gradients([first, second, unused], mesh)
    assert first.grad is not None and second.grad is not None
    assert first.grad.tolist() == second.grad.tolist() == [2.0] * 3
    assert unused.grad is None


@distributed(2)
def test_every_group_of_the_mesh_has_the_recipes_timeout() -> None:
    mesh = Mesh(1, 2, "cpu", timeout_s=7)
    for group in (mesh.dp_group, mesh.dp_control_group, mesh.control_group, mesh.boundary_group):
        backend = group._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 7


@distributed(2)
def test_module_only_loading_keeps_the_step_and_the_optimizer(tmp_path: Path) -> None:
    engine = runs.engine(2)
    data = runs.batches()
    for _ in range(3):
        engine.train_batch(data)
    engine.save_checkpoint(tmp_path)
    fresh = runs.engine(2)
    fresh.load_checkpoint(tmp_path, load_module_only=True)
    assert fresh.global_steps == 0
    assert all(stage.optimizer_state().step == 0 for stage in fresh.stages)
    runs.assert_equal(runs.weights_of_engine(fresh), runs.weights_of_engine(engine))
