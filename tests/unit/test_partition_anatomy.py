"""What is found in a model, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    BertConfig,
    DebertaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MBartConfig,
    PretrainedConfig,
    T5Config,
)

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import analyze, anatomy_of, auto_class
from tests.support.models import BY_TYPE, build


def test_bert_is_embeddings_layers_pooler_and_classifier() -> None:
    anatomy = anatomy_of(BertConfig(), "sequence-classification")
    assert anatomy.layers == "bert.encoder.layer"
    assert anatomy.num_layers == 12
    assert anatomy.prologue == {"bert.embeddings": "full"}
    assert anatomy.epilogue == ("bert.pooler", "classifier")
    assert anatomy.free == ("dropout",)
    assert anatomy.hidden_size == 768
    assert anatomy.tied == {}
    assert set(anatomy.layer_parameters) == {7_087_872}
    assert anatomy.prologue_flops == 0  # looking up rows is no arithmetic


def test_gpt2_position_rows_and_the_tied_matrix_are_found() -> None:
    anatomy = anatomy_of(GPT2Config(), "causal-lm")
    assert anatomy.prologue == {"transformer.wte": "full", "transformer.wpe": "row"}
    assert anatomy.tied == {"lm_head.weight": "transformer.wte.weight"}
    assert anatomy.tied_parameters == 50257 * 768
    assert anatomy.epilogue_flops == 2 * 128 * 50257 * 768


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_layer_flops_are_those_of_the_formula(attn_implementation: str) -> None:
    """Four projections, two of the MLP, and attention over 128 x 128 pairs, for 1 sample."""
    config = BertConfig(num_hidden_layers=2)
    task = "sequence-classification"
    anatomy = anatomy_of(config, task, attn_implementation=attn_implementation)
    length, width = anatomy.sequence_length, 768
    expected = 2 * length * (4 * width**2 + 2 * width * 3072) + 2 * 2 * length**2 * width
    assert anatomy.layer_flops == (expected, expected)


def test_only_the_active_experts_are_counted() -> None:
    config = BY_TYPE["qwen3_moe"].config()
    dense = anatomy_of(BY_TYPE["qwen3_moe"].config(num_experts_per_tok=1), "causal-lm")
    sparse = anatomy_of(config, "causal-lm")
    one_expert = 2 * sparse.sequence_length * 3 * 32 * config.moe_intermediate_size
    assert sparse.layer_flops[0] - dense.layer_flops[0] == one_expert


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "qwen3_moe"])
def test_a_model_in_memory_has_the_anatomy_of_its_config(model_type: str) -> None:
    architecture = BY_TYPE[model_type]
    task = architecture.tasks[-1]
    config = architecture.config()
    model = build(config, task)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    assert analyze(model) == anatomy_of(config, task)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert not model.training


def test_the_given_config_is_not_changed() -> None:
    config = BY_TYPE["llama"].config(pad_token_id=None)
    before = config.to_dict()
    anatomy_of(config, "sequence-classification", attn_implementation="eager")
    assert config.to_dict() == before


class RemoteConfig(PretrainedConfig):
    model_type = "remote"


RemoteConfig.__module__ = "transformers_modules.somebody.model"
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 99}


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (T5Config(), "causal-lm", r"'t5' is an encoder-decoder"),
        (MBartConfig(), "sequence-classification", r"'mbart' is an encoder-decoder"),
        (AlbertConfig(), "sequence-classification", r"'albert' has 0 stacks of layers"),
        (
            DebertaConfig(relative_attention=True, pos_att_type=["c2p"], **SMALL),
            "sequence-classification",
            r"layer 0 of 'deberta' takes, beside the hidden states, 1 input\(s\) that depend on "
            r"trained parameters",
        ),
        (RemoteConfig(), "causal-lm", r"'remote' runs code from its own repository"),
        (
            BertConfig(quantization_config={"quant_method": "bitsandbytes"}),
            "causal-lm",
            r"'bert' is quantised",
        ),
        (BY_TYPE["distilbert"].config(), "causal-lm", r"has no 'causal-lm' model for 'distilbert'"),
        (BertConfig(), "causal_lm", r"unknown task 'causal_lm'"),
    ],
    ids=["t5", "mbart", "albert", "deberta", "remote", "quantised", "no-such-task-model", "task"],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(config, task: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        anatomy_of(config, task)


def test_an_attention_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(
        PartitionError, match="attn_implementation: 'nonsense' cannot be used with 'bert'"
    ):
        anatomy_of(BertConfig(), "sequence-classification", attn_implementation="nonsense")


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(intermediate_size=32, **SMALL))


def test_loose_parameters_beside_the_layers_are_refused() -> None:
    model = _llama()
    model.model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(PartitionError, match=r"parameters \['model.scale'\] belong to no module"):
        analyze(model)


def test_a_module_used_before_and_after_the_layers_is_refused() -> None:
    class Shared(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            self.model.embed_tokens(kwargs["input_ids"])
            return output

    with pytest.raises(PartitionError, match=r"'model.embed_tokens' .* used after and before"):
        analyze(Shared(LlamaConfig(intermediate_size=32, **SMALL)))


def test_layers_called_twice_are_refused() -> None:
    class Loop(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs)

    with pytest.raises(PartitionError, match=r"in the order \[0, 1, 0, 1\]"):
        analyze(Loop(LlamaConfig(intermediate_size=32, **SMALL)))


def test_several_stacks_are_refused_by_name() -> None:
    model = _llama()
    model.model.more = nn.ModuleList(_llama().model.layers)
    with pytest.raises(PartitionError, match=r"2 stacks of layers: model.layers .*, model.more"):
        analyze(model)


def test_anatomy_is_plain_data() -> None:
    anatomy = anatomy_of(BY_TYPE["bert"].config(), "sequence-classification")
    assert dataclasses.replace(anatomy) == anatomy
    assert auto_class("causal-lm").__name__ == "AutoModelForCausalLM"
