"""Every stage inside its own DeepSpeed engine: ZeRO-0 to 3, offloading, mixed precision."""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import scpl_ds
from scpl_ds.errors import RecipeError
from tests.support import runs
from tests.support.distributed import distributed

CPU = {"device": "cpu"}
ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero1-offload": {"stage": 1, "offload_optimizer": CPU},
    "zero2-offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3-offload": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "offload_optimizer": CPU,
        "offload_param": CPU,
    },
    "zero3-persistent": {"stage": 3},
}
"""The tiny model's parameters are all below ZeRO-3's persistence threshold: without the key none of
them would ever be let go of."""
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}


def build(
    zero: str | None, *, stages: int = 2, more: dict[str, Any] | None = None, **options: Any
) -> scpl_ds.Engine:
    """An engine of DeepSpeed stages; of plain torch ones without ``zero``."""
    options = {"accumulation": 2, "eps": 1e-4, **options}
    options["sharding"] = "none" if zero is None else "deepspeed"
    config = runs.config(stages, **options) | (more or {})
    if zero is not None:
        config["zero_optimization"] = dict(ZERO[zero])
    return scpl_ds.initialize(model=runs.model(), config=config, seed=runs.SEED).engine


def train(engine: scpl_ds.Engine, steps: int, *, skip: int = 0) -> dict[str, torch.Tensor]:
    """This rank's tensors after ``steps`` more steps, ``skip`` micro-batches into the data."""
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, engine.mesh.dp_size)
    batches = itertools.islice(data, skip, None)
    for _ in range(steps):
        engine.train_batch(batches)
    engine.drain()
    return runs.weights_of_engine(engine)


@pytest.mark.parametrize("zero", ZERO)
@distributed(4)
def test_every_zero_stage_trains_what_plain_torch_trains(zero: str) -> None:
    """2 pipeline x 2 data-parallel ranks, accumulation 2, clipping and warm-up on, 10 steps."""
    wanted = train(build(None, pipeline_ranks=2, clip=0.5), 10)
    found = train(build(zero, pipeline_ranks=2, clip=0.5), 10)
    runs.assert_equal(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
@distributed(1)
def test_several_sharded_stages_share_one_rank(zero: str) -> None:
    wanted = train(build(None, stages=4), 5)
    runs.assert_equal(train(build(zero, stages=4), 5), wanted, rtol=1e-5, atol=1e-6)


@distributed(2)
def test_zero_may_differ_from_stage_to_stage() -> None:
    wanted = train(build(None, stages=4, pipeline_ranks=1), 5)
    mixed = build("zero1", stages=4, pipeline_ranks=1, zero_stages=[0, 1, 2, 3])
    assert [stage.backend.section.zero_stage for stage in mixed.stages] == [0, 1, 2, 3]
    runs.assert_equal(train(mixed, 5), wanted, rtol=1e-5, atol=1e-6)


@distributed(2)
def test_a_zero_3_rank_holds_its_share_of_the_stage_and_nothing_else() -> None:
    engine = build("zero3", stages=1, pipeline_ranks=1)
    train(engine, 2)
    whole = sum(shape.numel() for shape in engine.stages[0].backend.shapes.values())
    here = sum(p.numel() for p in engine.stages[0].module.parameters())
    shares = sum(p.ds_tensor.numel() for p in engine.stages[0].module.parameters())
    assert here == 0
    assert whole / 2 <= shares < whole / 2 + 100  # padding of sizes that do not divide


def off_course(
    found: dict[str, torch.Tensor],
    wanted: dict[str, torch.Tensor],
    start: dict[str, torch.Tensor],
) -> float:
    """How far the weights are from the wanted ones, relative to how far they came."""
    apart = sum(float((found[n] - t).double().square().sum()) for n, t in wanted.items())
    moved = sum(float((t - start[n]).double().square().sum()) for n, t in wanted.items())
    return (apart / moved) ** 0.5


HALVES: dict[str, tuple[dict[str, Any], float]] = {
    "bf16": (BF16, 0.15),
    "autocast": ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 0.08),
    "fp16": (FP16, 0.05),
}
"""Precision -> how far off course ten steps may lead; an untrained model is 1.0 off."""


@pytest.mark.parametrize(
    ("half", "zero"),
    [("bf16", "zero1"), ("bf16", "zero3-offload"), ("autocast", "zero2"), ("fp16", "zero3")],
)
@distributed(2)
def test_half_precision_stays_within_its_rounding_of_fp32(half: str, zero: str) -> None:
    more, limit = HALVES[half]
    plain = build(None, pipeline_ranks=1)
    start = runs.weights_of_engine(plain)
    wanted = train(plain, 10)
    with fp16_on_this_cpu():
        found = train(build(zero, pipeline_ranks=1, more=more), 10)
    assert all(tensor.dtype == torch.float32 for n, tensor in found.items() if "weight" in n)
    assert off_course(found, wanted, start) < limit


@contextlib.contextmanager
def fp16_on_this_cpu() -> Iterator[None]:
    """DeepSpeed asks its accelerator and refuses fp16 on most CPUs; torch can compute it on all."""
    import deepspeed.accelerator

    accelerator = deepspeed.accelerator.get_accelerator()
    kind = type(accelerator)
    before = kind.is_fp16_supported
    kind.is_fp16_supported = lambda self: True
    try:
        yield
    finally:
        kind.is_fp16_supported = before


def overflow_once(engine: scpl_ds.Engine, stage: int, step: int, dp_rank: int) -> None:
    """An infinite activation gradient in one stage, at one step, on one data-parallel rank."""
    if engine.mesh.dp_rank != dp_rank:
        return
    for own in engine.stages:
        if own.index == stage:
            block = own.module.body.blocks[0]

            def hook(module: Any, args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad and engine.global_steps == step:
                    hidden.register_hook(lambda gradient: gradient * torch.inf)

            block.register_forward_hook(hook)


@pytest.mark.parametrize("zero", ["zero1", "zero3", "zero2-offload"])
@distributed(4)
def test_an_fp16_overflow_skips_its_own_stages_step_and_no_other(zero: str) -> None:
    with fp16_on_this_cpu():
        calm = build(zero, pipeline_ranks=2, more=FP16)
        wanted = train(calm, 4)
        engine = build(zero, pipeline_ranks=2, more=FP16)
        overflow_once(engine, stage=1, step=2, dp_rank=0)
        found = train(engine, 4)
    metrics = {name: float(value) for name, value in engine.metrics().items()}
    k = engine.stages[0].index
    assert metrics[f"stage{k}/skipped_steps"] == k
    assert metrics[f"stage{k}/loss_scale"] == (256.0, 128.0)[k]
    if k == 0:
        runs.assert_equal(found, wanted)
    else:
        assert engine.stages[0].optimizer_state().step == 3
        assert any(not torch.equal(found[name], wanted[name]) for name in wanted)
    # DeepSpeed's own scheduler would now be one step behind in the stage that skipped.
    for run in (calm, engine):
        assert run.stages[0].backend.optimizer.param_groups[0]["lr"] == run.lr_at(3)


@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
@distributed(2)
def test_a_resumed_fp16_run_goes_on_with_its_loss_scale(tmp_path: Path, zero: str | None) -> None:
    with fp16_on_this_cpu():
        first = build(zero, pipeline_ranks=2, more=FP16 if zero else {"fp16": {"enabled": True}})
        overflow_once(first, stage=1, step=1, dp_rank=0)
        train(first, 3)
        first.save_checkpoint(tmp_path)
        wanted = train(first, 2, skip=6)
        second = build(zero, pipeline_ranks=2, more=FP16 if zero else {"fp16": {"enabled": True}})
        second.load_checkpoint(tmp_path)
        found = train(second, 2, skip=6)
    k = second.stages[0].index
    scale = float(second.metrics()[f"stage{k}/loss_scale"])
    full = 256.0 if zero else 65536.0
    assert scale == (full, full / 2)[k]
    runs.assert_equal(found, wanted)


@pytest.mark.skipif(torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="this CPU has fp16")
@distributed(1)
def test_fp16_is_refused_by_name_where_deepspeed_refuses_it() -> None:
    with pytest.raises(RecipeError, match="fp16 is not supported"):
        build("zero1", more=FP16)


@distributed(1)
def test_nvme_without_its_library_is_refused_by_name(tmp_path: Path) -> None:
    """The keys go to DeepSpeed as they are; here it finds no libaio."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible():
        pytest.skip("this machine has libaio")
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": nvme}}
    config = runs.config(2, sharding="deepspeed") | zero
    with pytest.raises(RecipeError, match="DeepSpeed cannot set this stage up"):
        scpl_ds.initialize(model=runs.model(), config=config, seed=runs.SEED)


@pytest.mark.parametrize("zero", [None, "zero1", "zero3"])
@distributed(2)
def test_all_stages_together_move_by_the_clipped_norm(zero: str | None) -> None:
    """One step of plain SGD at a learning rate of 1: the update is the clipped gradient itself."""
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}
    engine = build(
        zero,
        stages=4,
        pipeline_ranks=2,
        clip=0.01,
        sync="step",
        clip_scope="global",
        more=sgd,
        head_lr=1.0,
    )
    engine.lr_at = lambda step: 1.0
    before = runs.weights_of_engine(engine)
    engine.train_batch(runs.batches())
    after = runs.weights_of_engine(engine)
    moved = sum(float((after[n] - t).double().square().sum()) for n, t in before.items())
    norms = [float(v) for k, v in engine.metrics().items() if k.endswith("/grad_norm")]
    told: list[Any] = [None, None]
    dist.all_gather_object(told, (moved, sum(norm**2 for norm in norms)))
    assert sum(part[0] for part in told) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    total = float(engine.stages[0].metrics["global_grad_norm"])
    assert sum(part[1] for part in told) ** 0.5 == pytest.approx(total, rel=1e-5) != 0.01


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
@distributed(4)
def test_clipping_by_the_norm_of_all_stages_is_plain_torchs(zero: str) -> None:
    options: dict[str, Any] = {"pipeline_ranks": 2, "clip": 0.3}
    together = {"sync": "step", "clip_scope": "global"}
    found = train(build(zero, **options, **together), 5)
    wanted = train(build(None, **options, **together), 5)
    runs.assert_equal(found, wanted, rtol=1e-5, atol=1e-6)
    alone = train(build(None, **options), 5)
    assert any(not torch.allclose(alone[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize(
    ("zero", "more"), [("zero2", {}), ("zero3", BF16), ("zero3-offload", {})], ids=str
)
@distributed(2)
def test_a_resumed_zero_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, zero: str, more: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"pipeline_ranks": 1, "more": more}
    first = build(zero, **options)
    train(first, 3)
    first.save_checkpoint(tmp_path)
    wanted = train(first, 3, skip=6)
    second = build(zero, **options)
    second.load_checkpoint(tmp_path)
    runs.assert_equal(train(second, 3, skip=6), wanted)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@distributed(2)
def test_a_zero_checkpoint_loads_into_plain_torch_and_back(tmp_path: Path, zero: str) -> None:
    sharded = build(zero, pipeline_ranks=1)
    weights = train(sharded, 3)
    sharded.save_checkpoint(tmp_path, tag="sharded")
    plain = build(None, pipeline_ranks=1)
    plain.load_checkpoint(tmp_path, tag="sharded")
    runs.assert_equal(runs.weights_of_engine(plain), weights)
    plain.save_checkpoint(tmp_path, tag="plain")
    again = build(zero, pipeline_ranks=1)
    again.load_checkpoint(tmp_path, tag="plain")
    runs.assert_equal(runs.weights_of_engine(again), weights)
    for mine, theirs in zip(again.stages, sharded.stages, strict=True):
        found, wanted = mine.optimizer_state(), theirs.optimizer_state()
        assert found.step == wanted.step == 3
        for moment, tensors in wanted.moments.items():
            runs.assert_equal(found.moments[moment], tensors)


@pytest.mark.parametrize(
    ("zero", "more"),
    [(zero, {}) for zero in ("zero1", "zero2", "zero3", "zero2-offload", "zero3-offload")]
    + [("zero1", BF16), ("zero3", BF16)],
    ids=str,
)
@distributed(2)
def test_data_that_end_in_the_middle_of_a_zero_step_leave_no_trace(
    zero: str, more: dict[str, Any]
) -> None:
    """Accumulation 3; two micro-batches of the second step are lost, then three more steps: the
    learning rate of the first two is 0."""
    weights = []
    for numbers in (range(5), range(3)):
        engine = build(zero, pipeline_ranks=1, more=more, accumulation=3)
        start = runs.weights_of_engine(engine)
        batches = list(itertools.islice(runs.batches(), 14))
        epoch = iter([batches[n] for n in numbers])
        engine.train_batch(epoch)
        if len(numbers) == 5:
            with pytest.raises(StopIteration):
                engine.train_batch(epoch)
        again = iter(batches[5:])
        for _ in range(3):
            engine.train_batch(again)
        weights.append(runs.weights_of_engine(engine))
        assert any(not torch.equal(weights[-1][name], start[name]) for name in start)
    runs.assert_equal(weights[0], weights[1])


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@distributed(2)
def test_frozen_parameters_stay_and_come_back_whole(zero: str) -> None:
    def frozen() -> scpl_ds.Engine:
        model = runs.model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embeddings" not in name)
        config = runs.config(2, sharding="deepspeed", pipeline_ranks=1)
        config["zero_optimization"] = dict(ZERO[zero])
        return scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine

    engine = frozen()
    before = runs.weights_of_engine(engine)
    after = train(engine, 4)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) is ("embeddings" in name), name


BACKENDS: list[tuple[str, str | None]] = [
    ("none", None), ("ddp", None), ("fsdp", "zero2"), ("fsdp", "zero3"),
    *(("deepspeed", zero) for zero in ("zero0", "zero1", "zero2", "zero3")),
]  # fmt: skip


def start_of(sharding: str, zero: str | None, model: Any, **options: Any) -> scpl_ds.Engine:
    config = runs.config(2, sharding=sharding, pipeline_ranks=1, **options)
    keys = {"stage"} if sharding == "fsdp" else set(ZERO.get(zero or "", {}))
    config["zero_optimization"] = {k: v for k, v in ZERO.get(zero or "", {}).items() if k in keys}
    return scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine


@pytest.mark.parametrize(("sharding", "zero"), BACKENDS)
@distributed(2)
def test_ranks_of_a_stage_start_from_the_first_ones_weights(
    sharding: str, zero: str | None
) -> None:
    model = runs.model()
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    found = runs.weights_of_engine(start_of(sharding, zero, model))
    wanted = runs.weights_of_engine(start_of("none", None, runs.model()))
    runs.assert_equal(found, wanted)


@pytest.mark.parametrize(("sharding", "zero"), [("ddp", None), *BACKENDS[2:4], BACKENDS[-1]])
@distributed(2)
def test_evaluation_between_steps_changes_nothing(sharding: str, zero: str | None) -> None:
    weights = []
    for evaluate in (True, False):
        engine = start_of(sharding, zero, runs.model())
        data = runs.lane(runs.batches(), engine.mesh.dp_rank, 2)
        for _ in range(4):
            engine.train_batch(data)
            if evaluate:
                engine.eval_batch(runs.batches(), num_micro_batches=2)
        weights.append(runs.weights_of_engine(engine))
    runs.assert_equal(weights[0], weights[1])


@pytest.mark.parametrize(("sharding", "zero"), [*BACKENDS[1:4], BACKENDS[5], BACKENDS[-1]])
@distributed(2)
def test_a_closed_stage_gives_its_memory_back(sharding: str, zero: str | None) -> None:
    engine = start_of(sharding, zero, runs.model())
    engine.train_batch(runs.lane(runs.batches(), engine.mesh.dp_rank, 2))
    kept = [weakref.ref(p) for s in engine.stages for p in s.module.parameters()]
    while engine.stages:
        engine.stages.pop().backend.close()
    del engine
    gc.collect()
    left = [ref() for ref in kept if ref() is not None]
    held = sum(p.numel() + getattr(p, "ds_tensor", torch.empty(0)).numel() for p in left)
    assert held == 0
