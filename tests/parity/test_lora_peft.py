"""What stages take from peft, and give back to it: defaults, models, names, types, files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

import scpl_ds
from scpl_ds import checkpoint
from scpl_ds.errors import CheckpointError, RecipeError
from scpl_ds.export import export_checkpoint, load_exported
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.lora import export_adapter
from scpl_ds.partition.stage_module import stage_from_model
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.setup import cut_model
from scpl_ds.trainer import fit
from tests.parity.test_lora import IDS, adapted_bert, base_of, mapping, of_stages, saved
from tests.support import runs, tiny_lm
from tests.support.distributed import distributed, run_ranks

pytestmark = pytest.mark.forks


# -- models with modules that are no nn.Linear ---------------------------------------------


def gpt2(folder: Path, **lora: Any) -> Recipe:
    """A run of a GPT-2 of four layers, whose linear modules are Conv1D."""
    made = mapping(folder, "causal-lm", **{f"model.lora.{key}": lora[key] for key in lora})
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=4, n_head=4, n_positions=256,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    return recipe_from_mapping(made)


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["c_attn"], "bias": "lora_only", "use_rslora": True},
        {"target_modules": ["c_attn", "c_proj"], "bias": "all"},
        {"target_modules": "all-linear"},
    ],
    ids=["lora_only-rslora", "bias-all", "all-linear"],
)
def test_an_adapter_of_a_gpt2_is_that_of_its_stages_and_merges(
    lora: dict[str, Any], tmp_path: Path
) -> None:
    run = gpt2(tmp_path, **lora)
    run_ranks(2, lambda: fit(run) and None)
    adapted = peft.PeftModel.from_pretrained(base_of(run), str(run.export_dir)).eval()
    folder = checkpoint.resolve(run.output_dir)
    out = export_checkpoint(folder, tmp_path / "merged", task="causal-lm", merge=True)
    merged = GPT2LMHeadModel.from_pretrained(out).eval()
    stages = of_stages(run)
    with torch.no_grad():
        torch.testing.assert_close(adapted(**IDS).logits, stages, rtol=0, atol=0)
        torch.testing.assert_close(merged(**IDS).logits, stages, rtol=1e-6, atol=1e-6)
        assert not stages.allclose(base_of(run)(**IDS).logits, rtol=1e-3)


# -- what peft would choose ----------------------------------------------------------------


def known(monkeypatch: pytest.MonkeyPatch, default: Any) -> None:
    from peft.utils import constants

    found = {"bert": default}
    monkeypatch.setattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", found)


def test_a_default_of_peft_that_is_an_expression_is_matched_to_whole_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, r".*encoder\..*\.(query|value)")
    adapters = cut_model(recipe_from_mapping(mapping(tmp_path, "sequence-classification"))).adapters
    assert adapters is not None
    wanted = {
        f"bert.encoder.layer.{layer}.attention.self.{name}"
        for layer in range(4)
        for name in ("query", "value")
    }
    assert adapters.targets == adapters.config.target_modules == wanted


@pytest.mark.parametrize(
    ("default", "says"),
    [
        (r".*language_model\..*\.q_proj", r"'\.\*language.*q_proj', fits no linear .*are dense,"),
        (["q_proj"], r"'q_proj', is no module of 'bert'"),
    ],
)
def test_a_default_of_peft_that_fits_nothing_is_named_as_such(
    default: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, default)
    asked = recipe_from_mapping(mapping(tmp_path, "sequence-classification"))
    with pytest.raises(RecipeError, match=f"peft's default for 'bert', {says}"):
        cut_model(asked)


def test_layers_with_as_many_other_adapters_are_measured_apart(tmp_path: Path) -> None:
    changes = {"model.lora.target_modules": ["0.attention.self.query", "1.intermediate.dense"]}
    asked = recipe_from_mapping(mapping(tmp_path, "sequence-classification", **changes))
    model = cut_model(asked)
    assert model.adapters is not None
    found = model.adapters.in_layers(model.anatomy, 0, 3)
    assert found == (("attention.self.query",), ("intermediate.dense",), ())


# -- a PeftModel ---------------------------------------------------------------------------


def test_an_adapter_loaded_for_inference_is_refused_with_the_argument_that_trains_it(
    tmp_path: Path,
) -> None:
    adapted_bert().save_pretrained(tmp_path)
    base = runs.model(dropout=0.0)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path))
    with pytest.raises(RecipeError, match="is_trainable=True"):
        scpl_ds.PipelineModule(loaded)
    again = runs.model(dropout=0.0)
    scpl_ds.PipelineModule(peft.PeftModel.from_pretrained(again, str(tmp_path), is_trainable=True))


def adapted_lm(*targets: str) -> Any:
    how = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=list(targets))
    return peft.get_peft_model(tiny_lm.model(tied=True), how).get_base_model()


@pytest.mark.parametrize("trained_head", [True, False])
def test_a_tie_beside_adapters_is_broken_only_where_it_is_trained(
    trained_head: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted_lm("q_proj")
    model.lm_head.weight.requires_grad_(trained_head)
    with caplog.at_level(logging.WARNING):
        stages = [stage_from_model(model, analyze(model), *span) for span in ((0, 2), (2, 4))]
    tie = ("lm_head.weight from model.embed_tokens.weight",) if trained_head else ()
    assert [stage.untied for stage in stages] == [tie, tie]
    assert ("UNTIED" in caplog.text) == trained_head


def test_adapters_of_an_embedding_are_exported_under_the_names_of_peft() -> None:
    model = adapted_lm("embed_tokens", "q_proj")
    adapters = {n: p.detach() for n, p in model.named_parameters() if ".lora_" in n}
    assert any(name.endswith("lora_embedding_A.default") for name in adapters)
    config = model.peft_config["default"]
    wanted = peft.get_peft_model_state_dict(peft.PeftModel(tiny_lm.model(), config))
    assert set(export_adapter(adapters)) == {n for n in wanted if ".lora_" in n}


# -- files ---------------------------------------------------------------------------------


@distributed(1)
def test_adapters_without_their_config_are_not_exported_as_a_model_nor_a_model_as_adapters(
    tmp_path: Path,
) -> None:
    files = tmp_path / "files"
    runs.model().config.save_pretrained(files)
    config = runs.config(2, pipeline_ranks=1)
    for name, model in (("adapted", adapted_bert()), ("whole", runs.model(dropout=0.0))):
        if name == "whole":
            adapted_bert().save_pretrained(files)
        engine = scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine
        engine.train_batch(runs.batches())
        engine.save_checkpoint(tmp_path / name, model_files=files)
    for name, says in (
        ("adapted", r"holds adapters \(\d+ of \d+ .*no model/adapter_config\.json"),
        ("whole", r"has model/adapter_config\.json, but none of its \d+ tensors"),
    ):
        folder = checkpoint.resolve(tmp_path / name)
        with pytest.raises(CheckpointError, match=says):
            export_checkpoint(folder, tmp_path / "out", task="sequence-classification")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_base_model_in_bf16_is_scored_as_it_was_trained(tmp_path: Path) -> None:
    made = mapping(tmp_path, "sequence-classification", **{"train.max_steps": 4})
    base = AutoModel.from_pretrained(tmp_path / "model").to(torch.bfloat16)
    base.save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    run = recipe_from_mapping(made)
    run_ranks(1, lambda: fit(run) and None)
    loaded = load_exported(run.export_dir, run.model.task)
    (head,) = [
        tensor
        for name, tensor in saved(run).items()
        if name.endswith("/classifier.weight") and "exp_avg" not in name
    ]
    assert not torch.equal(head.bfloat16().float(), head)
    assert torch.equal(loaded.state_dict()["classifier.modules_to_save.default.weight"], head)
    stages = of_stages(run, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**IDS).logits, stages, rtol=0, atol=0)


@pytest.mark.parametrize("adapters", [True, False])
def test_reading_what_objectives_borrow_warns_of_no_tie(
    adapters: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {
        "scpl.objective": {"name": "prototype", "positions": 24},
        "scpl.stages": 2 if adapters else 1,
        "scpl.head.detach_features": True,
        "scpl.pipeline_ranks": 1,
        "train.max_steps": 1,
    }
    if not adapters:
        changes["model.lora"] = None
    lines: list[str] = []

    def body() -> None:
        with caplog.at_level(logging.WARNING, "scpl_ds"):
            fit(recipe_from_mapping(mapping(tmp_path, "causal-lm", **changes)))
        lines.extend(r.getMessage() for r in caplog.records)
        assert not [line for line in lines if "UNTIED" in line]

    run_ranks(1, body)
