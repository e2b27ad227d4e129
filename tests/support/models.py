"""Tiny random models of the architectures that the parity tests cover; nothing is downloaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from scpl_ds.partition.anatomy import model_class

VOCABULARY = 99
PAD = 0
_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": PAD,
}  # fmt: skip
_DECODER: dict[str, Any] = {
    **_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_MODERN: dict[str, Any] = {
    **_ENCODER, "local_attention": 8, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    **_DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
_NAMED: dict[str, dict[str, Any]] = {
    "distilbert": {
        "vocab_size": VOCABULARY, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
        "max_position_embeddings": 64, "pad_token_id": PAD,
    },
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One row of the tested list."""

    title: str
    model_type: str
    tasks: tuple[str, ...]
    options: dict[str, Any]

    def config(self, **overrides: Any) -> PretrainedConfig:
        """A tiny config, without dropout unless overridden."""
        config = CONFIG_MAPPING[self.model_type](**{**self.options, **overrides})
        for name in list(config.to_dict()):
            dropout = any(word in name for word in ("dropout", "pdrop", "_drop"))
            if dropout and name not in overrides and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)
        return config


_CLASSIFIER = ("sequence-classification",)
_CAUSAL = ("causal-lm",)
_BOTH = (*_CLASSIFIER, *_CAUSAL)

ARCHITECTURES = (
    Architecture("BERT", "bert", _CLASSIFIER, _ENCODER),
    Architecture("RoBERTa", "roberta", _CLASSIFIER, {**_ENCODER, "max_position_embeddings": 66}),
    Architecture("DistilBERT", "distilbert", _CLASSIFIER, _NAMED["distilbert"]),
    Architecture("ELECTRA", "electra", _CLASSIFIER, {**_ENCODER, "embedding_size": 16}),
    Architecture("ModernBERT", "modernbert", _CLASSIFIER, _MODERN),
    Architecture("GPT-2", "gpt2", _BOTH, _NAMED["gpt2"]),
    Architecture("GPT-NeoX", "gpt_neox", _BOTH, _DECODER),
    Architecture("OPT", "opt", _BOTH, {**_ENCODER, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("Llama", "llama", _BOTH, _DECODER),
    Architecture("Mistral", "mistral", _BOTH, {**_DECODER, "sliding_window": 4}),
    Architecture("Qwen2", "qwen2", _BOTH, _DECODER),
    Architecture("Qwen3", "qwen3", _BOTH, _DECODER),
    Architecture("Qwen3-MoE", "qwen3_moe", _BOTH, {**_DECODER, **_EXPERTS}),
    Architecture("Mixtral", "mixtral", _BOTH, {**_DECODER, **_EXPERTS}),
    Architecture("Gemma", "gemma", _BOTH, _DECODER),
    Architecture("Gemma 2", "gemma2", _BOTH, _GEMMA),
    Architecture("Gemma 3", "gemma3_text", _BOTH, _GEMMA),
    Architecture("Phi", "phi", _BOTH, {**_DECODER, "num_key_value_heads": 4}),
    Architecture("Phi-3", "phi3", _BOTH, _DECODER),
    Architecture("OLMo 2", "olmo2", _BOTH, _DECODER),
)  # fmt: skip
BY_TYPE = {a.model_type: a for a in ARCHITECTURES}
CASES = tuple((a, task) for a in ARCHITECTURES for task in a.tasks)
CASE_IDS = tuple(f"{a.model_type}-{task}" for a, task in CASES)


def build(config: PretrainedConfig, task: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model in fp32, eval mode, whose every weight differs from every other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config, task)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # norms of ones and biases of zeros hide mistakes
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def save(config: PretrainedConfig, task: str, folder: Path, *, seed: int = 0) -> Path:
    """A random model saved as a Hugging Face checkpoint."""
    build(config, task, seed=seed).save_pretrained(folder)
    return folder


def batch(task: str, padding: str, *, rows: int = 4, length: int = 12) -> dict[str, torch.Tensor]:
    """Token ids with ``left``, ``right`` or ``none`` padding, and labels."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        for row in range(1, rows):
            gap = slice(0, row) if padding == "left" else slice(length - row, length)
            mask[row, gap] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    classes = torch.arange(rows) % 2
    labels = ids.masked_fill(mask == 0, -100) if task == "causal-lm" else classes
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
