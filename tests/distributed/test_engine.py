"""The engine over ranks: evaluation, metrics, checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scpl_ds.distributed.collectives import MetricsMailbox, barrier
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import CheckpointError
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
    if dist.get_rank() == 1:
        with pytest.raises(CheckpointError, match=r"is of another model: it has no '.*layer.4"):
            other.load_checkpoint(tmp_path)
