"""The columns of a file or hub data set, as they were read, and which of them a recipe asks for.

Shared by all sources that read what somebody else wrote. Everything is looked at before training:
a run that dies on row 90 000 after an hour is worse than a second of checking.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from pydantic import model_validator

from scpl_ds.data._base import DataOptions
from scpl_ds.errors import DataError
from scpl_ds.registry import did_you_mean


class ColumnOptions(DataOptions):
    """Options of sources that read columns."""

    text_column: str = "text"
    """Column that holds the text."""
    text_pair_column: str | None = None
    """Column of a second text (entailment, paraphrase), joined the way the tokenizer does it."""
    label_column: str = "label"
    """Column of the class: whole numbers from 0, or names."""
    label_names: tuple[str, ...] | None = None
    """Names of the classes in the order of their ids. Needed when not every class occurs in
    training or when whole numbers do not start at 0. None: as found, names sorted."""
    drop_invalid_rows: bool = False
    """Leave out rows with an empty text or without a label (null or negative) instead of
    refusing the data set; the number is logged."""

    messages_column: str | None = None
    """``causal-lm``: column of conversations, lists of ``{role: ..., content: ...}``, written in
    the tokenizer's chat template."""
    prompt_column: str | None = None
    """``causal-lm``: column of prompts, with ``completion_column``."""
    completion_column: str | None = None
    """``causal-lm``: column of what is to be answered."""

    @model_validator(mode="after")
    def _one_kind_of_text(self) -> Self:
        if (self.prompt_column is None) != (self.completion_column is None):
            raise ValueError("prompt_column and completion_column need each other")
        if self.messages_column is not None and self.prompt_column is not None:
            raise ValueError("messages_column and prompt_column are two kinds of text; keep one")
        return self

    def text_columns(self) -> dict[str, str]:
        """Recipe key -> column name asked for, where a language model is trained."""
        if self.messages_column is not None:
            return {"data.messages_column": self.messages_column}
        if self.prompt_column is not None and self.completion_column is not None:
            return {
                "data.prompt_column": self.prompt_column,
                "data.completion_column": self.completion_column,
            }
        return {"data.text_column": self.text_column}

    def columns(self) -> dict[str, str]:
        """Recipe key -> column name asked for."""
        wanted = {"data.text_column": self.text_column, "data.label_column": self.label_column}
        if self.text_pair_column is not None:
            wanted["data.text_pair_column"] = self.text_pair_column
        return wanted


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns by their names, as they were read; all sequences have the same length."""

    origin: str
    """What a row number follows in messages: ``reviews.csv, line``."""
    rows: Sequence[int]
    columns: Mapping[str, Sequence[Any]]
    class_names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Column -> names that the format itself carries (``datasets.ClassLabel``)."""

    def labelled(self, options: ColumnOptions) -> RawSplit:
        """The columns that a classifier learns from."""
        pair = options.text_pair_column
        return RawSplit(
            origin=self.origin,
            rows=self.rows,
            texts=self.columns[options.text_column],
            labels=self.columns[options.label_column],
            pairs=None if pair is None else self.columns[pair],
            class_names=self.class_names.get(options.label_column),
        )


@dataclasses.dataclass(frozen=True)
class RawSplit:
    """Columns as they were read, unchecked; all sequences have the same length."""

    origin: str
    """What a row number follows in messages: ``reviews.csv, line``."""
    rows: Sequence[int]
    texts: Sequence[Any]
    labels: Sequence[Any]
    pairs: Sequence[Any] | None = None
    class_names: tuple[str, ...] | None = None
    """Names that the format itself carries (``datasets.ClassLabel``)."""

    @property
    def source(self) -> str:
        """The file or split, without the word for a row."""
        return self.origin.rsplit(", ", 1)[0]

    def at(self, index: int) -> str:
        return f"{self.origin} {self.rows[index]}"

    def take(self, indices: Sequence[int]) -> RawSplit:
        return dataclasses.replace(
            self,
            rows=[self.rows[i] for i in indices],
            texts=[self.texts[i] for i in indices],
            labels=[self.labels[i] for i in indices],
            pairs=None if self.pairs is None else [self.pairs[i] for i in indices],
        )


def require_columns(found: Iterable[str], wanted: Mapping[str, str], *, where: str) -> None:
    """Refuse a table that lacks a column the recipe names.

    Raises:
        DataError: Names all missing columns, the recipe keys and the columns there are.
    """
    found = [str(name) for name in found]
    missing = [
        f"{key}: '{name}' is not a column{did_you_mean(name, found) or '.'}"
        for key, name in wanted.items()
        if name not in found
    ]
    if missing:
        raise DataError(
            f"{where}: {' '.join(missing)} Columns found: {', '.join(found) or 'none'}."
        )


def typed_labels(cells: Sequence[str | None]) -> list[Any]:
    """Cells of a text table with numbers made numbers, if all (non-empty) cells are numbers."""
    filled = [cell for cell in cells if cell is not None and cell.strip()]
    if not filled:
        return list(cells)
    for convert in (int, float):
        try:
            for cell in filled:
                convert(cell)
        except ValueError:
            continue
        return [convert(c) if c is not None and c.strip() else None for c in cells]
    return list(cells)
