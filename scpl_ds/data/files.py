"""Labelled text from local files: csv, tsv, jsonl, parquet.

A file is held in memory once, or streamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scpl_ds.data._base import DataOptions, DataSource, Splits, Streamed, Texts, in_held_out
from scpl_ds.data._columns import ColumnOptions, RawSplit, Table, require_columns, typed_labels
from scpl_ds.data._labelled import build_splits
from scpl_ds.data._readers import existing, named_rows, reading, reading_parquet, rows_of
from scpl_ds.data._texts import build_texts, text_stream
from scpl_ds.errors import DataError
from scpl_ds.recipe_fields import AbsolutePath


class FilePair(BaseModel):
    """A file to train on and one to evaluate on."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    short_names: ClassVar[dict[str, str]] = {"train": "train_file", "eval": "eval_file"}

    train_file: AbsolutePath | None = None
    """File to train on, ``train`` for short. Only a run that evaluates alone may leave it out."""
    eval_file: AbsolutePath | None = None
    """File to evaluate on, ``eval`` for short."""

    @model_validator(mode="before")
    @classmethod
    def _short_names(cls, value: Any) -> Any:
        """``train`` and ``eval`` stand for ``train_file`` and ``eval_file``."""
        if not isinstance(value, Mapping):
            return value
        long = dict(value)
        for short, name in cls.short_names.items():
            if short in long:
                if long.get(name) is not None:
                    raise ValueError(f"{short} and {name} are the same; keep one, or set {short}")
                long[name] = long.pop(short)
        return long


class FileOptions(FilePair, ColumnOptions):
    """Options of ``csv``, ``tsv``, ``jsonl`` and ``parquet``."""

    eval_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Without ``eval_file``: share of ``train_file`` held out, by a hash of the text, so that
    copies of a text stay together and the choice never changes. None holds out nothing."""
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)
    """Character between columns; None: comma for ``csv``, tab for ``tsv``."""
    quoted: bool | None = None
    """Whether a cell may stand in double quotes; None: yes for ``csv``, no for ``tsv``."""

    @model_validator(mode="after")
    def _files_fit_together(self) -> FileOptions:
        if self.train_file is None and self.eval_file is None:
            raise ValueError("needs train_file (or eval_file, to evaluate only)")
        if self.eval_fraction is not None and (self.eval_file or not self.train_file):
            raise ValueError(
                "eval_fraction holds out a part of train_file; set one of it and eval_file to null"
            )
        if self.eval_fraction is not None and self.streaming:
            raise ValueError("eval_fraction needs all of train_file; a stream needs an eval_file")
        return self


class FileSource(DataSource):
    """``data: {name: csv, train_file: train.csv, eval_file: dev.csv}``."""

    Options: ClassVar[type[DataOptions]] = FileOptions
    options: FileOptions

    def load(self) -> Splits:
        """Read and check both files.

        Raises:
            DataError: With the file and line: missing or empty file, missing column, broken line,
                empty text, unusable label.
        """
        options = self.options
        tables = self._tables(options.columns())
        train, held_out = (table and table.labelled(options) for table in tables)
        if train is not None and options.eval_fraction is not None:
            train, held_out = hold_out(train, options.eval_fraction)
        return self.limit(build_splits(train, held_out, options))

    def load_texts(self) -> Texts:
        options = self.options
        train, held_out = self._tables(options.text_columns())
        return self.limit(build_texts(train, held_out, options, fraction=options.eval_fraction))

    def stream_texts(self) -> Streamed:
        from datasets import IterableDataset

        options, wanted = self.options, self.options.text_columns()
        stream, path = None, options.train_file
        if path is not None:
            existing(path)
            given = {"path": path, "options": options, "wanted": wanted, "name": self.name}
            rows = IterableDataset.from_generator(named_rows, gen_kwargs=given)
            word = "row" if self.name == "parquet" else "line"
            stream = text_stream(rows, wanted, f"{path}, {word}", numbered=True)
        held_out = None if options.eval_file is None else self._read(options.eval_file, wanted)
        texts = None if held_out is None else self.limit(build_texts(None, held_out, options))
        return Streamed(stream, texts)

    def _tables(self, wanted: Mapping[str, str]) -> tuple[Table | None, Table | None]:
        files = self.options.train_file, self.options.eval_file
        train, held_out = (None if file is None else self._read(file, wanted) for file in files)
        return train, held_out

    def _read(self, path: Path, wanted: Mapping[str, str]) -> Table:
        existing(path)
        if self.name != "parquet":
            return _read_rows(path, self.options, wanted, self.name)
        with reading(path):
            return _read_parquet(path, wanted)


def hold_out(raw: RawSplit, fraction: float) -> tuple[RawSplit, RawSplit]:
    """Two parts of a split, the second about ``fraction`` of it, by a hash of each text.

    Raises:
        DataError: One part would be empty.
    """
    chosen = [in_held_out(str(text), fraction) for text in raw.texts]
    kept = raw.take([i for i, out in enumerate(chosen) if not out])
    held_out = raw.take([i for i, out in enumerate(chosen) if out])
    if not kept.texts or not held_out.texts:
        raise DataError(
            f"{raw.source}: data.eval_fraction {fraction} of {len(raw.texts)} rows "
            f"leaves {len(kept.texts)} to train on and {len(held_out.texts)} to evaluate on. "
            f"Give data.eval_file, or more data."
        )
    return kept, held_out


def _read_rows(path: Path, options: FileOptions, wanted: Mapping[str, str], name: str) -> Table:
    lines: list[int] = []
    cells: list[list[Any]] = []
    for line, row in rows_of(path, options, wanted, name):
        lines.append(line)
        cells.append(row)
    columns = {column: [row[i] for row in cells] for i, column in enumerate(wanted.values())}
    if (label := wanted.get("data.label_column")) is not None and name != "jsonl":
        columns[label] = typed_labels(columns[label])
    return Table(f"{path}, line", lines, columns)


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> Table:
    import pyarrow.parquet as pq
    from datasets import Dataset

    with reading_parquet(path):
        require_columns(pq.read_schema(path).names, wanted, where=str(path))
        table = pq.read_table(path, columns=list(dict.fromkeys(wanted.values())))
        return table_of_dataset(Dataset(table), wanted, origin=f"{path}, row")


def table_of_dataset(dataset: Any, wanted: Mapping[str, str], *, origin: str) -> Table:
    """Columns of a ``datasets.Dataset``, which were checked to be there; rows count from 0."""
    from datasets import ClassLabel

    names = dict.fromkeys(wanted.values())
    features = {name: dataset.features[name] for name in names}
    return Table(
        origin,
        range(len(dataset)),
        {name: list(dataset[name]) for name in names},
        {name: tuple(f.names) for name, f in features.items() if isinstance(f, ClassLabel)},
    )
