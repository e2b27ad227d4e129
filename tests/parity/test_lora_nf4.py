"""QLoRA: the linear modules of a stage's layers in 4 bits, through bitsandbytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from scpl_ds.engine import Engine
from scpl_ds.errors import PartitionError, RecipeError
from scpl_ds.memory import Prediction, Workload
from scpl_ds.partition.loading import load_stage
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.setup import cut_model, make_engine, start_world
from scpl_ds.trainer import fit
from tests.parity.test_language import batches
from tests.parity.test_lora import IDS, mapping, of_stages, saved
from tests.parity.test_lora_peft import gpt2
from tests.support import tiny
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks

NF4 = {"model.lora.base_dtype": "nf4", "deepspeed.bf16": {"enabled": True}}


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes")


def asked(folder: Path, **changes: Any) -> Recipe:
    return recipe_from_mapping(mapping(folder, "causal-lm", **{**NF4, **changes}))


def trained(folder: Path, ranks: int, **changes: Any) -> Recipe:
    recipe = asked(folder, **changes)

    def body() -> None:
        fit(recipe)

    run_ranks(ranks, body)
    return recipe


def made(recipe: Recipe) -> Engine:
    mesh, device = start_world(recipe)
    return make_engine(recipe, cut_model(recipe), mesh, device, total_steps=4)


def lane(engine: Engine) -> Iterator[dict[str, Tensor]]:
    mesh = engine.mesh
    return (b for n, b in enumerate(batches()) if n % mesh.dp_size == mesh.dp_rank)


@pytest.mark.parametrize("sharding", ["none", "ddp"])
def test_linear_modules_of_layers_are_packed_and_nothing_else_is(
    sharding: str, bnb: Any, tmp_path: Path
) -> None:
    recipe = asked(tmp_path, **{"scpl.sharding": sharding, "scpl.pipeline_ranks": 1})

    def body() -> None:
        engine = made(recipe)
        data = lane(engine)
        for _ in range(2):
            for stage in engine.stages:
                check(stage.module)
            engine.train_batch(data)

    def check(stage: Any) -> None:
        packed = 0
        for name, module in stage.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                packed += 1
                assert module.weight.dtype == torch.uint8
                assert module.weight.quant_type == "nf4"
                assert ".layers." in name
            elif isinstance(module, nn.Linear):
                wanted = torch.float32 if module.weight.requires_grad else torch.bfloat16
                assert module.weight.dtype == wanted
                assert wanted == torch.float32 or "lm_head" in name
        assert packed == 7 * (stage.body.end - stage.body.start)
        for name, parameter in stage.named_parameters():
            assert (parameter.dtype == torch.float32) == parameter.requires_grad, name

    run_ranks(2, body)


def test_two_ranks_train_what_one_process_trains_to_the_bit_and_save_adapters(
    bnb: Any, tmp_path: Path
) -> None:
    """With evaluations on the way, after which bitsandbytes would compute otherwise."""
    two = trained(tmp_path / "two", 2)
    one = trained(tmp_path / "one", 1, **{"scpl.pipeline_ranks": 1})
    never = trained(
        tmp_path / "never", 1, **{"scpl.pipeline_ranks": 1, "train.eval_strategy": "no"}
    )
    tiny.assert_same(saved(one), saved(two))
    tiny.assert_same(saved(never), saved(two))
    assert {tensor.dtype for tensor in saved(two).values()} == {torch.float32}
    names = [name.rpartition("/")[2] for name in saved(two)]
    assert all(".lora_" in name or name.startswith("scpl_heads.") for name in names)


def test_peft_on_a_base_that_transformers_packed_gives_the_logits_of_the_stages(
    bnb: Any, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    run = trained(tmp_path, 1, **{"scpl.pipeline_ranks": 1})
    config = AutoConfig.from_pretrained(run.export_dir)
    wanted = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        run.model.name_or_path, config=config, quantization_config=wanted, dtype=torch.bfloat16
    )
    packed: Any
    for packed in base.modules():
        if isinstance(packed, bnb.nn.Linear4bit):
            packed.support_avx512bf16_for_cpu = False
    adapted = peft.PeftModel.from_pretrained(base, str(run.export_dir)).eval()
    plain = AutoModelForCausalLM.from_pretrained(run.model.name_or_path, config=config)
    plain = peft.PeftModel.from_pretrained(plain, str(run.export_dir)).eval()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            staged, whole = of_stages(run).float(), adapted(**IDS).logits.float()
        exact = plain(**IDS).logits
    # transformers packs what it has made bf16 before; the stages what is in the file.
    assert (whole - staged).norm() < staged.norm() / 20
    assert (exact - staged).norm() < staged.norm() / 3  # of four bits


@pytest.mark.parametrize(
    "changes",
    [
        {"train.gradient_checkpointing": True},
        {"scpl.freeze_stages": 1},
        {"scpl.lookahead": 1},
        {"scpl.method": "bp"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_features_train_beside_packed_weights(
    changes: dict[str, Any], bnb: Any, tmp_path: Path
) -> None:
    run = trained(tmp_path, 2, **changes)
    ups = [t for name, t in saved(run).items() if ".lora_B." in name and "exp_avg" not in name]
    assert ups and any(t.any() for t in ups) and all(t.isfinite().all() for t in ups)


def test_the_predicted_parameters_are_those_that_are_held(bnb: Any, tmp_path: Path) -> None:
    recipe = asked(tmp_path, **{"scpl.pipeline_ranks": 1})
    sizes, _ = Prediction(Workload.of(recipe, cut_model(recipe), "cpu")).sizes()

    def body() -> None:
        for stage, size in zip(made(recipe).stages, sizes, strict=True):
            held = sum(
                tensor.nbytes
                for name, tensor in stage.module.state_dict().items()
                if ".lora_" not in name
                and not name.startswith("objective.")
                and not name.endswith("bitsandbytes__nf4")  # made for the state dict
            )
            assert size.frozen_bytes == held

    run_ranks(1, body)


def test_a_model_without_linear_modules_is_refused(bnb: Any, tmp_path: Path) -> None:
    run = gpt2(tmp_path, target_modules=["c_attn"])
    run = recipe_from_mapping(tiny.put(run.to_mapping(), NF4))
    model = cut_model(run)
    with pytest.raises(PartitionError, match=r"'gpt2' have none .*Conv1D.* Use bfloat16"):
        load_stage(model.path, "causal-lm", model.anatomy, 0, 2, config=model.config, seed=1,
                   adapters=model.adapters)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scpl.sharding": "fsdp", "deepspeed.zero_optimization": {"stage": 3}},
         "cannot be shared out .* scpl.sharding: fsdp; use none or ddp, or bfloat16"),
        ({"scpl.sharding": "deepspeed", "deepspeed.zero_optimization": {"stage": 3}},
         "cannot be shared out .* scpl.sharding: deepspeed"),
        ({"deepspeed.bf16": {"enabled": False}}, "nf4 weights are computed with in bf16, but"),
        ({"model.lora.bias": "all"}, "model.lora.bias: is all, but bitsandbytes makes biases"),
    ],
)  # fmt: skip
def test_where_nf4_cannot_be_it_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=says):
        asked(tmp_path, **changes)


def test_without_bitsandbytes_there_is_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = asked(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = cut_model(recipe)
    with pytest.raises(RecipeError, match=r"base_dtype: nf4 .*pip install 'scpl-ds\[qlora\]'"):
        load_stage(model.path, "causal-lm", model.anatomy, 0, 2, config=model.config, seed=1,
                   adapters=model.adapters)  # fmt: skip
