"""Labelled text from local files: csv, tsv, jsonl, parquet.

The readers are the standard library's (parquet: pyarrow's), because what a user needs from a bad
file is the line it is on; a file is held in memory once, as Arrow columns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field, model_validator

from scpl_ds.data._base import DataOptions, DataSource, Splits, Texts, in_held_out
from scpl_ds.data._columns import ColumnOptions, RawSplit, Table, require_columns, typed_labels
from scpl_ds.data._labelled import build_splits
from scpl_ds.data._texts import build_texts
from scpl_ds.errors import DataError
from scpl_ds.recipe_fields import AbsolutePath
from scpl_ds.registry import did_you_mean


class FilePair(BaseModel):
    """A file to train on and one to evaluate on."""

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

    def _tables(self, wanted: Mapping[str, str]) -> tuple[Table | None, Table | None]:
        files = self.options.train_file, self.options.eval_file
        train, held_out = (None if file is None else self._read(file, wanted) for file in files)
        return train, held_out

    def _read(self, path: Path, wanted: Mapping[str, str]) -> Table:
        existing(path)
        try:
            return _READERS[self.name](path, self.options, wanted, self.name)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at position "
                f"{error.start} of a block read. Save it as UTF-8."
            ) from error
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}") from error


def existing(path: Path) -> None:
    """
    Raises:
        DataError: There is no such file, or nothing in it.
    """
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")] or [""])
        raise DataError(
            f"{path} {what}{near or '.'} Correct data.train_file or data.eval_file; a relative "
            "path starts from the folder the command is called in."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")


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


def _read_delimited(
    path: Path, options: FileOptions, wanted: Mapping[str, str], name: str
) -> Table:
    quoted = options.quoted if options.quoted is not None else name == "csv"
    delimiter = options.delimiter or ("\t" if name == "tsv" else ",")
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file,
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        lines: list[int] = []
        cells: list[list[str]] = []
        start = 1
        try:
            header = [column.strip() for column in next(reader, [])]
            require_columns(header, wanted, where=str(path))
            places = [header.index(column) for column in wanted.values()]
            start = reader.line_num + 1
            for record in reader:
                if record and len(record) != len(header):
                    hint = "quote cells that hold it" if quoted else "or set data.quoted: true"
                    raise DataError(
                        f"{path}, line {start}: {len(record)} cells, but the header has "
                        f"{len(header)} ({', '.join(header)}). Cells are split at {delimiter!r}; "
                        f"{hint}."
                    )
                if record:
                    lines.append(start)
                    cells.append([record[i] for i in places])
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: {error}. A double quote is not closed, or data.quoted: "
                f"false is what the file needs."
            ) from error
    columns: dict[str, list[Any]] = _by_name(wanted, cells)
    if (label := wanted.get("data.label_column")) is not None:
        columns[label] = typed_labels(columns[label])
    return Table(f"{path}, line", lines, columns)


def _by_name(wanted: Mapping[str, str], cells: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    return {name: [row[i] for row in cells] for i, name in enumerate(wanted.values())}


def _read_jsonl(path: Path, options: FileOptions, wanted: Mapping[str, str], name: str) -> Table:
    lines: list[int] = []
    cells: list[list[Any]] = []
    names = list(wanted.values())
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}. "
                    f"jsonl is one {{...}} on each line."
                ) from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number}: {type(record).__name__}, but jsonl is one {{...}} on "
                    f"each line."
                )
            if not all(column in record for column in names):
                require_columns(record, wanted, where=f"{path}, line {number}")
            lines.append(number)
            cells.append([record[column] for column in names])
    return Table(f"{path}, line", lines, _by_name(wanted, cells))


def _read_parquet(path: Path, options: FileOptions, wanted: Mapping[str, str], name: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        require_columns(pq.read_schema(path).names, wanted, where=str(path))
        table = pq.read_table(path, columns=list(dict.fromkeys(wanted.values())))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error
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


_READERS: dict[str, Callable[[Path, FileOptions, Mapping[str, str], str], Table]] = {
    "csv": _read_delimited,
    "tsv": _read_delimited,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
