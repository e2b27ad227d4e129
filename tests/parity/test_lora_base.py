"""Frozen weights in half of fp32's memory beside adapters in fp32: ``model.lora.base_dtype``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

import scpl_ds
from scpl_ds.bench import memory
from scpl_ds.bench.memory import Case, Shape
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.export import load_exported
from scpl_ds.memory import Workload, predict
from scpl_ds.memory_report import describe
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.setup import cut_model, make_engine, start_world
from scpl_ds.trainer import fit
from tests.parity.test_lora import AUTO, IDS, base_of, drawn, mapping, of_stages, saved
from tests.support import runs, tiny
from tests.support.distributed import distributed, run_ranks

pytestmark = pytest.mark.forks

HALF = {"model.lora.base_dtype": "bfloat16", "deepspeed.bf16": {"enabled": True}}
BACKENDS: dict[str, dict[str, Any]] = {
    "none": {"scpl.sharding": "none"},
    "ddp": {"scpl.sharding": "ddp"},
    "fsdp-2": {"scpl.sharding": "fsdp", "deepspeed.zero_optimization": {"stage": 2}},
    "fsdp-3": {"scpl.sharding": "fsdp", "deepspeed.zero_optimization": {"stage": 3}},
    "fsdp-autocast": {
        "scpl.sharding": "fsdp",
        "deepspeed.zero_optimization": {"stage": 3},
        "deepspeed.bf16": {"enabled": False},
        "deepspeed.torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    },
}


def asked(folder: Path, task: str = "sequence-classification", **changes: Any) -> Recipe:
    return recipe_from_mapping(mapping(folder, task, **{**HALF, **changes}))


def trained(folder: Path, ranks: int, task: str, **changes: Any) -> Recipe:
    recipe = asked(folder, task, **changes)

    def body() -> None:
        fit(recipe)

    run_ranks(ranks, body)
    return recipe


@pytest.fixture(scope="module", params=list(AUTO))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run of two stages on two gloo ranks."""
    return trained(tmp_path_factory.mktemp("half"), 2, request.param)


def types(engine: Engine) -> dict[str, set[torch.dtype]]:
    """Of what is trained and of what is not, over this rank's stages."""
    found: dict[str, set[torch.dtype]] = {"trained": set(), "frozen": set()}
    for stage in engine.stages:
        for parameter in stage.module.parameters():
            found["trained" if parameter.requires_grad else "frozen"].add(parameter.dtype)
    return found


# -- types ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_stage_holds_its_base_in_bf16_and_what_it_trains_in_fp32(
    backend: str, tmp_path: Path
) -> None:
    recipe = asked(tmp_path, **{**BACKENDS[backend], "scpl.pipeline_ranks": 1})

    def body() -> None:
        mesh, device = start_world(recipe)
        model = cut_model(recipe)
        engine = make_engine(recipe, model, mesh, device, total_steps=4)
        data = runs.lane(batches(), mesh.dp_rank, mesh.dp_size)
        for _ in range(2):
            assert types(engine) == {"trained": {torch.float32}, "frozen": {torch.bfloat16}}
            engine.train_batch(data)
        for stage in engine.stages:
            for by_name in stage.optimizer_state().moments.values():
                assert {moment.dtype for moment in by_name.values()} == {torch.float32}

    run_ranks(2, body)


def batches() -> Iterator[dict[str, Tensor]]:
    for batch in runs.batches():
        batch["input_ids"] %= len(tiny.WORDS)
        yield {**batch, "labels": batch["labels"] % 2}


@pytest.mark.parametrize("backend", ["none", "ddp", "fsdp"])
@distributed(2)
def test_a_peft_model_with_a_bf16_base_is_trained_as_it_was_given(backend: str) -> None:
    zero = {"zero": 3} if backend == "fsdp" else {}
    config = runs.config(2, pipeline_ranks=1, sharding=backend, **zero)
    if backend != "fsdp":  # which makes all fp32
        with pytest.raises(RecipeError, match=r"bfloat16"):  # nothing computes in it
            scpl_ds.initialize(model=half_bert(), config=config, seed=runs.SEED)
    config["bf16"] = {"enabled": True}
    engine = scpl_ds.initialize(model=half_bert(), config=config, seed=runs.SEED).engine
    assert types(engine) == {"trained": {torch.float32}, "frozen": {torch.bfloat16}}
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, engine.mesh.dp_size)
    losses = [engine.train_batch(data).item() for _ in range(3)]
    assert torch.tensor(losses).isfinite().all()


def half_bert() -> Any:
    torch.manual_seed(5)
    wanted = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return peft.get_peft_model(runs.model(dropout=0.0).bfloat16(), wanted)


# -- numbers -------------------------------------------------------------------------------


def test_two_ranks_train_what_one_process_trains_to_the_bit(run: Recipe, tmp_path: Path) -> None:
    alone = trained(tmp_path, 1, run.model.task, **{"scpl.pipeline_ranks": 1})
    tiny.assert_same(saved(alone), saved(run))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run: Recipe, tmp_path: Path) -> None:
    early = run.output_dir / "checkpoint-4"
    changes = {"train.resume_from_checkpoint": str(early), "train.output_dir": str(tmp_path / "b")}
    again = trained(tmp_path / "a", 2, run.model.task, **changes)
    tiny.assert_same(saved(again), saved(run))


def test_adapters_start_as_beside_a_base_in_fp32(run: Recipe, tmp_path: Path) -> None:
    whole = mapping(tmp_path, run.model.task)
    whole["model"]["name_or_path"] = run.model.name_or_path
    tiny.assert_same(drawn(run, [0, 2, 4]), drawn(recipe_from_mapping(whole), [0, 4]))


def test_only_what_is_trained_is_saved_and_in_fp32(run: Recipe) -> None:
    tensors = saved(run)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    plain = [n.rpartition("/")[2] for n in tensors if ".lora_" not in n]
    assert all(name.startswith(("classifier.", "scpl_heads.")) for name in plain)


@torch.no_grad()
def test_the_adapter_is_an_ordinary_one_of_the_untouched_base(run: Recipe) -> None:
    base = base_of(run)
    assert base.dtype == torch.float32  # as in its own files
    adapted = peft.PeftModel.from_pretrained(base, str(run.export_dir)).eval()
    whole = adapted(**IDS).logits
    torch.testing.assert_close(whole, load_exported(run.export_dir, run.model.task)(**IDS).logits)
    assert not whole.allclose(base_of(run)(**IDS).logits, rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        staged = of_stages(run).float()
    # Of 8 bits a weight and a product, over four layers.
    assert (whole - staged).norm() < whole.norm() / 30
    if run.model.task == "causal-lm":
        config = AutoConfig.from_pretrained(run.export_dir)
        half = AUTO[run.model.task].from_pretrained(
            run.model.name_or_path, config=config, dtype=torch.bfloat16
        )
        half = peft.PeftModel.from_pretrained(half, str(run.export_dir)).eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert half(**IDS).logits.float().equal(staged)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.lora.bias": "all", "model.lora.target_modules": "all-linear"},
        {"train.gradient_checkpointing": True},
        {"scpl.freeze_stages": 1},
        {"scpl.lookahead": 1},
        {"scpl.polish": 0.5},
        {"scpl.method": "bp"},
        {"scpl.sharding": "deepspeed", "deepspeed.zero_optimization": {"stage": 2}},
        {"scpl.sharding": "deepspeed", "deepspeed.zero_optimization": {"stage": 3},
         "scpl.freeze_stages": 1},
        {"scpl.sharding": "fsdp", "deepspeed.zero_optimization": {"stage": 3},
         "scpl.pipeline_ranks": 1, "model.lora.bias": "all"},
        {"scpl.sharding": "ddp", "scpl.pipeline_ranks": 1, "model.lora.bias": "lora_only"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()).replace(" ", ""),
)  # fmt: skip
def test_other_features_train_beside_a_bf16_base(changes: dict[str, Any], tmp_path: Path) -> None:
    run = trained(tmp_path, 2, "sequence-classification", **changes)
    with torch.no_grad():
        found = load_exported(run.export_dir, run.model.task)(**IDS).logits
    assert found.isfinite().all()
    assert not found.allclose(base_of(run)(**IDS).logits, rtol=1e-3)


def test_a_norm_whose_bias_is_trained_stays_whole_in_fp32(tmp_path: Path) -> None:
    recipe = asked(tmp_path, **{"model.lora.bias": "all", "scpl.pipeline_ranks": 1})

    def body() -> None:
        mesh, device = start_world(recipe)
        engine = make_engine(recipe, cut_model(recipe), mesh, device, total_steps=4)
        engine.train_batch(batches())
        norms = [
            m for s in engine.stages for m in s.module.modules() if isinstance(m, nn.LayerNorm)
        ]
        assert norms
        for norm in norms:
            assert {p.dtype for p in norm.parameters()} == {torch.float32}

    run_ranks(1, body)


# -- memory --------------------------------------------------------------------------------


def test_every_rank_is_measured_to_hold_half_and_to_need_less() -> None:
    half = {"bf16": {"enabled": True}}
    cases = [
        Case("scpl", 2, 2, 1, deepspeed=half, lora={"r": 4, "base_dtype": dtype})
        for dtype in (None, "bfloat16")
    ]
    whole, held = memory.run("standard", cases=cases, shape=Shape("bert-11m", 4, 64))
    for before, after in zip(whole["per_rank"], held["per_rank"], strict=True):
        assert after["parameter_bytes"] < 0.55 * before["parameter_bytes"]
        assert after["peak_bytes"] < before["peak_bytes"]
    assert 0.5 < held["predicted_peak_bytes"] / held["peak_bytes"] < 1.5
    saving = whole["parameter_bytes"] - held["parameter_bytes"]  # of the rank with the embeddings
    assert whole["peak_bytes"] - held["peak_bytes"] > 0.5 * saving


@pytest.mark.parametrize("backend", ["none", "ddp", "fsdp-3", "fsdp-autocast"])
def test_the_predicted_parameters_are_those_that_are_held(backend: str, tmp_path: Path) -> None:
    recipe = asked(tmp_path, **{**BACKENDS[backend], "scpl.pipeline_ranks": 1})
    workload = Workload.of(recipe, cut_model(recipe), "cpu")
    (rank,) = predict(workload, pipeline_ranks=1, dp_size=2)

    def body() -> None:
        mesh, device = start_world(recipe)
        engine = make_engine(recipe, cut_model(recipe), mesh, device, total_steps=4)
        own, heads = 0, 0
        for stage in engine.stages:
            for name, parameter in stage.module.named_parameters():
                held: Any = getattr(parameter, "_local_tensor", parameter)
                heads += held.nbytes * name.startswith("objective.")
                own += held.nbytes
        assert rank.parameters == pytest.approx(own - heads, rel=0.1)

    run_ranks(2, body)


def test_what_fits_leaves_out_what_would_not_hold_bf16(tmp_path: Path) -> None:
    changes = {"deepspeed.bf16": {"enabled": False},
               "deepspeed.torch_autocast": {"enabled": True, "dtype": "bfloat16"}}  # fmt: skip
    recipe = asked(tmp_path, **changes)
    workload = Workload.of(recipe, cut_model(recipe), "cpu")
    text = describe(workload, pipeline_ranks=2, dp_size=1, memory=2**34)
    assert "model.lora.base_dtype: bfloat16 weights are computed with in bf16, but" in text


# -- refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"deepspeed.bf16": {"enabled": False}}, "this run computes in fp32; set deepspeed.bf16"),
        ({"deepspeed.bf16": {"enabled": False}, "deepspeed.fp16": {"enabled": True}},
         "computes in fp16; set"),
        ({"deepspeed.bf16": {"enabled": False}, "scpl.sharding": "deepspeed"},
         "with scpl.sharding: deepspeed this run computes in fp32"),
        ({"model.lora.base_dtype": "float32"}, "how they are held without the key; remove it"),
        ({"model.lora.base_dtype": "float16"}, "float16 would round .* use bfloat16"),
        ({"model.lora.base_dtype": "bf16"}, "'bf16'; did you mean 'bfloat16'"),
        ({"model.lora.base_dtype": "int8"}, "model.lora.base_dtype: must be 'bfloat16'.* 'int8'"),
    ],
)  # fmt: skip
def test_a_type_that_would_not_train_is_refused_with_a_way_out(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        asked(tmp_path, **changes)
