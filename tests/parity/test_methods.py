"""Every method trains what its definition says: decoupled ones what a plain loop does, to the bit,
end-to-end ones what backpropagation of the whole model does."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import scpl_ds
from scpl_ds.engine_backprop import joined
from scpl_ds.errors import DataError, RecipeError
from scpl_ds.objectives._base import StageView
from tests.support import runs
from tests.support.distributed import distributed, run_ranks
from tests.support.reference import PlainLoop, seed_of

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


@pytest.mark.parametrize(
    "schedule, ranks", [("1f1b", 1), ("1f1b", 2), ("1f1b", 4), ("zero_bubble", 4)]
)
@distributed(lambda schedule, ranks: ranks)
def test_joint_early_exits_learn_from_the_sum_of_all_losses(schedule: str, ranks: int) -> None:
    engine = runs.engine(
        4,
        dropout=0.0,
        method="joint",
        schedule=schedule,
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
            last = loop.bodies[2]
            torch.manual_seed(seed_of(runs.SEED, number, _, last.start, 0))
            (last(batch, hidden).loss / 2).backward()
        loop.update(number)
    found = runs.weights_of_engine(engine)
    runs.assert_equal(found, runs.weights_of_loop(loop))
    frozen = [name for name in found if torch.equal(found[name], before[name])]
    assert bool(frozen) == any(stage.index < 2 for stage in engine.stages)


def built(stages: int, *, dropout: float = 0.1, **options: Any) -> Any:
    """An engine of 4 steps on this process alone, which knows what a recipe does: how many steps
    there will be, and where layers lie."""
    from scpl_ds.build import build_engine
    from scpl_ds.distributed.mesh import Mesh
    from scpl_ds.partition.anatomy import analyze
    from scpl_ds.partition.plan import make_plan
    from scpl_ds.partition.stage_module import stage_from_model
    from scpl_ds.recipe import recipe_from_ds_config
    from scpl_ds.stage import as_body

    anatomy = analyze(runs.model())
    scpl, section = recipe_from_ds_config(runs.config(stages, **options))
    plan = make_plan(anatomy, stages, "uniform")
    cpu = torch.device("cpu")

    def span(start: int, end: int, k: int) -> Any:
        return as_body(stage_from_model(runs.model(dropout=dropout), anatomy, start, end))

    return build_engine(
        plan,
        lambda k: span(*plan.span(k), k),
        scpl,
        section,
        Mesh(1, 1, cpu, timeout_s=20),
        cpu,
        num_labels=runs.CLASSES,
        seed=runs.SEED,
        lr_at=lambda step: 1e-3,
        total_steps=4,
        make_span=span,
    )


def test_polish_trains_the_last_part_end_to_end() -> None:
    def body() -> None:
        polished, plain = (built(2, dropout=0.0, polish=part, eps=EPS) for part in (0.5, 0.0))
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


@pytest.mark.parametrize("stages", [2, 4])
def test_a_local_loss_behind_copies_trains_what_a_plain_loop_does(stages: int) -> None:
    """With 4 stages of a layer the third looks to the end of the model, whose loss is added. What
    leaves a stage is what its own layers gave."""

    def body() -> None:
        from scpl_ds.partition.anatomy import analyze
        from scpl_ds.partition.stage_module import stage_from_model

        found = built(stages, lookahead=1)
        anatomy = analyze(runs.model())

        class Looking(PlainLoop):
            ahead: ClassVar[dict[int, Any]] = {}

            def __init__(self, bodies: Any, heads: Any, **options: Any) -> None:
                super().__init__(bodies, heads, **options)
                for k, end in enumerate(found.plan.bounds[1:-1]):
                    copies = stage_from_model(runs.model(), anatomy, end, end + 1).train()
                    self.ahead[k] = copies
                    self.parameters[k] += copies.parameters()
                    self.optimizers[k].param_groups[0]["params"] += copies.parameters()

            def gradients(self, number: int, batches: Any) -> list[float]:
                batch, hidden = next(batches), None
                for k, (stage, head) in enumerate(zip(self.bodies, self.heads, strict=True)):
                    torch.manual_seed(seed_of(self.seed, number, 0, stage.start, 0))
                    output = stage(batch, hidden)
                    loss = output.loss
                    if head is not None:
                        beyond = self.ahead[k](batch, output.hidden_states)
                        loss = head.learn(StageView(beyond.hidden_states, hidden, batch, {})).loss
                        assert (beyond.loss is None) == (stage.end + 1 < runs.LAYERS)
                        loss = loss if beyond.loss is None else loss + beyond.loss
                    loss.backward()
                    hidden = output.hidden_states.detach()
                return []

        loop = runs.plain_loop(found, make=Looking)
        data, same = runs.batches(), runs.batches()
        for number in range(STEPS):
            found.train_batch(data)
            loop.step(number, same)
        weights = {n: t for n, t in runs.weights_of_engine(found).items() if ".ahead." not in n}
        assert any("scpl_heads" in name for name in weights)
        runs.assert_equal(weights, runs.weights_of_loop(loop), rtol=1e-5, atol=1e-6)

    run_ranks(1, body)


@pytest.mark.parametrize("sharding, zero", [("ddp", 0), ("fsdp", 3), ("deepspeed", 1)])
@distributed(2)
def test_frozen_stages_go_with_every_backend_and_data_parallel_copies(
    sharding: str, zero: int
) -> None:
    found = []
    for options in ({"sharding": "none"}, {"sharding": sharding, "zero": zero}):
        engine = runs.engine(3, freeze_stages=2, pipeline_ranks=1, dropout=0.0, eps=EPS, **options)
        data = runs.lane(runs.batches(), engine.mesh.dp_rank, 2)
        for _ in range(5):
            engine.train_batch(data)
        found.append(runs.weights_of_engine(engine))
    runs.assert_equal(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_weight_on_two_stages_is_refused_where_gradients_cross_stages() -> None:
    def body() -> None:
        import scpl_ds
        from tests.support import models

        tied = models.build(models.BY_TYPE["gpt2"].config(), "causal-lm")
        with pytest.raises(RecipeError, match=r"copy of one weight \(lm_head.weight from .*wte"):
            scpl_ds.initialize(model=tied, config=runs.config(2, method="bp"))

    run_ranks(1, body)


def test_micro_batches_are_not_padded_without_a_mask() -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    same = joined([{"input_ids": ids}, {"input_ids": ids}], 0)
    assert same["input_ids"].shape == (4, 4)
    with pytest.raises(DataError, match=r"'input_ids': \[4, 3\].*'attention_mask'"):
        joined([{"input_ids": ids}, {"input_ids": ids[:, :3]}], 0)


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


def test_local_lr_is_the_rate_of_all_stages_but_the_last() -> None:
    """No gradient comes back, so a stage at a quarter of a rate is that of a run at a quarter."""

    def body() -> None:
        found: dict[str, dict[str, Any]] = {}
        for name, rate, local in (("both", 2e-3, 0.25), ("quarter", 5e-4, 1.0), ("one", 2e-3, 1.0)):
            config = runs.config(3, pipeline_ranks=1, local_lr=local)
            config["optimizer"]["params"]["lr"] = rate
            config["scheduler"]["params"]["warmup_max_lr"] = rate
            model = runs.model(dropout=0.0)
            running = scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine
            first = [name for name in runs.weights_of_engine(running) if ".layer." in name]
            data = runs.batches(seed=3)
            for _ in range(4):
                running.train_batch(data)
            found[name] = runs.weights_of_engine(running)
        last = running.plan.span(2)[0]
        for name in first:
            early = int(name.partition(".layer.")[2].partition(".")[0]) < last
            same = torch.equal(found["both"][name], found["quarter"][name])
            assert same == early, name
            if early:
                assert not torch.equal(found["both"][name], found["one"][name])
        heads = [name for name in found["both"] if name.startswith("scpl_heads")]
        assert heads
        for name in heads:
            assert torch.equal(found["both"][name], found["quarter"][name]), name

    run_ranks(1, body)


def test_rates_of_the_recipe_are_refused_beside_an_optimizer_of_the_callers() -> None:
    def body() -> None:
        config = runs.config(2, pipeline_ranks=1, local_lr=0.5)
        with pytest.raises(RecipeError, match=r"scpl.local_lr: 0.5 needs the config's optimizer"):
            scpl_ds.initialize(model=runs.model(), optimizer=torch.optim.SGD, config=config)

    run_ranks(1, body)
