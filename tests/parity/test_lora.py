"""LoRA in stages is LoRA of the whole model: what is drawn, trained, saved and exported."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import scpl_ds
from scpl_ds import checkpoint
from scpl_ds.errors import CheckpointError, PartitionError, RecipeError
from scpl_ds.evaluation import evaluate_run
from scpl_ds.export import export_checkpoint, load_exported
from scpl_ds.generation import generate
from scpl_ds.memory import Workload, predict
from scpl_ds.partition.loading import load_stage
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.setup import cut_model
from scpl_ds.trainer import fit
from tests.parity import test_language
from tests.support import runs, tiny
from tests.support.distributed import distributed, run_ranks

pytestmark = pytest.mark.forks

LORA = {"r": 4, "alpha": 16, "dropout": 0.1}
AUTO = {
    "sequence-classification": AutoModelForSequenceClassification,
    "causal-lm": AutoModelForCausalLM,
}
HEADS = ("classifier.", "scpl_heads.")
WITHOUT_HEAD = {"name": "supcon", "projection": "identity", "layer_norm": False}


def mapping(folder: Path, task: str, **changes: Any) -> dict[str, Any]:
    """A recipe of two stages with adapters, 8 steps, checkpoints after 4 and 8."""
    folder.mkdir(exist_ok=True)
    if task == "causal-lm":
        made = test_language.recipe(folder)
        made["train"] |= {"max_steps": 8}
        wanted = {"target_modules": ["q_proj", "down_proj"]}
    else:
        made, wanted = tiny.make(folder), {}
    made["train"] |= {"save_steps": 4}
    made["model"]["lora"] = {**LORA, **wanted}
    return tiny.put(made, changes)


def trained(folder: Path, ranks: int, task: str, **changes: Any) -> Recipe:
    """Such a recipe after its run on so many ranks."""
    asked = recipe_from_mapping(mapping(folder, task, **changes))
    run_ranks(ranks, lambda: fit(asked) and None)
    return asked


@pytest.fixture(scope="module", params=list(AUTO))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run of two stages on two gloo ranks."""
    return trained(tmp_path_factory.mktemp("lora"), 2, request.param)


def base_of(run: Recipe) -> Any:
    """The base model with the run's number of classes."""
    config = AutoConfig.from_pretrained(run.export_dir)
    return AUTO[run.model.task].from_pretrained(run.model.name_or_path, config=config).eval()


def saved(run: Recipe) -> dict[str, Tensor]:
    """Everything of the last checkpoint, by ``<file>/<name>``."""
    return tiny.tensors_of(checkpoint.resolve(run.output_dir))


IDS = {"input_ids": torch.arange(4, 40).view(3, 12), "attention_mask": torch.ones(3, 12).long()}


@torch.no_grad()
def of_stages(run: Recipe, **options: Any) -> Tensor:
    """Logits of the run's stages, one after the other."""
    model = cut_model(run)
    tensors = {name.partition("/")[2]: tensor for name, tensor in saved(run).items()}
    hidden = logits = None
    for span in itertools.pairwise(model.plan.bounds):
        stage = load_stage(
            model.path, run.model.task, model.anatomy, *span,
            config=AutoConfig.from_pretrained(run.export_dir), seed=1, adapters=model.adapters,
            **options,
        )  # fmt: skip
        own = {name: tensors[name] for name in stage.kept or ()}
        stage.model.load_state_dict(own, strict=False)
        _, (hidden, _, logits) = hidden, stage(IDS, hidden)
    assert logits is not None
    return logits


@torch.no_grad()
def test_plain_peft_loads_the_export_and_gives_the_logits_of_the_stages(run: Recipe) -> None:
    adapted = peft.PeftModel.from_pretrained(base_of(run), str(run.export_dir)).eval()
    found = adapted(**IDS).logits
    torch.testing.assert_close(found, of_stages(run), rtol=0, atol=0)
    assert not found.allclose(base_of(run)(**IDS).logits, rtol=1e-3)
    facts = adapted.active_peft_config
    assert facts.base_model_name_or_path == run.model.name_or_path
    assert (facts.r, facts.lora_alpha, facts.inference_mode) == (4, 16, True)
    known = set(load_file(run.export_dir / "adapter_model.safetensors"))
    assert known == set(peft.get_peft_model_state_dict(adapted))


@torch.no_grad()
def test_the_merged_export_is_an_ordinary_model_with_the_logits_of_the_adapter(
    run: Recipe, tmp_path: Path
) -> None:
    folder, task = checkpoint.resolve(run.output_dir), run.model.task
    out = tmp_path / "merged"
    for _ in range(2):  # an earlier export may be replaced
        export_checkpoint(folder, out, task=task, merge=True)
    assert not list(out.glob("adapter*"))
    merged = AUTO[task].from_pretrained(out).eval()(**IDS).logits
    adapted = load_exported(run.export_dir, task)(**IDS).logits
    # W x + s B A x beside (W + s B A) x: the same up to the rounding of fp32
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)


def test_only_what_is_trained_is_in_checkpoints_and_optimizer_states(run: Recipe) -> None:
    names = [name.partition("/")[2] for name in saved(run)]
    plain = [name for name in names if ".lora_" not in name]
    assert len(plain) < len(names)
    assert all(n.removeprefix("exp_avg_sq/").removeprefix("exp_avg/").startswith(HEADS)
               for n in plain)  # fmt: skip
    assert any("classifier" in n for n in plain) == (run.model.task == "sequence-classification")


def test_two_ranks_train_what_one_process_trains_to_the_bit(run: Recipe, tmp_path: Path) -> None:
    alone = trained(tmp_path, 1, run.model.task, **{"scpl.pipeline_ranks": 1})
    tiny.assert_same(saved(alone), saved(run))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run: Recipe, tmp_path: Path) -> None:
    early = run.output_dir / "checkpoint-4"
    changes = {"train.resume_from_checkpoint": str(early), "train.output_dir": str(tmp_path / "b")}
    again = trained(tmp_path / "a", 2, run.model.task, **changes)
    tiny.assert_same(saved(again), saved(run))


def test_a_run_is_scored_continued_and_left_early_like_any_other(
    run: Recipe, tmp_path: Path
) -> None:
    folder = checkpoint.resolve(run.output_dir)

    def body() -> None:
        if run.model.task == "causal-lm":
            assert len(generate(run, folder, ["the cat sat"], max_new_tokens=4)) == 1
            return
        logits = tmp_path / "logits"
        evaluate_run(run, folder, logits_file=logits)
        assert load_file(logits)["logits"].shape == (21, 2)

    run_ranks(1, body)


def test_samples_leave_a_model_with_adapters_at_its_local_heads(tmp_path: Path) -> None:
    changes = {"scpl.objective": {"name": "early_exit"}}
    run = trained(tmp_path, 1, "sequence-classification", **changes)
    found = scpl_ds.EarlyExitModel.from_pretrained(run.export_dir)(threshold=0.01, **IDS)
    assert found.layers.tolist() == [2, 2, 2]
    whole = scpl_ds.EarlyExitModel.from_pretrained(run.export_dir)(**IDS).logits
    torch.testing.assert_close(whole, of_stages(run), rtol=0, atol=0)


def drawn(run: Recipe, bounds: list[int]) -> dict[str, Tensor]:
    model = cut_model(run)
    found: dict[str, Tensor] = {}
    for span in itertools.pairwise(bounds):
        stage = load_stage(
            model.path, run.model.task, model.anatomy, *span,
            config=model.config, seed=run.train.seed, adapters=model.adapters,
        )  # fmt: skip
        found |= {name: t for name, t in stage.hf_state_dict().items() if name in stage.kept or ()}
    return found


def test_adapters_start_the_same_whatever_the_number_of_stages(run: Recipe) -> None:
    whole = drawn(run, [0, 4])
    tiny.assert_same(drawn(run, [0, 1, 3, 4]), whole)
    tiny.assert_same(drawn(run, [0, 1, 2, 3, 4]), whole)
    downs = [t for name, t in whole.items() if ".lora_A." in name]
    assert len(downs) == 8
    assert all(not a.equal(b) for a, b in itertools.combinations(downs, 2) if a.shape == b.shape)
    assert all(not t.any() for name, t in whole.items() if ".lora_B." in name)


@distributed(1)
def test_a_checkpoint_of_a_peft_model_exports_its_adapter(tmp_path: Path) -> None:
    config = runs.config(2, pipeline_ranks=1)
    model = adapted_bert()
    engine = scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine
    engine.train_batch(runs.batches())
    files = tmp_path / "files"
    model.save_pretrained(files)
    model.config.save_pretrained(files)
    engine.save_checkpoint(tmp_path / "run", model_files=files)
    folder = checkpoint.resolve(tmp_path / "run")
    out = export_checkpoint(folder, tmp_path / "out", task="sequence-classification")
    whole = peft.PeftModel.from_pretrained(runs.model(dropout=0.0), str(out)).eval()
    with torch.no_grad():  # the stages share their tensors with the model that was given
        torch.testing.assert_close(whole(**IDS).logits, model.eval()(**IDS).logits, rtol=0, atol=0)


# -- one stage under every backend ---------------------------------------------------------

BACKENDS: dict[str, dict[str, Any]] = {
    "ddp": {"sharding": "ddp"},
    "fsdp": {"sharding": "fsdp", "zero": 3},
    "zero0": {"sharding": "deepspeed", "zero": 0},
    "zero1": {"sharding": "deepspeed", "zero": 1},
    "zero2": {"sharding": "deepspeed", "zero": 2},
    "zero3": {"sharding": "deepspeed", "zero": 3},
}


def adapted_bert() -> Any:
    torch.manual_seed(5)
    asked = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    return peft.get_peft_model(runs.model(dropout=0.0), asked)


def after_5_steps(**options: Any) -> tuple[scpl_ds.Engine, dict[str, Tensor]]:
    config = runs.config(2, pipeline_ranks=1, eps=1e-4, **options)
    if config["scpl"]["sharding"] == "deepspeed" and config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = scpl_ds.initialize(model=adapted_bert(), config=config, seed=runs.SEED).engine
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, engine.mesh.dp_size)
    for _ in range(5):
        engine.train_batch(data)
    return engine, runs.weights_of_engine(engine)


@pytest.mark.parametrize("backend", BACKENDS)
@distributed(2)
def test_every_backend_trains_the_same_adapters(backend: str) -> None:
    """Of a ``PeftModel`` that ``initialize`` is given: 2 stages on 2 data-parallel ranks."""
    _, wanted = after_5_steps()
    engine, found = after_5_steps(**BACKENDS[backend])
    assert any(t.any() for name, t in found.items() if "lora_B" in name)
    assert all(".lora_" in n or n.startswith(HEADS) for n in found)
    runs.assert_equal(found, wanted, rtol=1e-5, atol=1e-6)
    for stage in engine.stages:
        moments = stage.optimizer_state().moments
        assert moments and all(set(by_name) <= set(found) for by_name in moments.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"scpl.sharding": "deepspeed", "deepspeed.zero_optimization": {"stage": 3},
         "deepspeed.bf16": {"enabled": True}},
        {"scpl.sharding": "fsdp", "deepspeed.zero_optimization": {"stage": 2},
         "deepspeed.bf16": {"enabled": True}},
        {"deepspeed.bf16": {"enabled": True}},
        {"train.gradient_checkpointing": True},
        {"scpl.freeze_stages": 1},
        {"scpl.lookahead": 1},
        {"scpl.polish": 0.5},
        {"scpl.method": "bp"},
        {"scpl.method": "joint"},
        {"model.lora.bias": "all", "model.lora.target_modules": "all-linear"},
        {"scpl.partition": "time"},
    ],
    ids=lambda changes: "-".join(str(changes[key]) for key in list(changes)[:1]),
)  # fmt: skip
def test_a_run_with_adapters_exports_what_its_stages_give(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    run = trained(tmp_path, 2, "sequence-classification", **changes)
    adapted = peft.PeftModel.from_pretrained(base_of(run), str(run.export_dir)).eval()
    with torch.no_grad():
        found = adapted(**IDS).logits
    assert not found.allclose(base_of(run)(**IDS).logits, rtol=1e-3)
    if "scpl.partition" not in changes:  # which measures anew
        torch.testing.assert_close(found, of_stages(run), rtol=0, atol=0)


# -- what is refused, and what rests -------------------------------------------------------


def test_a_stage_with_nothing_to_train_passes_on(tmp_path: Path) -> None:
    """It used to be refused; adapters that stand elsewhere need nothing of it."""
    changes = {
        "scpl.stages": 4,
        "scpl.objective": WITHOUT_HEAD,
        "model.lora.target_modules": ["0.attention.self.query", "2.attention.self.query"],
    }
    run = trained(tmp_path, 2, "sequence-classification", **{**changes, "scpl.pipeline_ranks": 2})
    names = saved(run)
    assert not [name for name in names if name.startswith("stage-1.")]
    assert [name for name in names if name.startswith("stage-2.")]
    found = load_exported(run.export_dir, run.model.task)(**IDS).logits
    torch.testing.assert_close(found, of_stages(run), rtol=0, atol=0)


def test_backpropagation_through_a_stage_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    changes = {"scpl.method": "bp", "model.lora.target_modules": ["0.attention.self.query"],
               "scpl.stages": 4, "scpl.pipeline_ranks": 1}  # fmt: skip
    asked = recipe_from_mapping(mapping(tmp_path, "sequence-classification", **changes))

    def body() -> None:
        with pytest.raises(PartitionError, match=r"stage 1 .* has nothing to train"):
            fit(asked)

    run_ranks(1, body)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["query", "valu"], r"'valu' is no module of 'bert'; did you mean 'value'\? .*are dense,"),
        (
            ["classifier"],
            r"'classifier' is 'classifier' \(Linear\): adapters go into linear .*key,",
        ),
        (["attention"], r"'attention' is 'bert.encoder.layer.0.attention' \(BertAttention\): "),
    ],
)
def test_unknown_target_modules_are_refused_with_those_that_there_are(
    targets: list[str], says: str, tmp_path: Path
) -> None:
    changes = {"model.lora.target_modules": targets}
    asked = recipe_from_mapping(mapping(tmp_path, "sequence-classification", **changes))
    with pytest.raises(RecipeError, match=says):
        cut_model(asked)


def test_without_peft_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe_from_mapping(mapping(tmp_path, "sequence-classification"))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(RecipeError, match=r"model.lora: .*pip install 'scpl-ds\[lora\]'"):
        cut_model(asked)


def test_other_adapters_of_a_peft_model_are_refused() -> None:
    asked = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(RecipeError, match=r"PREFIX_TUNING.*get_peft_model"):
        scpl_ds.PipelineModule(peft.get_peft_model(runs.model(), asked))


def test_an_adapter_whose_base_model_is_gone_says_so(tmp_path: Path) -> None:
    run = trained(tmp_path, 1, "sequence-classification", **{"train.max_steps": 1})
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"is an adapter of '.*model'.*base_model_name_or_"):
        load_exported(run.export_dir, run.model.task)


def test_a_whole_model_has_nothing_to_merge(tmp_path: Path) -> None:
    changes = {"model.lora": None, "train.max_steps": 1}
    run = trained(tmp_path, 1, "sequence-classification", **changes)
    folder = checkpoint.resolve(run.output_dir)
    with pytest.raises(RecipeError, match=r"--merge: .* without model\.lora"):
        export_checkpoint(folder, tmp_path / "out", task=run.model.task, merge=True)


def optimizer_bytes(recipe: Recipe) -> Iterator[tuple[int, int]]:
    for rank in predict(Workload.of(recipe, cut_model(recipe), "cpu"), pipeline_ranks=2, dp_size=1):
        yield rank.optimizer, rank.gradients


def test_the_predicted_memory_has_gradients_and_optimizer_state_of_adapters_only(
    tmp_path: Path,
) -> None:
    changes = {"scpl.objective": WITHOUT_HEAD}
    asked = mapping(tmp_path, "sequence-classification", **changes)
    first, _ = optimizer_bytes(recipe_from_mapping(asked))
    numbers = 2 * 2 * 2 * 4 * 16  # layers, modules, A and B, rank, width
    assert first == (2 * 4 * numbers, 4 * numbers)
