"""Whatever is done to a data file, its rows come out as they should, or a ``ScplError`` says what
is wrong and where."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scpl_ds import registry
from scpl_ds.data._base import check_labels
from scpl_ds.data.language import RowWriter, tokenize_texts
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.stream import Position, Stream
from scpl_ds.data.text import Collator, tokenize
from tests.support import tiny, tiny_lm
from tests.support.mutations import VALUES, hunt, mutate_bytes

CASES = 900
ROWS = [(text, label, f"about {text}") for text, label in tiny.sentences(24, seed=3)]
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": str(label)}]
    for text, label, _ in ROWS
]
COLUMNS = ("text", "label", "pair", "messages", "prompt", "completion")

CELLS: tuple[Any, ...] = (
    None, "", " ", "\ud800", "\0", 10**9, 2**63, 10**20, -1, 1.5, float("nan"), float("inf"), True,
    [], {}, [None], [{"role": "user"}], [{"role": 1}], [["user", "hi"]], "x" * 5000, 7,
)  # fmt: skip
"""What hurts in a cell."""


def records() -> list[dict[str, Any]]:
    return [
        {"text": t, "label": y, "pair": p, "messages": m, "prompt": t, "completion": p}
        for (t, y, p), m in zip(ROWS, CHATS, strict=True)
    ]


def delimited(separator: str) -> bytes:
    header = separator.join(("text", "label", "pair"))
    return "\n".join([header, *(separator.join(map(str, row)) for row in ROWS), ""]).encode()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    folder = tmp_path_factory.mktemp("good")
    tables = [pa.Table.from_pylist(records())]
    tables.append(tables[0].select(["text", "label"]))
    parquet = []
    for number, table in enumerate(tables):
        for compression in ("none", "snappy"):
            path = folder / f"{number}{compression}.parquet"
            pq.write_table(table, path, compression=compression)
            parquet.append(path.read_bytes())
    quoted = '"text",label,pair\n' + "".join(f'"a ""b"", {t}\n",{y},"{p}"\n' for t, y, p in ROWS)
    return {
        "csv": [delimited(","), quoted.encode()],
        "tsv": [delimited("\t")],
        "jsonl": ["".join(json.dumps(r) + "\n" for r in records()).encode()],
        "parquet": parquet,
        "text": ["\n".join(t for t, _, _ in ROWS).encode()],
    }


def changed_cells(rng: random.Random, name: str) -> bytes | None:
    """A file that is whole, with values in it that nobody expects."""
    rows = records()
    for _ in range(rng.choice((1, 3))):
        value = rng.choice(rng.choice((VALUES, CELLS)))
        rows[rng.randrange(len(rows))][rng.choice(COLUMNS)] = value
    try:
        if name == "jsonl":
            return "".join(json.dumps(r, default=str) + "\n" for r in rows).encode()
        if name == "parquet":
            sink = pa.BufferOutputStream()
            column = rng.choice(COLUMNS)
            rows = [{**r, column: rng.choice(VALUES)} for r in rows] if rng.random() < 0.5 else rows
            pq.write_table(pa.Table.from_pylist(rows), sink)
            return sink.getvalue().to_pybytes()
        lines = [[str(row[c]) for c in ("text", "label", "pair")] for row in rows]
        cells = [["text", "label", "pair"], *lines]
        return "\n".join(("," if name == "csv" else "\t").join(c) for c in cells).encode()
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError):
        return None  # the format cannot hold it


def read_classes(name: str, options: dict[str, Any], tokenizer: Any) -> None:
    """As a run does: read, check, tokenise, and hand out every batch."""
    cls = registry.resolve("data", name, where="data.name")
    splits = cls(cls.Options(**options), name=name).load()
    classes = check_labels(splits)
    assert splits.train is not None
    found = tokenize(splits.train, tokenizer, max_length=16, vocab_size=len(tiny.WORDS))
    assert len(found) == len(splits.train) > 0
    assert 0 <= found.labels.min() <= found.labels.max() < classes
    batches = BatchLoader(
        found, micro_batch_size=8, shuffle=False, drop_last=False, collate=Collator(tokenizer),
        seed=0, dp_rank=0, dp_size=1, num_workers=0,
    )  # fmt: skip
    rows = sum(len(batch["labels"]) for batch in batches)
    assert rows == len(found), (rows, len(found))


def read_texts(name: str, options: dict[str, Any], tokenizer: Any) -> None:
    cls = registry.resolve("data", name, where="data.name")
    source = cls(cls.Options(**options), name=name)
    if options.get("streaming"):
        stream = source.stream_texts().train
        assert stream is not None
        write = RowWriter(stream.kind, tokenizer, 32, True, 257, options.get("drop_invalid_rows"))
        samples = Stream(stream, write, packing=False, buffer=10, seed=0).samples(Position())
        for sample, _ in itertools.islice(samples, 40):  # more than an epoch
            assert len(sample["input_ids"]) > 0
        return
    found = tokenize_texts(
        source.load_texts(), "train", tokenizer, max_length=32, packing=False, completion_only=True,
        vocab_size=257, drop_invalid=options.get("drop_invalid_rows"),
    )  # fmt: skip
    assert len(found) > 0
    assert all(np.asarray(found[i]["input_ids"]).size for i in range(len(found)))


@pytest.mark.timeout(1200)  # for a machine that does much else
def test_a_mutated_data_file_is_read_or_refused(bases: dict[str, list[bytes]], tmp_path: Path):
    words, letters = tiny.tokenizer(), tiny_lm.tokenizer()

    def draw(rng: random.Random) -> tuple[str, Callable[[], None]]:
        name = rng.choice(("csv", "tsv", "jsonl", "jsonl", "parquet", "parquet", "text"))
        content = None if name == "text" or rng.random() < 0.7 else changed_cells(rng, name)
        what = "cells"
        if content is None:
            what, content = mutate_bytes(rng, rng.choice(bases[name]))
        path = tmp_path / f"train.{name}"
        path.write_bytes(content)
        options: dict[str, Any] = {"train_file": path}
        if name == "text":
            return f"{name}: {what}", lambda: read_texts(name, options, letters)
        if rng.random() < 0.3:
            options["drop_invalid_rows"] = True
        if rng.random() < 0.6:
            if rng.random() < 0.2:
                options["text_pair_column"] = "pair"
            if rng.random() < 0.2:
                options["eval_fraction"] = 0.3
            return f"{name} classes: {what} {options}", lambda: read_classes(name, options, words)
        if name in ("jsonl", "parquet"):
            options |= rng.choice(
                (
                    {},
                    {"messages_column": "messages"},
                    {"prompt_column": "prompt", "completion_column": "completion"},
                )
            )
        if rng.random() < 0.3:
            options["streaming"] = True
        return f"{name} texts: {what} {options}", lambda: read_texts(name, options, letters)

    outcomes = hunt("data", CASES, draw)
    total = outcomes.total()
    assert outcomes["success"] > total / 20 and outcomes["DataError"] > total / 5, outcomes
