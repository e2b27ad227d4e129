"""Streamed training data: every row once, apart on every rank, and where they stopped."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pydantic import ValidationError

from scpl_ds.data._base import DataSource
from scpl_ds.data.files import FileOptions, FileSource
from scpl_ds.data.hf import HubOptions, HubSource
from scpl_ds.data.language import IGNORED, LanguageCollator, RowWriter
from scpl_ds.data.plain import PlainTextOptions, PlainTextSource
from scpl_ds.data.stream import Position, Stream
from scpl_ds.data.stream_loader import StreamLoader
from scpl_ds.errors import DataError
from tests.support import tiny_lm

TOKENIZER = tiny_lm.tokenizer()
ROWS = 40


def texts(count: int = ROWS) -> list[str]:
    return [f"row {n:02d} " + "x" * (n % 7) for n in range(count)]


def file_of(folder: Path, name: str, rows: list[Any] | None = None) -> FileSource:
    """A streamed source of a file of ``texts()``, or of ``rows``."""
    path = folder / f"train.{name}"
    lines = [{"text": text} for text in texts()] if rows is None else rows
    if name == "parquet":
        datasets.Dataset.from_list(lines).to_parquet(path)
    elif name == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text("text\n" + "".join(line["text"] + "\n" for line in lines))
    return FileSource(FileOptions(train_file=path, streaming=True), name=name)


def shards(folder: Path, count: int = 4) -> HubSource:
    """A streamed source of several files."""
    for shard in range(count):
        part = texts()[shard::count]
        path = folder / f"train-{shard:05d}-of-{count:05d}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return HubSource(HubOptions(dataset=str(folder), streaming=True, eval_split=None), name="hf")


def stream_of(
    source: DataSource, *, rank: int = 0, ranks: int = 1, buffer: int = 8, packing: bool = False,
    drop: bool = False, max_length: int = 24,
) -> Stream:  # fmt: skip
    found = source.stream_texts().train
    assert found is not None
    write = RowWriter(found.kind, TOKENIZER, max_length, vocab_size=257, drop_invalid=drop)
    whole = Stream(found, write, packing=packing, buffer=buffer, seed=1)
    return whole.for_rank(rank, ranks)


def epoch_of(stream: Stream) -> list[str]:
    """What the samples of the first epoch say."""
    found = itertools.takewhile(lambda pair: pair[1].begin.epoch == 0, stream.samples(Position()))
    return [said(sample) for sample, _ in found]


def said(sample: dict[str, Any]) -> str:
    return str(TOKENIZER.decode(sample["input_ids"], skip_special_tokens=True))


def text_file(folder: Path) -> PlainTextSource:
    (folder / "train.txt").write_text("\n".join(texts()) + "\n")
    options = {"train": folder / "train.txt", "streaming": True, "document": "line"}
    return PlainTextSource(PlainTextOptions.model_validate(options), name="text")


@pytest.mark.parametrize("name", ["jsonl", "csv", "tsv", "parquet", "text", "hf"])
def test_an_epoch_of_a_stream_has_every_row_once_in_an_order_of_its_own(tmp_path: Path, name: str):
    sources = {"text": text_file, "hf": shards}
    source = sources[name](tmp_path) if name in sources else file_of(tmp_path, name)
    found = epoch_of(stream_of(source))
    assert sorted(found) == sorted(texts()) and found != texts()
    assert found == epoch_of(stream_of(source))


def test_without_a_buffer_rows_come_in_the_order_of_the_file(tmp_path: Path):
    assert epoch_of(stream_of(file_of(tmp_path, "jsonl"), buffer=1)) == texts()


def test_every_epoch_has_another_order(tmp_path: Path):
    stream = stream_of(file_of(tmp_path, "jsonl"))
    both = [s for s, _ in itertools.islice(stream.samples(Position()), 2 * ROWS)]
    first, second = ([said(s) for s in part] for part in (both[:ROWS], both[ROWS:]))
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_see_disjoint_rows_and_together_all_of_them(
    tmp_path: Path, sharded: bool, ranks: int
):
    source = shards(tmp_path) if sharded else file_of(tmp_path, "jsonl")
    parts = [epoch_of(stream_of(source, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert all(len(part) >= ROWS // ranks - 1 for part in parts)
    together = Counter(itertools.chain(*parts))
    assert together == Counter(texts())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["jsonl", "parquet", "hf"])
def test_a_stream_goes_on_from_every_position_to_the_bit(
    tmp_path: Path, name: str, packing: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("scpl_ds.data.stream.PACKED_TOGETHER", 3)
    source = shards(tmp_path) if name == "hf" else file_of(tmp_path, name)
    stream = stream_of(source, packing=packing, max_length=20)
    whole = list(itertools.islice(stream.samples(Position()), 2 * ROWS + 5))
    assert whole[-1][1].begin.epoch > 0
    for stop in range(0, len(whole) - 6, 5):
        position = Position.of(json.loads(json.dumps(whole[stop][1].plain())))
        again = stream_of(source, packing=packing, max_length=20).samples(position)
        for (wanted, _), (found, _) in zip(whole[stop + 1 : stop + 6], again, strict=False):
            assert wanted.keys() == found.keys()
            for key in wanted:
                assert (wanted[key] == found[key]).all()


def test_rows_packed_on_the_fly_are_full_and_keep_documents_apart(tmp_path: Path):
    stream = stream_of(file_of(tmp_path, "jsonl"), packing=True, max_length=64)
    rows = [s for s, _ in itertools.islice(stream.samples(Position()), 8)]
    assert sum(len(row["input_ids"]) for row in rows) > 0.9 * 8 * 64
    for row in rows:
        starts = row["position_ids"] == 0
        assert starts.sum() > 3 and (row["labels"][starts] == IGNORED).all()
        ends = [*(starts.nonzero()[0][1:] - 1), len(starts) - 1]
        assert (row["input_ids"][ends] == 0).all()


def test_a_bad_row_is_refused_with_its_file_and_line(tmp_path: Path):
    rows = [{"text": text} for text in texts(10)] + [{"text": " "}]
    stream = stream_of(file_of(tmp_path, "jsonl", rows), buffer=1)
    with pytest.raises(DataError, match=r"train\.jsonl, line 11: column 'text' is empty.*drop"):
        list(itertools.islice(stream.samples(Position()), 11))


def test_a_bad_row_of_a_data_set_in_shards_is_refused_with_its_shard(tmp_path: Path):
    source = shards(tmp_path, 2)
    (tmp_path / "train-00001-of-00002.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(DataError, match=r"split 'train', shard 1 of 2, row 1: column 'text'"):
        epoch_of(stream_of(source, buffer=1))


def test_bad_rows_are_left_out_when_asked(tmp_path: Path):
    rows = [{"text": text} for text in texts(10)] + [{"text": None}, {"text": ""}]
    assert sorted(epoch_of(stream_of(file_of(tmp_path, "jsonl", rows), drop=True))) == texts(10)


def test_a_stream_of_nothing_but_bad_rows_ends(tmp_path: Path):
    rows = [{"text": ""}] * 3
    with pytest.raises(DataError, match=r"every row is unusable: .*is empty"):
        next(stream_of(file_of(tmp_path, "jsonl", rows), drop=True).samples(Position()))


def test_a_stream_of_no_rows_is_refused(tmp_path: Path):
    source = file_of(tmp_path, "csv", [])
    with pytest.raises(DataError, match="no rows, the data set is empty"):
        next(stream_of(source).samples(Position()))


def test_a_broken_line_is_refused_where_it_is(tmp_path: Path):
    source = file_of(tmp_path, "jsonl")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{oh\n")
    with pytest.raises(DataError, match=r"train\.jsonl, line 41: not JSON"):
        epoch_of(stream_of(source))


def loader(source: DataSource, *, rank: int = 0, ranks: int = 1, **more: Any) -> StreamLoader:
    return StreamLoader(
        stream_of(source, rank=rank, ranks=ranks), micro_batch_size=3,
        collate=LanguageCollator(TOKENIZER), dp_rank=rank, dp_size=ranks, **more,
    )  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"ahead": 2}, {"num_workers": 1}], ids=str)
def test_a_loader_goes_on_behind_the_last_batch_it_handed_out(tmp_path: Path, how: dict[str, int]):
    source = file_of(tmp_path, "jsonl")
    whole = list(itertools.islice(loader(source), 12))
    first = loader(source, **how)
    for wanted, found in zip(whole[:5], first, strict=False):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    saved = json.loads(json.dumps(first.saved([first.position])))
    second = loader(source, **how)
    second.restore(saved)
    for wanted, found in zip(whole[5:], second, strict=False):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_position_of_another_order_is_refused(tmp_path: Path):
    first = loader(file_of(tmp_path, "jsonl"))
    saved = first.saved([first.position, None])
    with pytest.raises(DataError, match=r"shuffle_buffer 9, this run's 8"):
        first.restore({**saved, "shuffle_buffer": 9})
    with pytest.raises(DataError, match=r"without data\.streaming"):
        first.restore({"epoch": 0, "consumed": 3})


def test_the_evaluation_split_of_a_stream_is_in_memory(tmp_path: Path):
    (tmp_path / "eval.jsonl").write_text("".join(f'{{"text": "t{n}"}}\n' for n in range(9)))
    source = file_of(tmp_path, "jsonl")
    options = source.options.model_copy(
        update={"eval_file": tmp_path / "eval.jsonl", "max_eval_samples": 4}
    )
    found = FileSource(options, name="jsonl").stream_texts()
    assert found.eval is not None and found.eval.eval is not None and found.eval.train is None
    assert len(found.eval.eval) == 9  # documents: pieces of them are drawn when they are tokens


def test_a_saved_data_set_streams_from_disk(tmp_path: Path):
    parts = {"train": {"text": texts()}, "validation": {"text": ["a", "b"]}}
    made: Any = {name: datasets.Dataset.from_dict(part) for name, part in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    source = HubSource(HubOptions(dataset=str(tmp_path / "saved"), streaming=True), name="hf")
    assert sorted(epoch_of(stream_of(source))) == sorted(texts())
    held_out = source.stream_texts().eval
    assert held_out is not None and held_out.eval is not None and len(held_out.eval) == 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"max_train_samples": 5}, "a stream does not know"),
        ({"eval_fraction": 0.1}, "a stream needs an eval_file"),
    ],
)
def test_options_that_need_all_of_the_data_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        FileOptions.model_validate({"train_file": "a", "streaming": True, **given})


def test_a_text_file_as_one_document_cannot_be_streamed():
    with pytest.raises(ValidationError, match="paragraph or line"):
        PlainTextOptions.model_validate({"train_file": "a", "streaming": True})
