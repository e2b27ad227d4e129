"""Local files: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from scpl_ds import registry
from scpl_ds.data._base import Splits, check_labels
from scpl_ds.data.files import FileOptions, FileSource
from scpl_ds.errors import DataError

GOOD = "text,label\ngood,1\nbad,0\nfine,1\n"


def source(name: str, **options) -> FileSource:
    cls = registry.resolve("data", name, where="data.name")
    return cls(cls.Options(**options), name=name)


def load_csv(tmp_path: Path, content: str | bytes, **options) -> Splits:
    path = tmp_path / "train.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return source("csv", train_file=path, **options).load()


def rows(splits: Splits) -> list[tuple[str, int]]:
    assert splits.train is not None
    return list(zip(splits.train["text"], splits.train["label"], strict=True))


RECORDS = [{"text": 'a "b", c', "label": 1}, {"text": "NA", "label": 0}, {"text": "ü", "label": 1}]


@pytest.mark.parametrize("name", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_reads_the_same_samples(tmp_path: Path, name: str):
    path = tmp_path / f"train.{name}"
    if name == "csv":
        path.write_text('text,label\n"a ""b"", c",1\nNA,0\nü,1\n')
    elif name == "tsv":
        path.write_text('text\tlabel\na "b", c\t1\nNA\t0\nü\t1\n')
    elif name == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), path)
    splits = source(name, train_file=path).load()
    assert rows(splits) == [(r["text"], r["label"]) for r in RECORDS]
    assert splits.label_names == ("0", "1")
    assert splits.eval is None


def test_text_labels_become_sorted_class_names(tmp_path: Path):
    splits = load_csv(tmp_path, "text,label\na,pos\nb,neg\nc,pos\n")
    assert splits.label_names == ("neg", "pos")
    assert rows(splits) == [("a", 1), ("b", 0), ("c", 1)]


def test_label_names_map_numbers_that_do_not_start_at_0(tmp_path: Path):
    splits = load_csv(tmp_path, "text,label\na,4\nb,0\n", label_names=("0", "4"))
    assert rows(splits) == [("a", 1), ("b", 0)]


def test_label_names_name_the_numbers_when_they_are_words(tmp_path: Path):
    splits = load_csv(tmp_path, GOOD, label_names=("negative", "positive"))
    assert splits.label_names == ("negative", "positive")
    assert rows(splits) == [("good", 1), ("bad", 0), ("fine", 1)]


def test_whole_floats_and_booleans_are_classes(tmp_path: Path):
    assert [label for _, label in rows(load_csv(tmp_path, "text,label\na,1.0\nb,0.0\n"))] == [1, 0]
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "label": true}\n{"text": "b", "label": false}\n')
    assert [label for _, label in rows(source("jsonl", train_file=path).load())] == [1, 0]


def test_pairs_are_read_from_their_column(tmp_path: Path):
    splits = load_csv(tmp_path, "p,h,label\na,b,0\nc,d,1\n", text_column="p", text_pair_column="h")
    assert splits.train is not None
    assert list(splits.train["text_pair"]) == ["b", "d"]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path):
    assert rows(load_csv(tmp_path, b"\xef\xbb\xbftext,label\r\na,0\r\nb,1\r\n")) == [
        ("a", 0),
        ("b", 1),
    ]


def test_max_samples_draw_the_same_rows_every_time_and_keep_their_order(tmp_path: Path):
    content = "text,label\n" + "".join(f"t{i},{int(i >= 50)}\n" for i in range(100))
    first = rows(load_csv(tmp_path, content, max_train_samples=20))
    assert first == rows(load_csv(tmp_path, content, max_train_samples=20))
    assert len(first) == 20 and {label for _, label in first} == {0, 1}
    assert [int(text[1:]) for text, _ in first] == sorted(int(text[1:]) for text, _ in first)
    assert first != rows(load_csv(tmp_path, content, max_train_samples=20, seed=1))


def test_a_held_out_fraction_keeps_copies_of_a_text_together(tmp_path: Path):
    content = "text,label\n" + "".join(
        f"t{i % 200},{i % 2}\nT{i % 200},{i % 2}\n" for i in range(400)
    )
    splits = load_csv(tmp_path, content, eval_fraction=0.25)
    assert splits.train is not None and splits.eval is not None
    assert len(splits.train) + len(splits.eval) == 800
    assert 0.15 < len(splits.eval) / 800 < 0.35
    assert not {t.lower() for t in splits.train["text"]} & {t.lower() for t in splits.eval["text"]}


def test_an_empty_line_is_no_row_and_lines_are_counted_as_an_editor_does(tmp_path: Path):
    splits = load_csv(tmp_path, 'text,label\n"two\nlines",1\n\nb,0\n')
    assert splits.train is not None
    assert list(splits.train["row"]) == [2, 5]
    assert splits.at("train", 1).endswith("train.csv, line 5")


def test_evaluation_alone_needs_no_training_file(tmp_path: Path):
    path = tmp_path / "dev.csv"
    path.write_text("text,label\na,1\n")
    splits = source("csv", eval_file=path, label_names=("n", "p")).load()
    assert splits.train is None and splits.eval is not None and list(splits.eval["label"]) == [1]


REFUSED = {
    "empty file": (b"", {}, r"train\.csv is empty \(0 bytes\)"),
    "header only": (b"text,label\n", {}, r"train\.csv: no rows"),
    "missing column": (
        b"txt,label\na,1\n",
        {},
        r"data\.text_column: 'text' is not a column; did you mean 'txt'\? .* found: txt, label",
    ),
    "two missing columns": (b"a,b\n1,2\n", {}, r"data\.text_column.*data\.label_column"),
    "wrong delimiter": (b"text;label\na;1\n", {}, r"Columns found: text;label"),
    "too many cells": (b"text,label\na,1\nb, c,0\n", {}, r"line 3: 3 cells, but the header has 2"),
    "too few cells": (b"text,label\na,1\nb\n", {}, r"line 3: 1 cells"),
    "open quote": (b'text,label\na,1\n"b,0\nc,1\n', {}, r"line 3: .*double quote is not closed"),
    "latin-1": (b"text,label\ncaf\xe9,1\n", {}, r"is not UTF-8: byte 0xe9"),
    "empty text": (b"text,label\na,1\n  ,0\nc,1\n", {}, r"line 3: column 'text' is empty; 1 of 3"),
    "empty label": (b"text,label\na,1\nb,\n", {}, r"line 3: column 'label' has no label"),
    "negative label": (b"text,label\na,1\nb,-1\n", {}, r"line 3: label is -1.*drop_invalid_rows"),
    "regression": (b"text,label\na,1\nb,0.5\n", {}, r"line 3: label 0\.5 is not a whole number"),
    "nan label": (b"text,label\na,1\nb,nan\n", {}, r"line 3: column 'label' has no label"),
    "infinite label": (b"text,label\na,1\nb,inf\n", {}, r"line 3: label inf is not a whole number"),
    "one class": (b"text,label\na,1\nb,1\n", {"label_names": ("n", "p")}, r"All 2 .* label 1"),
    "labels from 1": (
        b"text,label\na,1\nb,2\n",
        {},
        r"labels are 1, 2, so class 0 never occurs.*data\.label_names: \['1', '2'\]",
    ),
    "unknown name": (
        b"text,label\na,pos\nb,negg\n",
        {"label_names": ("neg", "pos")},
        r"line 3: label 'negg' is not among .* did you mean 'neg'\?",
    ),
    "a name twice": (GOOD.encode(), {"label_names": ("a", "a")}, r"holds a name twice"),
    "all rows dropped": (b"text,label\na,\nb,\n", {"drop_invalid_rows": True}, r"nothing is left"),
    "nothing to hold out": (
        b"text,label\na,1\na,1\n",
        {"eval_fraction": 0.5},
        r"leaves \d .* \d to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_csv_is_refused_with_the_place_and_the_cause(tmp_path: Path, case: str):
    content, options, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        load_csv(tmp_path, content, **options)


BAD_JSONL = {
    "not json": ('{"text": "a", "label": 1}\n{"text": \n', r"line 2: not JSON: .* at column"),
    "an array": ('[{"text": "a", "label": 1}]\n', r"line 1: list, but jsonl is one \{\.\.\.\} on"),
    "column gone": (
        '{"text": "a", "label": 1}\n{"text": "b"}\n',
        r"line 2: .*'label' is not a col",
    ),
    "number as text": ('{"text": 3, "label": 1}\n', r"line 1: column 'text' holds int 3, not text"),
    "null text": ('{"text": null, "label": 1}\n', r"line 1: column 'text' is empty"),
    "list label": ('{"text": "a", "label": [1]}\n', r"line 1: .* holds list \[1\]; .*Multi-label"),
    "mixed labels": (
        '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n',
        r"line 2: label 'x' is text, but .*line 1 has the number 1",
    ),
}


@pytest.mark.parametrize("case", BAD_JSONL)
def test_a_bad_jsonl_is_refused_with_the_line(tmp_path: Path, case: str):
    content, message = BAD_JSONL[case]
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        source("jsonl", train_file=tmp_path / "t.jsonl").load()


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path):
    (tmp_path / "t.parquet").write_text(GOOD)
    with pytest.raises(DataError, match=r"t\.parquet is not a parquet file"):
        source("parquet", train_file=tmp_path / "t.parquet").load()


def test_a_missing_file_names_the_nearest_one(tmp_path: Path):
    (tmp_path / "train.csv").write_text(GOOD)
    with pytest.raises(DataError, match=r"trian\.csv does not exist; did you mean 'train\.csv'"):
        source("csv", train_file=tmp_path / "trian.csv").load()
    with pytest.raises(DataError, match="is a folder, not a file"):
        source("csv", train_file=tmp_path).load()
    with pytest.raises(DataError, match="does not exist"):
        source("csv", train_file=tmp_path / "nowhere" / "train.csv").load()


@pytest.mark.parametrize(
    ("train", "held_out"), [("a,1\nb,0", "c,2"), ("a,pos\nb,neg", "c,neutral")]
)
def test_a_label_unseen_in_training_is_refused_with_its_row(
    tmp_path: Path, train: str, held_out: str
):
    (tmp_path / "a.csv").write_text(f"text,label\n{train}\n")
    (tmp_path / "b.csv").write_text(f"text,label\n{held_out}\n")
    with pytest.raises(
        DataError, match=r"b\.csv, line 2: label '(2|neutral)' does not occur in tr"
    ):
        source("csv", train_file=tmp_path / "a.csv", eval_file=tmp_path / "b.csv").load()


def test_evaluation_text_that_is_in_training_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "a.csv").write_text(GOOD)
    (tmp_path / "b.csv").write_text("text,label\nbad,0\nnew,1\n")
    with caplog.at_level(logging.WARNING):
        source("csv", train_file=tmp_path / "a.csv", eval_file=tmp_path / "b.csv").load()
    assert "1 of 2 evaluation samples also occur in training" in caplog.text


def test_unusable_rows_are_dropped_on_request_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        splits = load_csv(tmp_path, GOOD + ",1\nx,-1\n", drop_invalid_rows=True)
    assert len(rows(splits)) == 3
    assert "2 of 5 rows left out" in caplog.text


def test_a_label_beyond_num_labels_is_refused_with_its_row(tmp_path: Path):
    splits = load_csv(tmp_path, "text,label\na,1\nb,0\nc,2\n")
    assert check_labels(splits) == 3
    with pytest.raises(DataError, match=r"line 4: label 2 \('2'\) .* 0 to 1.*model\.num_labels: 3"):
        check_labels(splits, num_labels=2)


def test_classes_that_never_occur_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert check_labels(load_csv(tmp_path, GOOD), num_labels=5) == 5
    assert "model.num_labels is 5 but the data has 2 classes" in caplog.text


def test_train_and_eval_are_short_for_the_files(tmp_path: Path):
    path = tmp_path / "a.csv"
    short = FileOptions.model_validate({"train": path, "eval": path})
    assert short == FileOptions(train_file=path, eval_file=path)
    with pytest.raises(ValueError, match="train and train_file are the same"):
        FileOptions.model_validate({"train": path, "train_file": path})


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="needs train_file"):
        FileSource.Options()
    with pytest.raises(ValidationError, match="set one of it and eval_file to null"):
        FileSource.Options(train_file="a", eval_file="b", eval_fraction=0.1)  # pyright: ignore
    with pytest.raises(ValidationError, match="Extra inputs"):
        FileSource.Options(train_file="a", test_file="b")  # pyright: ignore
