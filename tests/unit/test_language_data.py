"""Text for language models: what is learned, what shares a row, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from pydantic import ValidationError

from scpl_ds.data._base import Texts
from scpl_ds.data.files import FileOptions, FileSource
from scpl_ds.data.language import (
    IGNORED,
    LanguageCollator,
    LanguageDataset,
    RowWriter,
    packed,
    targets_of,
    tokenize_texts,
)
from scpl_ds.data.plain import PlainTextOptions, PlainTextSource
from scpl_ds.data.prepared import read
from scpl_ds.errors import DataError
from scpl_ds.recipe import recipe_from_mapping
from tests.support import tiny_lm

TOKENIZER = tiny_lm.tokenizer()


def texts(kind: str, rows: list[dict]) -> Texts:
    data = Dataset.from_list([{**row, "row": n} for n, row in enumerate(rows, 1)])
    return Texts(kind, data, None, {"train": "a.jsonl, line"})  # pyright: ignore[reportArgumentType]


def tokenized(kind: str, rows: list[dict], *, max_length: int = 64, **more) -> LanguageDataset:
    return tokenize_texts(texts(kind, rows), "train", TOKENIZER, max_length=max_length, **more)


def learned(dataset: LanguageDataset, index: int = 0) -> str:
    """The text of what is learned in a sample."""
    sample = dataset[index]
    targets = targets_of(torch.tensor(sample["labels"])[None])[0]
    return TOKENIZER.decode(targets[targets != IGNORED])


def test_of_plain_text_all_but_the_first_token_is_learned_and_its_end():
    data = tokenized("text", [{"text": "To be"}])
    assert TOKENIZER.decode(data[0]["input_ids"]) == "To be<|end|>"
    assert learned(data) == "o be<|end|>"
    assert data.num_targets == 5


def test_of_a_completion_only_the_answer_is_learned_unless_asked():
    row = {"prompt": "2+2=", "completion": "4"}
    assert learned(tokenized("prompt", [row])) == "4<|end|>"
    assert learned(tokenized("prompt", [row], completion_only=False)) == "+2=4<|end|>"


def test_of_a_conversation_only_what_the_assistant_says_is_learned():
    """By hand: [user]Hi<|end|>[assistant]Ho<|end|>[user]!<|end|>[assistant]?<|end|>"""
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "!"},
        {"role": "assistant", "content": "?"},
    ]
    data = tokenized("messages", [{"messages": messages}], max_length=128)
    text = TOKENIZER.decode(data[0]["input_ids"])
    assert text == "[user]Hi<|end|>[assistant]Ho<|end|>[user]!<|end|>[assistant]?<|end|>"
    assert learned(data) == "Ho<|end|>?<|end|>"


def test_a_template_that_rewrites_what_was_said_is_refused():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + tiny_lm.TEMPLATE
    turns = [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: .* otherwise than the whole"):
        tokenize_texts(texts("messages", [{"messages": turns}]), "train", tokenizer, max_length=64)


def test_a_conversation_that_the_assistant_begins_is_refused_with_the_way_out():
    turns = [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant")]
    with pytest.raises(DataError, match=r"line 1: .* begins with the assistant.*completion_only"):
        tokenized("messages", [{"messages": turns}])
    whole = tokenized("messages", [{"messages": turns}], completion_only=False)
    assert TOKENIZER.decode(whole[0]["input_ids"]).startswith("[assistant]x")


def test_a_tokenizer_without_a_template_is_refused():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = None
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="no chat template"):
        tokenize_texts(texts("messages", [{"messages": turns}]), "train", tokenizer, max_length=64)


def test_a_long_document_is_cut_into_pieces_that_lose_nothing():
    text = "".join(chr(97 + n % 26) for n in range(150))
    data = tokenized("text", [{"text": text}])
    assert list(data.lengths) == [64, 64, 23]
    assert "".join(TOKENIZER.decode(data[n]["input_ids"]) for n in range(3)) == text + "<|end|>"


def test_a_prompt_that_leaves_no_room_is_refused_with_the_numbers():
    row = {"prompt": "p" * 70, "completion": "c"}
    with pytest.raises(DataError, match=r"line 1: the first 64 of 72 tokens"):
        tokenized("prompt", [row])


def test_a_document_of_one_token_and_pieces_of_one_are_refused():
    """Nothing of them would be learned, and the mean of no losses is no number."""
    tokenizer = tiny_lm.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"line 2 gives one token only"):
        rows = [{"text": "ab"}, {"text": "a"}]
        tokenize_texts(texts("text", rows), "train", tokenizer, max_length=8)
    with pytest.raises(DataError, match=r"data\.max_length: 1 .*at least 2"):
        tokenized("text", [{"text": "ab"}], max_length=1)


def test_rows_of_which_nothing_can_be_learned_are_left_out_when_asked(caplog):
    rows = [{"prompt": "p" * n, "completion": "c"} for n in (3, 70, 4, 80)]
    with pytest.raises(DataError, match=r"line 2: .* data\.drop_invalid_rows: true"):
        tokenized("prompt", rows, drop_invalid=False)
    assert list(tokenized("prompt", rows, drop_invalid=True).lengths) == [5, 6]
    assert [r.getMessage()[:30] for r in caplog.records] == ["2 of 4 rows left out (data.dro"]
    with pytest.raises(DataError, match=r"a\.jsonl: every row is unusable: .*line 2"):
        tokenized("prompt", rows[1::2], drop_invalid=True)


def test_a_recipe_leaves_out_rows_in_memory_as_in_a_stream(tmp_path: Path):
    tiny_lm.save(tmp_path)
    rows = [{"p": "p" * n, "c": "c"} for n in (3, 70, 4, 80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "name": "jsonl", "train": str(tmp_path / "a.jsonl"), "prompt_column": "p",
        "completion_column": "c", "max_length": 64, "drop_invalid_rows": True,
    }  # fmt: skip
    recipe = recipe_from_mapping(
        {
            "model": {"name_or_path": str(tmp_path), "task": "causal-lm"},
            "scpl": {"stages": 2},
            "deepspeed": {"train_micro_batch_size_per_gpu": 1},
            "data": data,
        }
    )
    found = read(recipe, None)
    assert found.facts.num_train == 2


def test_what_is_held_of_a_token_before_it_is_laid_out_is_a_few_bytes():
    """Python's lists of integers took 60."""
    long = Dataset.from_list([{"text": "abcdefgh" * 10_000, "row": 1}])
    write = RowWriter("text", TOKENIZER, 512)
    (row,) = long
    (first, *others) = write(row, "here")  # pyright: ignore[reportArgumentType]
    assert first.ids.dtype == np.int32 and first.ids.base is others[0].ids.base
    assert np.shares_memory(first.ids, first.labels)


KEYS = (
    "{% for m in messages %}{{ m.keys() | list | sort | join(',') }}:{{ m['content'] }}{{ m.n }}|"
    "{% endfor %}{% if add_generation_prompt %}{% endif %}"
)
SPOKEN: list[Any] = [
    [{"role": "user", "content": "Hi", "n": 1}, {"role": "assistant", "content": "Ho"}],
    [
        {"role": "user", "content": "a", "n": "one"},  # Arrow refuses a column of both
        {"role": "assistant", "content": "b", "tool_calls": [{"f": {"x": 1}}], "name": None},
    ],
]


@pytest.mark.parametrize("name", ["jsonl", "parquet"])
def test_messages_are_trained_on_as_they_were_read_in_memory_and_streaming(
    tmp_path: Path, name: str
):
    path = tmp_path / f"a.{name}"
    talks = SPOKEN if name == "jsonl" else [SPOKEN[1], [{**SPOKEN[0][0], "n": "1"}, SPOKEN[0][1]]]
    if name == "jsonl":
        path.write_text("".join(json.dumps({"m": talk}) + "\n" for talk in talks))
    else:
        Dataset.from_dict({"m": talks}).to_parquet(path)
    tokenizer = tiny_lm.tokenizer()
    tokenizer.chat_template = KEYS
    options = FileOptions(train_file=path, messages_column="m")
    whole = tokenize_texts(
        FileSource(options, name=name).load_texts(), "train", tokenizer, max_length=256
    )
    in_memory = [tokenizer.decode(whole[n]["input_ids"]) for n in range(2)]
    streaming = options.model_copy(update={"streaming": True})
    stream = FileSource(streaming, name=name).stream_texts().train
    assert stream is not None
    write = RowWriter("messages", tokenizer, 256)
    streamed = [
        tokenizer.decode(piece.ids)
        for row in stream.rows
        for piece in write({"messages": row["m"]}, "here", stream.columns)
    ]
    assert in_memory == streamed
    short, long = ("content,n,role:Hi1|content,role:Ho|", "content,n,role:aone|content,role,to")
    wanted = (short, long) if name == "jsonl" else (long, short)
    assert all(text.startswith(said) for text, said in zip(in_memory, wanted, strict=True))


def test_packing_fills_rows_and_keeps_every_piece_whole():
    lengths = [30, 40, 10, 64, 20, 24, 5, 1]
    rows = packed(lengths, 64)
    assert sorted(n for row in rows for n in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 64 for row in rows)
    assert len(rows) == 4  # 194 tokens need four rows of 64
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_rows_give_the_same_loss_per_token(attention: str):
    rows = [{"text": "abcdefghij"[:n] * 3} for n in (3, 7, 10, 4, 9)]
    model = tiny_lm.model().eval()
    model.set_attn_implementation(attention)
    collate = LanguageCollator(TOKENIZER, pad_to_multiple_of=8)
    sums = []
    for packing in (False, True):
        data = tokenized("text", rows, packing=packing)
        assert (len(data) < len(rows)) == packing and data.num_targets == 99
        batch = collate([data[n] for n in range(len(data))])
        assert ("position_ids" in batch) == packing and ("attention_mask" in batch) != packing
        targets = targets_of(batch.pop("labels"))
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
        )
        sums.append(loss / int((targets != IGNORED).sum()))
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-5, atol=1e-6)


def test_padding_on_the_left_is_masked():
    tokenizer = tiny_lm.tokenizer()
    tokenizer.padding_side = "left"
    data = tokenized("text", [{"text": "ab"}, {"text": "abcd"}])
    batch = LanguageCollator(tokenizer)([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["labels"][0].tolist()[:2] == [IGNORED, IGNORED]


def test_every_kind_of_text_is_read_from_its_columns(tmp_path: Path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    row = {"text": "t", "q": "p", "a": "c", "talk": turns}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    for options, kind, names in (
        ({}, "text", {"text"}),
        ({"prompt_column": "q", "completion_column": "a"}, "prompt", {"prompt", "completion"}),
        ({"messages_column": "talk"}, "messages", {"messages"}),
    ):
        source = FileSource(FileOptions(train_file=tmp_path / "a.jsonl", **options), name="jsonl")
        found = source.load_texts()
        assert found.kind == kind and found.train is not None and found.eval is None
        assert set(found.train.column_names) == names | {"row"} and len(found.train) == 2


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "holds no list of messages"),
        ([{"content": "x"}], "a message without a role"),
        ([{"role": "user", "content": "x"}], "no answer of the assistant"),
    ],
)
def test_a_conversation_that_is_none_is_refused_with_its_line(
    tmp_path: Path, value: list, message: str
):
    (tmp_path / "a.jsonl").write_text(json.dumps({"m": value}) + "\n")
    options = FileOptions(train_file=tmp_path / "a.jsonl", messages_column="m")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: column 'm' .*{message}"):
        FileSource(options, name="jsonl").load_texts()


def test_columns_of_two_kinds_are_refused():
    with pytest.raises(ValidationError, match="need each other"):
        FileOptions.model_validate({"train": "a", "prompt_column": "p"})
    with pytest.raises(ValidationError, match="two kinds"):
        FileOptions.model_validate(
            {"train": "a", "prompt_column": "p", "completion_column": "c", "messages_column": "m"}
        )


@pytest.mark.parametrize("unit, count", [("file", 1), ("paragraph", 2), ("line", 3)])
def test_a_text_file_is_one_document_or_many(tmp_path: Path, unit: str, count: int):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\nthree\n")
    source = PlainTextSource(PlainTextOptions.model_validate({"train": path, "document": unit}))
    found = source.load_texts()
    assert found.train is not None and len(found.train) == count
    assert found.at("train", 0) == f"{path}, {'document' if unit == 'file' else unit} 1"


def test_an_empty_text_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text(" \n\n ")
    options = PlainTextOptions.model_validate({"train": path})
    with pytest.raises(DataError, match="holds no text"):
        PlainTextSource(options).load_texts()


def test_of_documents_max_samples_keeps_pieces_and_of_prompts_rows(tmp_path: Path):
    (tmp_path / "a.txt").write_text("To be, or not to be: that is the question. " * 20)
    found = PlainTextSource(
        PlainTextOptions(train_file=tmp_path / "a.txt", max_train_samples=2)
    ).load_texts()
    whole = tokenize_texts(found, "train", TOKENIZER, max_length=16)
    assert len(whole) > 10
    kept = whole.take(np.array([1, 4]))
    assert [list(kept[n]["input_ids"]) for n in (0, 1)] == [
        list(whole[n]["input_ids"]) for n in (1, 4)
    ]
    assert list(kept.lengths) == [16, 16]
    (tmp_path / "b.jsonl").write_text('{"p": "2+2=", "c": "4"}\n' * 3 + '{"p": "1+2=", "c": "3"}\n')
    rows = FileOptions(
        train_file=tmp_path / "b.jsonl",
        prompt_column="p",
        completion_column="c",
        max_train_samples=2,
    )
    prompts = FileSource(rows, name="jsonl").load_texts()
    assert prompts.train is not None
    assert len(prompts.train) == 2
