"""Options that say how a stage computes leave what it computes as it was."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CTRLConfig, PretrainedConfig, PreTrainedModel

import scpl_ds
from scpl_ds.cli import main
from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.layer_list import LayerListStage
from scpl_ds.partition.prepare import compile_blocks, recompute_activations
from scpl_ds.partition.stage_module import StageModule, stage_from_model
from scpl_ds.recipe import TrainSection
from tests.support import runs, tiny
from tests.support.models import BY_TYPE, Architecture, batch, build

SEED = 5
SOME = ["bert", "modernbert", "gpt2", "llama", "gemma3_text", "qwen3_moe"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_dropout(architecture: Architecture, **options: Any) -> PretrainedConfig:
    config = architecture.config(**options)
    for name, value in config.to_dict().items():
        if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop")):
            setattr(config, name, 0.2)
    return config


def cut(model: PreTrainedModel, *bounds: int) -> list[StageModule]:
    """Stages in train mode that share no tensor with the model or with each other."""
    anatomy = analyze(model)
    spans = itertools.pairwise(bounds)
    return [copy.deepcopy(stage_from_model(model, anatomy, a, b)).train() for a, b in spans]


def train_once(
    stages: list[StageModule], inputs: dict[str, Tensor], *, detach: bool = False
) -> dict[str, Tensor]:
    """One decoupled forward and backward; outputs, and all gradients, by stage and name."""
    found: dict[str, Tensor] = {}
    hidden = None
    for k, stage in enumerate(stages):
        stage.zero_grad()
        torch.manual_seed(SEED + k)
        output = stage(inputs, hidden, detach_features=detach)
        loss = output.hidden_states.square().mean()
        loss = loss if output.loss is None else loss + output.loss
        torch.manual_seed(0)  # backward happens when other numbers have been drawn
        loss.backward()
        if hidden is not None:
            assert hidden.grad is None and not hidden.requires_grad
        hidden = output.hidden_states.detach()
        found |= {f"{k}.hidden": hidden, f"{k}.loss": loss.detach()}
        found |= {f"{k}.{n}": p.grad for n, p in stage.named_parameters() if p.grad is not None}
    return found


def saved_bytes(run: Callable[[], Any], module: nn.Module) -> int:
    """Bytes that autograd keeps for a backward, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # held, so that no address is used twice
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


@pytest.mark.parametrize("bounds", [(0, 1, 3), (0, 1, 2, 3)], ids=["K=2", "K=3"])
@pytest.mark.parametrize("model_type", SOME)
def test_recomputing_activations_changes_no_bit(model_type: str, bounds: tuple[int, ...]) -> None:
    architecture = BY_TYPE[model_type]
    task = architecture.tasks[-1]
    model = build(with_dropout(architecture), task)
    inputs = batch(task, "right")
    for detach in (False, True):
        plain, recomputed = cut(model, *bounds), cut(model, *bounds)
        for stage in recomputed:
            recompute_activations(stage)
        wanted = train_once(plain, inputs, detach=detach)
        found = train_once(recomputed, inputs, detach=detach)
        assert found.keys() == wanted.keys()
        runs.assert_equal(found, wanted)


@pytest.mark.parametrize("model_type", list(BY_TYPE))
def test_recomputing_keeps_less_for_backward(model_type: str) -> None:
    architecture = BY_TYPE[model_type]
    task = architecture.tasks[-1]
    _, last = cut(build(with_dropout(architecture), task), 0, 1, 3)
    inputs = {k: v for k, v in batch(task, "right").items() if k != "labels"}
    hidden = torch.randn(4, 12, 32)
    before = saved_bytes(lambda: last(inputs, hidden).hidden_states, last)
    recompute_activations(last)
    after = saved_bytes(lambda: last(inputs, hidden).hidden_states, last)
    assert after < before / 3


def test_a_model_without_support_is_refused_by_its_name() -> None:
    config = CTRLConfig(vocab_size=99, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4)
    stage = stage_from_model(model := build(config, "causal-lm"), analyze(model), 0, 1)
    with pytest.raises(PartitionError, match=r"gradient checkpointing: 'ctrl' \(CTRLLMHead"):
        recompute_activations(stage)


def steps(model: Any, count: int = 4) -> dict[str, Tensor]:
    engine = scpl_ds.initialize(model=model, config=runs.config(2), seed=runs.SEED).engine
    stream = runs.batches()
    for _ in range(count):
        engine.train_batch(stream)
    return runs.weights_of_engine(engine)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointing_that_the_user_switched_on_trains_the_same(reentrant: bool | None) -> None:
    """A reentrant one would leave the layers of all but the first stage untrained."""
    wanted = steps(runs.model())
    model = runs.model()
    if reentrant is None:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    runs.assert_equal(steps(model), wanted)
    stage = stage_from_model(model, analyze(model), 2, 4).train()
    assert stage.model.is_activation_checkpointing
    for block in stage.blocks:
        assert block._gradient_checkpointing_func.keywords["use_reentrant"] is False
    assert model.is_activation_checkpointing  # and keeps the form it was given
    layer = model.bert.encoder.layer[0]
    assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is bool(reentrant)


def test_an_interval_means_checkpointing_for_a_hugging_face_model() -> None:
    pipeline = scpl_ds.PipelineModule(runs.model(), activation_checkpoint_interval=2)
    engine = scpl_ds.initialize(model=pipeline, config=runs.config(2), seed=runs.SEED).engine
    assert all(s.module.body.model.is_activation_checkpointing for s in engine.stages)
    pipeline = scpl_ds.PipelineModule(runs.model(), activation_checkpoint_interval=2)
    runs.assert_equal(steps(pipeline), steps(runs.model()))


def test_a_recipe_with_checkpointing_trains_the_same(tmp_path: Path) -> None:
    recipe = tiny.make(tmp_path)
    found = []
    for on in (False, True):
        run = tmp_path / f"run-{on}"
        changes = {"train.gradient_checkpointing": on, "train.output_dir": str(run)}
        assert tiny.train(tiny.put(recipe, changes)) == 0
        found.append(tiny.tensors_of(run / "checkpoint-8"))
    tiny.assert_same(found[1], found[0])
    # The same numbers, so one run may go on as the other.
    other = tiny.put(recipe, {"train.output_dir": str(tmp_path / "run-True")})
    assert tiny.train(other, "train.resume_from_checkpoint=true") == 0


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("model_type", "recompute"), [("bert", True), ("llama", False)])
def test_equal_layers_compile_once_and_a_new_length_once_more(
    model_type: str, recompute: bool
) -> None:
    """Ten layers, and hooks on the last of them: 2 graphs (the first layer's input needs no
    gradient), 2 more when the length changes, then none. aot_eager computes as eager does."""
    architecture = BY_TYPE[model_type]
    task = architecture.tasks[-1]
    model = build(with_dropout(architecture, num_hidden_layers=12), task)
    plain, compiled = cut(model, 0, 2, 12)[1], cut(model, 0, 2, 12)[1]
    if recompute:
        recompute_activations(compiled)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(compiled.blocks, "aot_eager")
    twin = copy.deepcopy(compiled)
    seen = []
    for length in (12, 12, 9, 15, 7):
        inputs = batch(task, "right", length=length)
        hidden = torch.randn(4, length, 32)
        results = []
        for stage in (plain, compiled):
            stage.zero_grad()
            torch.manual_seed(SEED)
            output = stage(inputs, hidden)
            (output.loss + output.hidden_states.square().mean()).backward()
            results.append({n: p.grad for n, p in stage.named_parameters() if p.grad is not None})
        assert results[1].keys() == results[0].keys()
        runs.assert_equal(results[1], results[0])
        seen.append(graphs())
    assert seen == [2, 2, 4, 4, 4]
    assert not counters["graph_break"]
    with torch.no_grad():  # a copy computes with its own weights
        for parameter in twin.parameters():
            parameter.zero_()
        assert not torch.equal(twin(inputs, hidden).hidden_states, output.hidden_states)


def test_a_compiled_layer_keeps_its_name_and_its_tensors() -> None:
    (stage,) = cut(build(BY_TYPE["bert"].config(), "sequence-classification"), 0, 3)
    before, block = set(stage.hf_state_dict()), stage.blocks[0]
    name = type(block).__name__
    compile_blocks(stage.blocks, "eager")
    assert set(stage.hf_state_dict()) == before
    assert type(block).__name__ == name and stage.blocks[0] is block
    assert type(stage.blocks[0]) is type(stage.blocks[1])


def test_a_recipe_that_compiles_trains_the_same(tmp_path: Path) -> None:
    recipe = tiny.put(tiny.make(tmp_path), {
        "train.max_steps": 2, "train.eval_strategy": "no", "data.pad_to_multiple_of": 16,
    })  # fmt: skip
    found = []
    for changes in (
        {},
        {"train.torch_compile_backend": "aot_eager", "train.gradient_checkpointing": True},
    ):
        run = tmp_path / f"run-{len(changes)}"
        counters.clear()
        torch._dynamo.reset()
        assert tiny.train(tiny.put(recipe, {**changes, "train.output_dir": str(run)})) == 0
        assert bool(graphs()) is bool(changes)
        found.append(tiny.tensors_of(run / "checkpoint-2"))
    runs.assert_equal(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"torch_compile_backend": "inductr"}, "did you mean 'inductor'.*Known here: cudagraphs"),
        ({"torch_compile_mode": "max-autotun"}, "did you mean 'max-autotune.*Known: default"),
        ({"torch_compile": False, "torch_compile_mode": "default"}, "has no effect with"),
        (
            {"torch_compile_backend": "eager", "torch_compile_mode": "default"},
            "inductor only, but torch_compile_backend is 'eager'",
        ),
    ],
)
def test_what_cannot_compile_is_refused_by_the_recipe(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainSection.model_validate(options)


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 8))
             for _ in range(5)]  # fmt: skip
    return [*parts, nn.Linear(8, 3)]


@pytest.mark.parametrize("interval", [1, 2, 3, 9])
@pytest.mark.parametrize("span", [(0, 5), (2, 6)])
def test_a_list_of_layers_checkpoints_every_n_layers(interval: int, span: tuple[int, int]) -> None:
    inputs = {"inputs": torch.randn(4, 8), "labels": torch.arange(4) % 3}
    hidden = torch.randn(4, 8) if span[0] else None
    results, kept = [], []
    for n in (0, interval):
        stage = LayerListStage(
            layers(), *span, loss_fn=nn.functional.cross_entropy, hidden_size=8, seed=1,
            checkpoint_interval=n,
        )  # fmt: skip
        assert stage.blocks == list(stage.layers.values())
        torch.manual_seed(SEED)
        output = stage(inputs, hidden, detach_features=True)
        loss = output.hidden_states.square().sum() + (output.loss or 0)
        torch.manual_seed(0)
        loss.backward()
        results.append({name: p.grad for name, p in stage.named_parameters()})
        kept.append(saved_bytes(lambda stage=stage: stage(inputs, hidden).hidden_states, stage))
    runs.assert_equal(results[1], results[0])
    assert kept[1] < kept[0] / 3


def test_layers_with_running_statistics_are_not_recomputed() -> None:
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(PartitionError, match=r"layer 0\.1 \(BatchNorm1d\) keeps running stat"):
        LayerListStage([norm, nn.Linear(4, 2)], 0, 1, loss_fn=None, hidden_size=4, seed=0,
                       checkpoint_interval=1)  # fmt: skip


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_stage_computes_attention_as_asked(name: str, tmp_path: Path) -> None:
    recipe = tiny.put(tiny.make(tmp_path), {"model.attn_implementation": name})
    assert tiny.train(recipe, "train.max_steps=1") == 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [("flash_attention_2", "doesn't seem to be installed"), ("sdap", "is not supported")],
)
def test_attention_that_is_not_there_is_refused_before_anything_is_loaded(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.put(tiny.make(tmp_path), {"model.attn_implementation": name})
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    assert tiny.train(recipe) != 0
    said = capsys.readouterr().err
    assert f"model.attn_implementation: '{name}' cannot be used with 'bert' here" in said
    assert reason in said and "eager or sdpa" in said
    assert main(["plan", str(tiny.write_recipe(tmp_path / "recipe.yaml", recipe))]) != 0
    assert capsys.readouterr().err.strip().splitlines()[-1] in said
