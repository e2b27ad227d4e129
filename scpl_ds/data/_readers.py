"""Rows of local files, one after the other, each with the line it is on.

The readers are the standard library's (parquet: pyarrow's), because what a user needs from a bad
file is the line it is on. What is read into memory and what is streamed goes through the same ones.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds.data._columns import require_columns
from scpl_ds.errors import DataError
from scpl_ds.registry import did_you_mean

if TYPE_CHECKING:
    from scpl_ds.data.files import FileOptions

Row = tuple[int, list[Any]]
"""Line (parquet: row, from 0) and the cells of the columns asked for."""


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


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Raises:
        DataError: What is read inside is not UTF-8, or cannot be read.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at position "
            f"{error.start} of a block read. Save it as UTF-8."
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """
    Raises:
        DataError: What is read inside is no parquet, or is damaged.
    """
    try:
        yield
    except (DataError, OSError):
        raise
    # Not narrower: of damaged bytes pyarrow and datasets make errors of a dozen classes.
    except Exception as error:
        cause = " ".join(str(error).split())[:400]
        raise DataError(
            f"{path} is not a parquet file, or is damaged ({type(error).__name__}: {cause}). Write "
            "it again."
        ) from error


def rows_of(
    path: Path, options: FileOptions, wanted: Mapping[str, str], name: str
) -> Iterator[Row]:
    """Rows of a file, read as they are asked for.

    Args:
        path: The file.
        options: How cells are separated.
        wanted: Recipe key -> column.
        name: ``csv``, ``tsv``, ``jsonl`` or ``parquet``.

    Raises:
        DataError: With file and line: a column is not there, a line is broken.
    """
    existing(path)
    with reading(path):
        yield from _ROWS[name](path, options, wanted, name)


def named_rows(
    path: Path, options: FileOptions, wanted: Mapping[str, str], name: str
) -> Iterator[dict[str, Any]]:
    """:func:`rows_of` as a stream has them: column -> cell, and ``row``."""
    for line, cells in rows_of(path, options, wanted, name):
        yield {**dict(zip(wanted.values(), cells, strict=True)), "row": line}


def _delimited(
    path: Path, options: FileOptions, wanted: Mapping[str, str], name: str
) -> Iterator[Row]:
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
                    yield start, [record[i] for i in places]
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: {error}. A double quote is not closed, or data.quoted: "
                f"false is what the file needs."
            ) from error


def _jsonl(path: Path, options: FileOptions, wanted: Mapping[str, str], name: str) -> Iterator[Row]:
    names = list(wanted.values())
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "\\u" in line:  # half of a surrogate pair is JSON, but no text
                    json.dumps(record, ensure_ascii=False).encode()
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}. "
                    f"jsonl is one {{...}} on each line."
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {number}: cannot be read: {error}.") from error
            if not isinstance(record, dict):
                raise DataError(
                    f"{path}, line {number}: {type(record).__name__}, but jsonl is one {{...}} on "
                    f"each line."
                )
            if not all(column in record for column in names):
                require_columns(record, wanted, where=f"{path}, line {number}")
            yield number, [record[column] for column in names]


def _parquet(
    path: Path, options: FileOptions, wanted: Mapping[str, str], name: str
) -> Iterator[Row]:
    """A stream's; in memory the file's own columns are kept."""
    import pyarrow.parquet as pq

    names = list(dict.fromkeys(wanted.values()))
    with reading_parquet(path):
        file = pq.ParquetFile(path)
        require_columns(file.schema_arrow.names, wanted, where=str(path))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=names):
            for record in batch.to_pylist():
                yield number, [record[column] for column in wanted.values()]
                number += 1


_ROWS: dict[str, Callable[[Path, FileOptions, Mapping[str, str], str], Iterator[Row]]] = {
    "csv": _delimited,
    "tsv": _delimited,
    "jsonl": _jsonl,
    "parquet": _parquet,
}
