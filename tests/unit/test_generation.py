"""What the model wrote, as text behind its prompt."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scpl_ds.generation import continuation


def _tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words with their space before them, as SentencePiece and as GPT-2 write them."""
    space = "\u2581" if kind == "sentencepiece" else "\u0120"
    words = ["<pad>", f"{space}the", f"{space}film", f"{space}was", f"{space}good", "s", "the"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    if kind == "sentencepiece":
        made.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
        made.decoder = decoders.Metaspace()  # pyright: ignore
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        made.decoder = decoders.ByteLevel()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
@pytest.mark.parametrize("padding", [[], [0, 0]], ids=["alone", "padded on the left"])
def test_a_continuation_keeps_the_space_before_its_first_word(kind, padding):
    tokenizer = _tokenizer(kind)
    prompt = [*padding, 6 if kind == "gpt2" else 1, 2]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "the film"
    assert continuation(tokenizer, [*prompt, 3, 4], len(prompt)) == " was good"
    assert continuation(tokenizer, [*prompt, 5, 3], len(prompt)) == "s was"
    assert continuation(tokenizer, [*prompt, 0], len(prompt)) == ""
