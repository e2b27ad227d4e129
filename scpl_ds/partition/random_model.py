"""Checkpoints with random weights: for benchmarks and trials of sizes, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from scpl_ds.partition._hf import model_class, quiet_transformers

SIZES: dict[str, dict[str, Any]] = {
    "bert-tiny": {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 4,
                  "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64,
                  "max_position_embeddings": 32, "pad_token_id": 0},
    "bert-11m": {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4,
                 "intermediate_size": 1024, "num_attention_heads": 4},
    "bert-8l": {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 8,
                "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 4096},
    "bert-24l": {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 24,
                 "intermediate_size": 1024, "num_attention_heads": 4, "vocab_size": 4096},
    "gpt2-124m": {"model_type": "gpt2", "pad_token_id": 0},
    "llama-0.7b": {
        "model_type": "llama", "hidden_size": 1536, "num_hidden_layers": 24,
        "intermediate_size": 4096, "num_attention_heads": 16, "pad_token_id": 0,
    },
    "llama-1.5b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 28,
        "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
        "pad_token_id": 0,
    },
}  # fmt: skip
"""Name -> what its config says beside transformers' defaults."""


def write_random_model(
    size: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "200MB",
    seed: int = 0,
) -> None:
    """Write a sequence classifier of ``SIZES[size]`` as sharded safetensors, as a hub has them.

    Takes the memory of the whole model while it is made.
    """
    options = dict(SIZES[size])
    config = AutoConfig.for_model(options.pop("model_type"), num_labels=2, **options)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config, "sequence-classification")._from_config(config, dtype=dtype)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
