"""Every method trains what its definition says: decoupled ones what a plain loop does, to the bit,
end-to-end ones what backpropagation of the whole model does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import StageView
from tests.support import runs
from tests.support.distributed import distributed, run_ranks

pytestmark = pytest.mark.forks

STEPS = 8
EPS = 1e-4  # a key's bias has no gradient but rounding, which a small eps would blow up
DECOUPLED: dict[str, Any] = {
    "dascpl": "dascpl",
    "early_exit": "early_exit",
    "associated": {"name": "associated", "label_dim": 8},
    "deinforeg": {"name": "deinforeg", "projection": "mlp"},
    "predsim": "predsim",
    "supcon + original": [{"name": "supcon"}, {"name": "reconstruction", "weight": 0.1}],
    "early_exit + input": [
        {"name": "early_exit", "weight": 0.5},
        {"name": "reconstruction", "target": "input", "weight": 2.0},
    ],
}


@pytest.mark.parametrize("stages, ranks", [(3, 1), (3, 3), (4, 2)])
@pytest.mark.parametrize("name", DECOUPLED)
@distributed(lambda ranks: ranks)
def test_a_decoupled_method_streamed_equals_its_plain_loop_to_the_bit(
    name: str, stages: int, ranks: int
) -> None:
    """Dropout on, two micro-batches a step, clipping and warm-up on."""
    objective = DECOUPLED[name]
    detach = name == "associated"
    engine = runs.engine(stages, accumulation=2, objective=objective)
    data = runs.batches()
    for _ in range(STEPS):
        engine.train_batch(data)

    loop = runs.plain_loop(engine, accumulation=2, objective=objective, detach=detach)
    data = runs.batches()
    for number in range(STEPS):
        loop.step(number, data)
    runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_loop(loop))


def trained_whole(engine: Any, accumulation: int, steps: int) -> dict[str, Tensor]:
    """The whole model, by autograd and one AdamW, clipped by its norm."""
    whole = runs.model(dropout=0.0).train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1.0, weight_decay=0.0, eps=EPS)
    data = runs.batches()
    for step in range(steps):
        for _ in range(accumulation):
            (whole(**next(data)).loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = engine.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.detach() for name, tensor in whole.state_dict().items()}


@pytest.mark.parametrize(
    "schedule, ranks, accumulation",
    [
        *((schedule, 1, 2) for schedule in ("naive", "1f1b")),
        *((s, p, 4) for s in ("naive", "gpipe", "1f1b", "zero_bubble") for p in (2, 4)),
        ("1f1b", 2, 1),
    ],
)
@distributed(lambda ranks: ranks)
def test_backpropagation_over_stages_is_that_of_the_whole_model(
    schedule: str, ranks: int, accumulation: int
) -> None:
    engine = runs.engine(
        4, dropout=0.0, method="bp", schedule=schedule, accumulation=accumulation, eps=EPS
    )
    data = runs.batches()
    losses = [engine.train_batch(data) for _ in range(4)]
    wanted = trained_whole(engine, accumulation, 4)
    # Micro-batches are padded to one length, so the last bits may differ.
    runs.assert_equal(runs.weights_of_engine(engine), wanted, rtol=1e-5, atol=1e-6)
    assert math.isfinite(float(losses[-1])) == engine.is_last_stage()


@distributed(4)
def test_backpropagation_over_two_lanes_averages_their_gradients() -> None:
    """Two stages x two data-parallel ranks train what one process does with both lanes' data."""
    engine = runs.engine(2, dropout=0.0, method="bp", accumulation=1, eps=EPS, pipeline_ranks=2)
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, 2)
    for _ in range(3):
        engine.train_batch(data)
    wanted = trained_whole(engine, 2, 3)
    runs.assert_equal(runs.weights_of_engine(engine), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@distributed(lambda ranks: ranks)
def test_joint_early_exits_learn_from_the_sum_of_all_losses(ranks: int) -> None:
    engine = runs.engine(
        4,
        dropout=0.0,
        method="joint",
        objective="early_exit",
        accumulation=2,
        eps=EPS,
        head_lr=1.0,
    )
    data = runs.batches()
    for _ in range(4):
        engine.train_batch(data)

    loop = runs.plain_loop(engine, dropout=0.0, objective="early_exit")
    parameters = [p for stage in loop.parameters for p in stage]
    optimizer = torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0, eps=EPS)
    data = runs.batches()
    for step in range(4):
        for _ in range(2):
            batch, hidden, total = next(data), None, torch.zeros(())
            for body, head in zip(loop.bodies, loop.heads, strict=True):
                output = body(batch, hidden)
                hidden = output.hidden_states
                if head is not None:
                    total = total + head.learn(StageView(hidden, None, batch, {})).loss
                if output.loss is not None:
                    total = total + output.loss
            (total / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = engine.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
    found, wanted = runs.weights_of_engine(engine), runs.weights_of_loop(loop)
    runs.assert_equal(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 3])
@distributed(lambda ranks: ranks)
def test_frozen_stages_stay_as_they_are_and_the_others_learn_without_their_dropout(
    ranks: int,
) -> None:
    engine = runs.engine(3, freeze_stages=2, accumulation=2)
    before = {name: t.clone() for name, t in runs.weights_of_engine(engine).items()}
    data = runs.batches()
    for _ in range(STEPS):
        engine.train_batch(data)

    loop = runs.plain_loop(engine, accumulation=2)
    for number in range(2):
        loop.bodies[number].eval()
        loop.heads[number] = None
        for parameter in loop.bodies[number].parameters():
            parameter.requires_grad_(False)
    data = runs.batches()
    for number in range(STEPS):
        for _ in range(2):
            batch, hidden = next(data), None
            with torch.no_grad():
                for body in loop.bodies[:2]:
                    hidden = body(batch, hidden).hidden_states
            from tests.support.reference import seed_of

            last = loop.bodies[2]
            torch.manual_seed(seed_of(runs.SEED, number, _, last.start, 0))
            (last(batch, hidden).loss / 2).backward()
        loop.update(number)
    found = runs.weights_of_engine(engine)
    runs.assert_equal(found, runs.weights_of_loop(loop))
    frozen = [name for name in found if torch.equal(found[name], before[name])]
    assert bool(frozen) == any(stage.index < 2 for stage in engine.stages)


def test_polish_trains_the_last_part_end_to_end() -> None:
    def body() -> None:
        from scpl_ds.build import build_engine
        from scpl_ds.distributed.mesh import Mesh
        from scpl_ds.partition.anatomy import analyze
        from scpl_ds.partition.plan import make_plan
        from scpl_ds.partition.stage_module import stage_from_model
        from scpl_ds.recipe import recipe_from_ds_config
        from scpl_ds.stage import as_body

        def engine(polish: float) -> Any:
            whole = runs.model(dropout=0.0)
            anatomy = analyze(whole)
            scpl, section = recipe_from_ds_config(runs.config(2, polish=polish, eps=EPS))
            plan = make_plan(anatomy, 2, "uniform")
            cpu = torch.device("cpu")
            return build_engine(
                plan,
                lambda k: as_body(stage_from_model(whole, anatomy, *plan.span(k))),
                scpl,
                section,
                Mesh(1, 1, cpu, timeout_s=20),
                cpu,
                num_labels=runs.CLASSES,
                seed=runs.SEED,
                lr_at=lambda step: 1e-3,
                total_steps=4,
            )

        polished, plain = engine(0.5), engine(0.0)
        data = [next(runs.batches(seed=n)) for n in range(4)]
        for running in (polished, plain):
            feed = iter(data)
            for _ in range(2):
                running.train_batch(feed)
        runs.assert_equal(runs.weights_of_engine(polished), runs.weights_of_engine(plain))

        before = {name: t.clone() for name, t in runs.weights_of_engine(polished).items()}
        gradients = whole_gradients(polished, data[2])
        polished.train_batch(iter(data[2:]))
        after = runs.weights_of_engine(polished)
        for name, tensor in after.items():
            moved = not torch.equal(tensor, before[name])
            learns = name in gradients and bool(gradients[name].abs().max() > 1e-6)
            assert moved or not learns, name
            assert not moved or not name.startswith("scpl_heads"), name

    run_ranks(1, body)


def whole_gradients(engine: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = runs.model(dropout=0.0).train()
    whole.load_state_dict(runs.weights_of_engine(engine), strict=False)
    whole(**batch).loss.backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def test_fp16_is_refused_where_gradients_cross_stages() -> None:
    def body() -> None:
        import scpl_ds

        config = runs.config(2, method="bp") | {"fp16": {"enabled": True}}
        with pytest.raises(RecipeError, match="scales no loss"):
            scpl_ds.initialize(model=runs.model(), config=config)

    run_ranks(1, body)


@pytest.mark.parametrize("sharding, zero", [("ddp", 0), ("fsdp", 3), ("deepspeed", 2)])
@pytest.mark.parametrize("name", ["early_exit", "associated", "deinforeg", "supcon + original"])
@distributed(2)
def test_a_method_learns_the_same_under_every_backend(name: str, sharding: str, zero: int) -> None:
    """Two data-parallel ranks, two stages on each, five steps, evaluation included."""
    found = []
    for options in ({"sharding": "none"}, {"sharding": sharding, "zero": zero}):
        engine = runs.engine(
            2,
            objective=DECOUPLED[name],
            pipeline_ranks=1,
            dropout=0.0,
            eps=EPS,
            **options,
        )
        data = runs.lane(runs.batches(), engine.mesh.dp_rank, 2)
        for _ in range(5):
            engine.train_batch(data)
        outputs = list(engine.evaluate(runs.batches(seed=9), 1))
        assert outputs[0].logits is not None
        found.append((runs.weights_of_engine(engine), outputs[0].logits, outputs[0].exits))
    (plain, logits, exits), (other, other_logits, other_exits) = found
    runs.assert_equal(other, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-5)
    assert exits.keys() == other_exits.keys()
    assert bool(exits) == (name in ("early_exit", "deinforeg", "associated"))
