"""Every stage inside its own DeepSpeed engine: ZeRO-0 to 3, offloading, mixed precision."""

from __future__ import annotations

import contextlib
import itertools
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


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2-offload"])
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


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero3-offload"])
@distributed(2)
def test_bf16_stays_within_its_rounding_of_fp32(zero: str) -> None:
    """10 steps at a learning rate of 2e-3: 1e-2 of absolute difference is what a hand-written
    bf16 loop with fp32 masters shows on this model."""
    wanted = train(build(None, pipeline_ranks=1), 10)
    engine = build(zero, pipeline_ranks=1, more=BF16)
    found = train(engine, 10)
    runs.assert_equal(found, wanted, rtol=0, atol=1e-2)
    assert all(tensor.dtype == torch.float32 for n, tensor in found.items() if "weight" in n)
    moved = max(float((found[n] - t).abs().max()) for n, t in runs.weights_of_engine(
        build(None, pipeline_ranks=1)).items())  # fmt: skip
    assert moved > 1e-2, "nothing was trained"


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
@distributed(2)
def test_torch_autocast_stays_within_bf16_rounding_of_fp32(zero: str) -> None:
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    wanted = train(build(None, pipeline_ranks=1), 5)
    found = train(build(zero, pipeline_ranks=1, more=autocast), 5)
    runs.assert_equal(found, wanted, rtol=0, atol=1e-2)


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


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2-offload"])
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
    assert engine.lr_at(engine.global_steps) == calm.lr_at(calm.global_steps)


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


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
@distributed(2)
def test_fp16_stays_within_its_rounding_of_fp32(zero: str) -> None:
    wanted = train(build(None, pipeline_ranks=1), 5)
    with fp16_on_this_cpu():
        found = train(build(zero, pipeline_ranks=1, more=FP16), 5)
    runs.assert_equal(found, wanted, rtol=0, atol=5e-3)


@distributed(1)
def test_fp16_is_refused_by_name_where_deepspeed_refuses_it() -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU has fp16")
    with pytest.raises(RecipeError, match="fp16 is not supported"):
        build("zero1", more=FP16)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3", "zero2-offload"])
@distributed(4)
def test_clipping_by_the_norm_of_all_stages_is_backprops_clipping(zero: str) -> None:
    options: dict[str, Any] = {"pipeline_ranks": 2, "clip": 0.3}
    together = {"sync": "step", "clip_scope": "global"}
    found = train(build(zero, **options, **together), 5)
    wanted = train(build(None, **options, **together), 5)
    runs.assert_equal(found, wanted, rtol=1e-5, atol=1e-6)
    alone = train(build(None, **options), 5)
    assert any(not torch.allclose(alone[name], wanted[name], atol=1e-5) for name in wanted)


@pytest.mark.parametrize("more", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", ["zero2", "zero3", "zero3-offload"])
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


@pytest.mark.parametrize("more", [{}, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3", "zero2-offload"])
@distributed(2)
def test_data_that_end_in_the_middle_of_a_zero_step_leave_no_trace(
    zero: str, more: dict[str, Any]
) -> None:
    weights = []
    for numbers in ([0, 1, 2], [0, 1]):
        engine = build(zero, pipeline_ranks=1, more=more)
        batches = list(itertools.islice(runs.batches(), 6))
        epoch = iter([batches[n] for n in numbers])
        engine.train_batch(epoch)
        if len(numbers) == 3:
            with pytest.raises(StopIteration):
                engine.train_batch(epoch)
        engine.train_batch(iter(batches[3:]))
        weights.append(runs.weights_of_engine(engine))
    runs.assert_equal(weights[0], weights[1])
    assert dist.get_world_size() == 2


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
