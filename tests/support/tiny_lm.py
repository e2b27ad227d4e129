"""The smallest real language model: bytes as tokens, a chat template, a Llama of four layers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}" + END + "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; 0 ends a text and pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([END, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)
    found.chat_template = TEMPLATE
    return found


def model(*, layers: int = 4, tied: bool = True, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        eos_token_id=0, pad_token_id=0, bos_token_id=None, tie_word_embeddings=tied,
        attention_dropout=dropout,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def save(folder: Path) -> Path:
    """A Hugging Face folder of both."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
