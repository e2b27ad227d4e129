"""Tokenising and padding with a tiny tokenizer made here."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scpl_ds.data.text import Collator, load_tokenizer, tokenize
from scpl_ds.errors import DataError

NAMES = ["input_ids", "attention_mask"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d"]


def tokenizer(**options) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # pyright: ignore
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", **options}
    made = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=16, **given)
    return made


def split(*texts: str, pairs: list[str] | None = None) -> datasets.Dataset:
    columns = {"text": list(texts), "label": [i % 2 for i in range(len(texts))]}
    return datasets.Dataset.from_dict(columns | ({"text_pair": pairs} if pairs else {}))


def saved(tmp_path: Path, **options) -> str:
    tokenizer(**options).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_batch_is_padded_to_its_longest_sample_on_the_right():
    tok = tokenizer()
    data = tokenize(split("a b", "c"), tok, max_length=16)
    batch = Collator(tok)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [2, 6, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert {t.dtype for t in batch.values()} == {torch.int64}


def test_a_left_padding_tokenizer_pads_on_the_left():
    tok = tokenizer(padding_side="left")
    data = tokenize(split("a b", "c"), tok, max_length=16)
    batch = Collator(tok)([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[2, 4, 5, 3], [0, 2, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_a_batch_equals_what_the_tokenizer_itself_pads():
    tok = tokenizer(model_input_names=[*NAMES, "token_type_ids"])
    texts, pairs = ["a b c", "d", "b"], ["c", "a a a", "d"]
    data = tokenize(split(*texts, pairs=pairs), tok, max_length=6)
    ours = Collator(tok)([data[i] for i in range(3)])
    theirs = tok(texts, pairs, truncation=True, max_length=6, padding=True, return_tensors="pt")
    assert set(ours) - {"labels"} == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def test_token_types_are_left_out_when_the_model_does_not_take_them():
    tok = tokenizer(model_input_names=[*NAMES, "token_type_ids"])
    with_types = tokenize(split("a", "b"), tok, max_length=8)
    without = tokenize(split("a", "b"), tok, max_length=8, input_names={"input_ids"})
    assert "token_type_ids" in with_types[0] and "token_type_ids" not in without[0]


def test_lengths_round_up_to_the_multiple():
    tok = tokenizer()
    data = tokenize(split("a b c", "c"), tok, max_length=16)
    batch = Collator(tok, pad_to_multiple_of=8)([data[0], data[1]])
    assert batch["input_ids"].shape == (2, 8) and batch["attention_mask"].sum() == 8


def test_cut_samples_are_counted_exactly_in_one_warning(caplog: pytest.LogCaptureFixture):
    """Of three samples at the limit of 5 tokens, one fits exactly and two are cut."""
    with caplog.at_level(logging.WARNING):
        data = tokenize(split("a b c", "a b c d", "a", "a a a a a"), tokenizer(), max_length=5)
    assert [r.getMessage() for r in caplog.records if "cut" in r.getMessage()] == [
        "2 of 4 samples (50.0 %) are longer than data.max_length 5 tokens and were cut."
    ]
    assert data.lengths.tolist() == [5, 5, 3, 5]


def test_more_tokens_than_positions_are_refused_with_both_numbers():
    with pytest.raises(DataError, match="max_length: 9 tokens, but the model takes at most 8"):
        tokenize(split("a", "b"), tokenizer(), max_length=9, max_positions=8)
    with pytest.raises(DataError, match="17 tokens, but its tokenizer takes at most 16"):
        tokenize(split("a", "b"), tokenizer(), max_length=17, max_positions=512)


def test_a_token_outside_the_models_vocabulary_is_refused():
    with pytest.raises(
        DataError, match="Sample 1 has token id 7, but the model's vocabulary has 7"
    ):
        tokenize(split("a", "b d"), tokenizer(), max_length=8, vocab_size=7)


def test_a_text_without_any_token_is_refused():
    tok = tokenizer()
    tok.backend_tokenizer.post_processor = processors.Sequence([])  # pyright: ignore
    with pytest.raises(DataError, match=r"Sample 1 \(' '\) gives no token at all, as do 1 of 2"):
        tokenize(split("a", " "), tok, max_length=8)


def test_a_max_length_that_leaves_no_room_for_text_is_refused():
    with pytest.raises(DataError, match="adds 2 special tokens"):
        tokenize(split("a", "b"), tokenizer(), max_length=2)


def test_the_collator_can_be_sent_to_loader_workers():
    tok = tokenizer()
    data = tokenize(split("a b", "c"), tok, max_length=8)
    sent = pickle.loads(pickle.dumps(Collator(tok)))
    assert sent([data[0]])["input_ids"].tolist() == [[2, 4, 5, 3]]


def test_a_tokenizer_without_pad_token_is_refused_with_the_option_to_set(tmp_path: Path):
    with pytest.raises(DataError, match=r"no pad token.*data\.pad_token: eos .* '\[SEP\]'"):
        load_tokenizer(saved(tmp_path, pad_token=None))


def test_pad_token_eos_uses_the_end_of_text_token(tmp_path: Path):
    tok = load_tokenizer(saved(tmp_path, pad_token=None), pad_token="eos")
    assert tok.pad_token_id == WORDS.index("[SEP]") and Collator(tok).pad["input_ids"] == 3


def test_pad_token_takes_any_known_token_and_refuses_others(tmp_path: Path):
    path = saved(tmp_path, pad_token=None)
    assert load_tokenizer(path, pad_token="[UNK]").pad_token_id == 1
    with pytest.raises(DataError, match=r"'\[UNKK\]' is not among .* did you mean '\[UNK\]'\?"):
        load_tokenizer(path, pad_token="[UNKK]")


def test_pad_token_eos_without_an_end_of_text_token_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="has no end-of-text token"):
        load_tokenizer(saved(tmp_path, pad_token=None, eos_token=None), pad_token="eos")


def test_a_folder_without_tokenizer_files_is_refused_with_what_it_holds(tmp_path: Path):
    """transformers 5 gives a BERT folder without files a tokenizer that knows no word."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(DataError, match=r"No tokenizer for .*The folder holds config\.json"):
        load_tokenizer(str(tmp_path))
