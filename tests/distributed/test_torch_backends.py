"""``sharding: ddp`` and ``fsdp`` train what ``none`` trains, and keep what it keeps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import BertConfig

import scpl_ds
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import RecipeError
from scpl_ds.meter import give_back_freed_memory
from scpl_ds.optim import build_optimizer
from scpl_ds.partition.anatomy import anatomy_of
from scpl_ds.partition.loading import load_stage
from scpl_ds.registry import resolve
from scpl_ds.stage import LocalStage, as_body
from tests.support import runs
from tests.support.distributed import distributed, run_ranks
from tests.support.models import build

BACKENDS: dict[str, dict[str, Any]] = {
    "none": {"sharding": "none"},
    "ddp": {"sharding": "ddp"},
    "fsdp2": {"sharding": "fsdp", "zero": 2},
    "fsdp3": {"sharding": "fsdp", "zero": 3},
}
OTHERS = [name for name in BACKENDS if name != "none"]
OFFLOAD = {f"offload_{what}": {"device": "cpu"} for what in ("optimizer", "param")}
EQUAL = {"rtol": 1e-5, "atol": 1e-7}


def start(backend: str, *, section: dict[str, Any] | None = None, **options: Any) -> Any:
    """An engine of two stages on every rank, with more keys of the ``deepspeed`` section."""
    # An attention key's bias has no gradient but rounding, which a small eps would blow up.
    given = {"pipeline_ranks": 1, "eps": 1e-4, **BACKENDS[backend], **options}
    config = runs.config(given.pop("stages", 2), **given)
    for key, value in (section or {}).items():
        config[key] = {**config.get(key, {}), **value}
    return scpl_ds.initialize(model=runs.model(), config=config, seed=runs.SEED).engine


def lane(engine: scpl_ds.Engine, *, skip: int = 0, stop: int | None = None) -> Iterator[Any]:
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, engine.mesh.dp_size)
    return itertools.islice(data, skip, stop)


def train(engine: scpl_ds.Engine, steps: int) -> scpl_ds.Engine:
    data = lane(engine)
    for _ in range(steps):
        engine.train_batch(data)
    engine.drain()
    return engine


def moments(engine: scpl_ds.Engine) -> dict[str, Tensor]:
    """Optimizer state of this rank's stages; the number of steps too."""
    found: dict[str, Tensor] = {}
    for stage in engine.stages:
        state = stage.optimizer_state()
        found[f"step of {stage.index}"] = torch.tensor(state.step)
        for key, tensors in state.moments.items():
            found |= {f"{key} of {name}": tensor for name, tensor in tensors.items()}
    return found


# -- the same numbers ----------------------------------------------------------------------


@pytest.mark.parametrize("stages, ranks, dp, steps", [(2, 2, 2, 10), (4, 1, 2, 4), (2, 2, 1, 4)])
@distributed(lambda ranks, dp: ranks * dp)
def test_all_train_to_the_same_weights(stages: int, ranks: int, dp: int, steps: int) -> None:
    setting = {"stages": stages, "accumulation": 2, "pipeline_ranks": ranks, "clip": 0.2}
    plain = train(start("none", **setting), steps)
    wanted = runs.weights_of_engine(plain)
    norms = {name: norm for name, norm in plain.metrics().items() if "grad_norm" in name}
    assert norms and all(norm > 0.2 for norm in norms.values())  # all were clipped
    for backend in OTHERS:
        other = train(start(backend, **setting), steps)
        runs.assert_equal(norms, other.metrics(), rtol=1e-5)
        runs.assert_equal(runs.weights_of_engine(other), wanted, **EQUAL)


@distributed(2)
def test_bf16_stays_near_fp32_and_keeps_fp32_weights() -> None:
    """After 10 steps bf16 has moved the weights to within 10 % of where fp32 moved them."""
    before = runs.weights_of_engine(start("none"))
    wanted = runs.weights_of_engine(train(start("none"), 10))
    for backend in ("ddp", "fsdp3"):
        engine = train(start(backend, section={"bf16": {"enabled": True}}), 10)
        found = runs.weights_of_engine(engine)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        moved, off = (
            sum(float((one[name] - wanted[name]).square().sum()) for name in wanted) ** 0.5
            for one in (before, found)
        )
        assert 0 < off < 0.1 * moved, backend


@distributed(2)
def test_offloading_changes_no_number() -> None:
    plain = train(start("fsdp3"), 3)
    away = train(start("fsdp3", section={"zero_optimization": OFFLOAD}), 3)
    runs.assert_equal(runs.weights_of_engine(away), runs.weights_of_engine(plain))


# -- an overflow ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@distributed(2)
def test_an_overflow_skips_the_step_of_its_stage_on_all_its_ranks_only(backend: str) -> None:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 10}}
    smooth, bumpy = start(backend, section=fp16), start(backend, section=fp16)
    stage, step = bumpy.stages[1], 2

    def overflow(parameter: Tensor) -> None:
        if bumpy.global_steps == step and bumpy.mesh.dp_rank == 1:
            gradient = parameter.grad
            assert gradient is not None
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            local.view(-1)[0] = torch.inf

    weight = stage.module.get_parameter("body.model.classifier.weight")
    weight.register_post_accumulate_grad_hook(overflow)
    data, same = lane(smooth), lane(bumpy)
    for now in range(4):
        smooth.train_batch(data)
        before = stage.parameters_by_name()
        bumpy.train_batch(same)
        changed = [n for n, t in stage.parameters_by_name().items() if not t.equal(before[n])]
        assert bool(changed) == (now > step)  # the learning rate is 0 before
        seen = bumpy.metrics()
        assert seen["stage1/skipped_steps"] == (now >= step)
        assert seen["stage1/loss_scale"] == (512 if now >= step else 1024)
        # About 0.7 once it is divided by the scale; NaN where it overflowed.
        assert (float(seen["stage1/grad_norm"]) < 10) == (now != step)
        assert seen["stage0/skipped_steps"] == 0
    runs.assert_equal(bumpy.stages[0].parameters_by_name(), smooth.stages[0].parameters_by_name())


# -- what is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", OTHERS)
@distributed(2)
def test_a_run_with_evaluation_a_lost_step_and_a_resume_is_the_same_to_the_bit(
    tmp_path: Path, backend: str
) -> None:
    whole = train(start(backend, accumulation=2), 3)
    first = start(backend, accumulation=2)
    with pytest.raises(StopIteration):  # in the middle of the second step
        data = lane(first, stop=3)
        while True:
            first.train_batch(data)
    stage = first.stages[0]  # an error between a forward and its backward
    stage.backend.forward(inputs=next(runs.batches()), hidden_states=None)
    stage.discard_step()
    kept = moments(first)
    first.eval_batch(runs.batches())
    runs.assert_equal(kept, moments(first))
    first.save_checkpoint(tmp_path)
    second = start(backend, accumulation=2)
    second.eval_batch(runs.batches())  # whole weights of before must not stay
    second.load_checkpoint(tmp_path)
    for engine in (first, second):
        data = lane(engine, skip=2)
        for _ in range(2):
            engine.train_batch(data)
        runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_engine(whole))
        runs.assert_equal(moments(engine), moments(whole))


@distributed(2)
def test_a_checkpoint_goes_from_two_sharded_ranks_to_one_whole_and_back(tmp_path: Path) -> None:
    sharded = train(start("fsdp3"), 3)
    sharded.save_checkpoint(tmp_path / "sharded")
    single = start("none", pipeline_ranks=2)  # a stage each, one data-parallel rank
    single.load_checkpoint(tmp_path / "sharded")
    runs.assert_equal(runs.weights_of_engine(single), runs.weights_of_engine(sharded))
    runs.assert_equal(moments(single), moments(sharded))
    single.save_checkpoint(tmp_path / "single")
    again = start("fsdp2")
    again.load_checkpoint(tmp_path / "single")
    runs.assert_equal(runs.weights_of_engine(again), runs.weights_of_engine(sharded))
    runs.assert_equal(moments(again), moments(sharded))


# -- parameters that are not all alike -----------------------------------------------------


class Uneven(nn.Module):
    """Rows that do not divide by the ranks, one row only, frozen, used by one rank or by none."""

    def __init__(self, *, idle: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.outer = nn.Linear(7, 5)
        self.single = nn.Parameter(torch.ones(1, 5))
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(3 if idle else 0))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.outer(self.inner(x).relu()) * self.single + self.frozen(x)
        return x + self.branches[dist.get_rank()](x) if self.branches else x


def uneven(backend: str, *, idle: bool, optimizer: Callable[..., Any]) -> scpl_ds.Engine:
    layers = [scpl_ds.LayerSpec(Uneven, idle=idle) for _ in range(3)] + [nn.Linear(5, 3)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers[-1] = nn.Linear(5, 3)
    model = scpl_ds.PipelineModule(
        layers, loss_fn=nn.functional.cross_entropy, input_example=torch.zeros(6, 5)
    )
    config = runs.config(2, pipeline_ranks=1, clip=0.1, **BACKENDS[backend])
    return scpl_ds.initialize(model=model, optimizer=optimizer, config=config, seed=1).engine


def points(rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    while True:
        x = torch.randn(6, 5, generator=generator)
        yield x, x.argmax(dim=1) % 3


@pytest.mark.parametrize("idle", [False, True], ids=["all-used", "some-unused"])
@pytest.mark.parametrize("backend", OTHERS)
@distributed(2)
def test_uneven_frozen_and_unused_parameters_under_the_users_optimizer(
    tmp_path: Path, backend: str, idle: bool
) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    engine = uneven(backend, idle=idle, optimizer=sgd)
    data = points(engine.mesh.dp_rank)
    if backend == "ddp" and idle:
        with pytest.raises(RecipeError, match=r"gave 8 of 28 .*\(body\.layers\.0\.branches"):
            engine.train_batch(data)
        return
    plain = uneven("none", idle=idle, optimizer=sgd)
    same = points(engine.mesh.dp_rank)
    for _ in range(3):
        engine.train_batch(data)
        plain.train_batch(same)
    runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_engine(plain), **EQUAL)
    engine.save_checkpoint(tmp_path)
    again = uneven(backend, idle=idle, optimizer=sgd)
    again.load_checkpoint(tmp_path)
    runs.assert_equal(runs.weights_of_engine(again), runs.weights_of_engine(engine))
    runs.assert_equal(moments(again), moments(engine))


# -- memory --------------------------------------------------------------------------------


def private_bytes() -> int:
    """Memory of this process that is in no file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = BertConfig(
        vocab_size=4000, hidden_size=512, num_hidden_layers=4, num_attention_heads=8,
        intermediate_size=2048, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    # In a process of its own: freed memory of this one would be used again, and hide the growth.
    run_ranks(1, lambda: build(config, "sequence-classification").save_pretrained(folder))
    return folder


@distributed(2)
def test_a_rank_takes_memory_for_its_share_of_a_file_only(wide_checkpoint: Path) -> None:
    config = BertConfig.from_pretrained(wide_checkpoint)
    task = "sequence-classification"
    anatomy = anatomy_of(config, task)
    mesh = Mesh(1, 2, "cpu", timeout_s=20)
    section = DeepSpeedSection.from_mapping(
        {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}, sharding="fsdp"
    ).at(2)
    body = load_stage(wide_checkpoint, task, anatomy, 0, 4, config=config, seed=0)
    module = LocalStage(as_body(body), None, detach_features=False)
    size = sum(p.nbytes for p in module.parameters())
    give_back_freed_memory()  # or the C library keeps layers that were whole, for later
    before = private_bytes()
    kind = resolve("sharding", "fsdp", where="test")
    backend = kind(
        module, lambda named: build_optimizer(named, section), section, mesh, torch.device("cpu")
    )
    grown = private_bytes() - before
    # Half; on top of it, code that the first use of FSDP loads: up to 8 MB.
    assert size > 50e6 and 0.45 * size < grown < 0.75 * size, (size, grown)
    assert backend.shapes["body.model.classifier.weight"] == (2, 512)
