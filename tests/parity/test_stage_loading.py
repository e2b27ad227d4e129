"""A stage reads its own tensors from a checkpoint, and gives them back to one that plain HF
loads."""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import Anatomy, anatomy_of, auto_class
from scpl_ds.partition.loading import export_state_dict, load_stage
from scpl_ds.partition.stage_module import StageModule
from tests.support.models import BY_TYPE, CASE_IDS, CASES, Architecture, batch, build, save

SEED = 11


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load_all(
    path: Path, task: str, anatomy: Anatomy, bounds: tuple[int, ...], **kwargs
) -> list[StageModule]:
    config = kwargs.pop("config", None) or auto_class(task).from_pretrained(path).config
    return [
        load_stage(path, task, anatomy, start, end, config=config, seed=SEED, **kwargs)
        for start, end in itertools.pairwise(bounds)
    ]


def write_export(stages: list[StageModule], task: str, folder: Path) -> None:
    config = stages[-1].model.config
    tensors: dict[str, Tensor] = {}
    for stage in stages:
        part = export_state_dict(config, task, stage.hf_state_dict())
        assert not tensors.keys() & part.keys()
        tensors |= part
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_bitwise(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("architecture", "task"), CASES, ids=CASE_IDS)
def test_export_of_the_stages_gives_the_same_logits_in_plain_transformers(
    architecture: Architecture, task: str, tmp_path: Path
) -> None:
    path = save(architecture.config(), task, tmp_path / "in")
    whole = auto_class(task).from_pretrained(path)
    stages = load_all(path, task, anatomy_of(whole.config, task), (0, 1, 3), config=whole.config)
    write_export(stages, task, tmp_path / "out")
    again = auto_class(task).from_pretrained(tmp_path / "out")
    inputs = batch(task, "right")
    with torch.no_grad():
        assert_bitwise(again(**inputs).logits, whole(**inputs).logits)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "bert", "llama"])
def test_exported_names_are_those_of_save_pretrained(model_type: str, tmp_path: Path) -> None:
    architecture = BY_TYPE[model_type]
    task = architecture.tasks[-1]
    path = save(architecture.config(tie_word_embeddings=False), task, tmp_path)
    config = auto_class(task).from_pretrained(path).config
    stages = load_all(path, task, anatomy_of(config, task), (0, 2, 3), config=config)
    exported = {k for s in stages for k in export_state_dict(config, task, s.hf_state_dict())}
    assert exported == set(load_file(path / "model.safetensors"))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
def test_a_tie_across_stages_becomes_two_independent_copies_and_one_warning(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BY_TYPE[model_type].config(tie_word_embeddings=True)
    path = save(config, "causal-lm", tmp_path)
    anatomy = anatomy_of(config, "causal-lm")
    with caplog.at_level(logging.WARNING):
        stages = load_all(path, "causal-lm", anatomy, (0, 1, 2, 3))
    (target, source), *_ = anatomy.tied.items()
    first = stages[0].model.get_parameter(source)
    last = stages[-1].model.get_parameter(target)
    assert_bitwise(first, last)
    before = last.detach().clone()
    with torch.no_grad():
        first.add_(1.0)
    assert_bitwise(last, before)
    assert all(stage.model.config.tie_word_embeddings is False for stage in stages)
    assert source not in stages[-1].hf_state_dict()
    assert sum("UNTIED" in record.message for record in caplog.records) == 1


def test_one_stage_keeps_the_tie(tmp_path: Path) -> None:
    config = BY_TYPE["gpt2"].config()
    path = save(config, "causal-lm", tmp_path)
    (stage,) = load_all(path, "causal-lm", anatomy_of(config, "causal-lm"), (0, 3))
    model = stage.model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings is True


def test_a_tied_checkpoint_that_has_only_the_output_matrix_loads_on_every_stage(
    tmp_path: Path,
) -> None:
    config = BY_TYPE["llama"].config(tie_word_embeddings=True)
    path = save(config, "causal-lm", tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    stages = load_all(path, "causal-lm", anatomy_of(config, "causal-lm"), (0, 1, 3))
    assert_bitwise(stages[0].model.model.embed_tokens.weight, tensors["lm_head.weight"])
    assert_bitwise(stages[1].model.lm_head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "distilbert", "modernbert", "gpt2", "llama"]
)
@pytest.mark.parametrize("bounds", [(0, 3), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_a_missing_head_is_the_one_that_the_whole_model_draws_under_the_seed(
    model_type: str, bounds: tuple[int, ...], tmp_path: Path
) -> None:
    task = "sequence-classification"
    config = BY_TYPE[model_type].config(num_labels=3)
    build(config, task).base_model.save_pretrained(tmp_path)
    torch.manual_seed(SEED)
    whole = auto_class(task).from_pretrained(tmp_path, config=config)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stages = load_all(tmp_path, task, anatomy_of(config, task), bounds, config=config)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in stages[-1].hf_state_dict().items():
        assert_bitwise(tensor, whole.state_dict()[name])


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stage_holds_exactly_its_own_tensors(sharded: bool, tmp_path: Path) -> None:
    config = BY_TYPE["llama"].config(tie_word_embeddings=False)
    model = build(config, "causal-lm")
    model.save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() is sharded
    stages = load_all(tmp_path, "causal-lm", anatomy_of(config, "causal-lm"), (0, 1, 2, 3))
    names = [set(stage.hf_state_dict()) for stage in stages]
    assert names[1] == {k for k in model.state_dict() if k.startswith("model.layers.1.")}
    assert set.union(*names) == set(model.state_dict())
    assert sum(map(len, names)) == len(model.state_dict())
    assert not any(p.is_meta for stage in stages for p in (*stage.parameters(), *stage.buffers()))


def test_dtype_is_that_of_the_checkpoint_unless_asked(tmp_path: Path) -> None:
    config = BY_TYPE["llama"].config()
    build(config, "causal-lm").to(torch.bfloat16).save_pretrained(tmp_path)
    anatomy = anatomy_of(config, "causal-lm")
    kwargs = {"config": config, "seed": SEED}
    assert load_stage(tmp_path, "causal-lm", anatomy, 0, 1, **kwargs).model.dtype is torch.bfloat16
    asked = load_stage(tmp_path, "causal-lm", anatomy, 0, 1, dtype=torch.float32, **kwargs)
    assert asked.model.dtype is torch.float32


def test_old_names_of_a_bare_encoder_checkpoint_are_understood(tmp_path: Path) -> None:
    """As all-MiniLM-L6-v2 is stored: no ``bert.`` prefix, and a ``position_ids`` key unread."""
    task = "sequence-classification"
    config = BY_TYPE["bert"].config()
    model = build(config, task)
    old = {k: t.clone() for k, t in model.base_model.state_dict().items()}
    old["embeddings.position_ids"] = torch.arange(64)[None]
    config.save_pretrained(tmp_path)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stages = load_all(tmp_path, task, anatomy_of(config, task), (0, 1, 3), config=config)
    for stage in stages:
        for name, tensor in stage.hf_state_dict().items():
            if not name.startswith("classifier"):
                assert_bitwise(tensor, model.state_dict()[name])


def test_a_checkpoint_of_another_model_is_refused_with_the_missing_names(tmp_path: Path) -> None:
    save(BY_TYPE["gpt2"].config(), "causal-lm", tmp_path)
    config = BY_TYPE["llama"].config()
    with pytest.raises(
        PartitionError, match=r"lacks 10 of the 10 tensors.*belongs to another model"
    ):
        load_all(tmp_path, "causal-lm", anatomy_of(config, "causal-lm"), (0, 1), config=config)


def test_a_checkpoint_without_one_layer_is_refused_on_the_stage_that_needs_it(
    tmp_path: Path,
) -> None:
    config = BY_TYPE["llama"].config()
    path = save(config, "causal-lm", tmp_path)
    tensors = {
        k: t for k, t in load_file(path / "model.safetensors").items() if ".layers.2." not in k
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    anatomy = anatomy_of(config, "causal-lm")
    load_all(path, "causal-lm", anatomy, (0, 2), config=config)
    with pytest.raises(
        PartitionError, match=r"lacks 9 of the 9 tensors of layers \[2, 3\)|lacks 9 of"
    ):
        load_all(path, "causal-lm", anatomy, (2, 3), config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_labels": 5}, r"classifier.bias is \[2\], not \[5\].*Set model.num_labels"),
        ({"intermediate_size": 40}, r"is \[48\], not \[40\].*Its config.json does not belong"),
    ],
)
def test_shapes_that_differ_are_refused_with_both_shapes(
    change: dict, message: str, tmp_path: Path
) -> None:
    task = "sequence-classification"
    save(BY_TYPE["bert"].config(), task, tmp_path)
    config = BY_TYPE["bert"].config(**change)
    with pytest.raises(PartitionError, match=message):
        load_all(tmp_path, task, anatomy_of(config, task), (0, 1, 3), config=config)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    config = BY_TYPE["bert"].config()
    anatomy = anatomy_of(config, "sequence-classification")
    with pytest.raises(
        PartitionError, match=r"no checkpoint for layers \[0, 3\).*model.name_or_path"
    ):
        load_all(tmp_path, "sequence-classification", anatomy, (0, 3), config=config)


_MEASURE = """
import json, sys
import torch
torch.set_num_threads(1)
from transformers import AutoConfig
from scpl_ds.partition.anatomy import anatomy_of
from scpl_ds.partition.loading import load_stage

def peak():
    # not ru_maxrss, which a child inherits from the process that forked it
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

baseline = peak()
config = AutoConfig.from_pretrained(sys.argv[1])
anatomy = anatomy_of(config, "causal-lm")

stage = load_stage(sys.argv[1], "causal-lm", anatomy, 4, 8, config=config, seed=0)
total = sum(p.sum().item() for p in stage.parameters())
own = sum(p.numel() * p.element_size() for p in stage.parameters()) / 2**20
print(json.dumps({"baseline": baseline, "own": own, "peak": peak(), "total": total}))
"""


@pytest.mark.slow
def test_loading_a_third_of_a_400m_llama_peaks_at_its_own_weights(tmp_path: Path) -> None:
    """Every weight is touched: weights mapped from the file cost nothing before."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1536, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    write_sharded_llama(config, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    measured = json.loads(run.stdout.splitlines()[-1])
    print(measured)
    assert measured["own"] > 400
    assert measured["peak"] <= measured["baseline"] + measured["own"] + 100


def write_sharded_llama(config, folder: Path) -> None:
    """A random checkpoint in one file per layer, never held in memory whole."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {k: t.shape for k, t in LlamaForCausalLM(config).state_dict().items()}
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = shape
    weight_map = {}
    for number, part in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {k: torch.full(s, 0.01) for k, s in part.items()}, folder / file, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
