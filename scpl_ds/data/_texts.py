"""From columns to checked text for language models, and plain text files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from scpl_ds.data._base import Texts, TextStream, in_held_out
from scpl_ds.data._columns import ColumnOptions, Table
from scpl_ds.errors import DataError

log = logging.getLogger(__name__)

_KINDS: dict[str, tuple[Literal["text", "prompt", "messages"], tuple[str, ...]]] = {
    "data.text_column": ("text", ("text",)),
    "data.prompt_column": ("prompt", ("prompt", "completion")),
    "data.messages_column": ("messages", ("messages",)),
}


def build_texts(
    train: Table | None,
    held_out: Table | None,
    options: ColumnOptions,
    *,
    fraction: float | None = None,
) -> Texts:
    """Checked texts of raw columns; ``max_*_samples`` not applied.

    Args:
        fraction: Share of ``train`` to hold out, by a hash of the text.

    Raises:
        DataError: No rows, or one that holds no text, or no conversation.
    """
    wanted = options.text_columns()
    kind, names = _KINDS[next(iter(wanted))]
    own = dict(zip(names, wanted.values(), strict=True))
    checked = {
        split: _checked(table, own, options)
        for split, table in (("train", train), ("eval", held_out))
        if table is not None
    }
    if not checked:
        raise DataError("The data source has neither training nor evaluation data.")
    origin = {s: t.origin for s, t in (("train", train), ("eval", held_out)) if t is not None}
    if fraction is not None and "train" in checked:
        chosen = [in_held_out(str(text), fraction) for text in checked["train"][names[0]]]
        parts = [[i for i, out in enumerate(chosen) if out == part] for part in (False, True)]
        if not all(parts):
            raise DataError(
                f"data.eval_fraction {fraction} of {len(chosen)} rows leaves {len(parts[0])} to "
                f"train on and {len(parts[1])} to evaluate on. Give data.eval_file, or more data."
            )
        whole = checked["train"]
        checked = {"train": whole.select(parts[0]), "eval": whole.select(parts[1])}
        origin["eval"] = origin["train"]
    return Texts(kind, checked.get("train"), checked.get("eval"), origin)


def text_stream(
    rows: IterableDataset, wanted: Mapping[str, str], origin: str, *, numbered: bool = False
) -> TextStream:
    """A stream of the columns a recipe asks for (``ColumnOptions.text_columns``)."""
    kind, names = _KINDS[next(iter(wanted))]
    own = dict(zip(names, wanted.values(), strict=True))
    return TextStream(kind, rows, own, origin, numbered)


def why_not(name: str, value: Any) -> str | None:
    """What keeps a cell from being ``text``, ``prompt``, ``completion`` or ``messages``."""
    return _no_conversation(value) if name == "messages" else _no_text(value)


def as_json(messages: Any) -> str:
    """A conversation as it was read, but for keys that are null: a format with columns gives every
    message the keys of all others, and the chat template would see them."""
    return json.dumps(_without_nulls(messages), default=str)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _checked(table: Table, own: dict[str, str], options: ColumnOptions) -> Dataset:
    source = table.origin.rsplit(", ", 1)[0]
    if not table.rows:
        raise DataError(f"{source}: no rows, the data set is empty.")
    bad: dict[int, str] = {}
    for name, column in own.items():
        for index, value in enumerate(table.columns[column]):
            if problem := why_not(name, value):
                bad.setdefault(index, f"column '{column}' {problem}")
    if bad and not options.drop_invalid_rows:
        first = min(bad)
        raise DataError(
            f"{table.origin} {table.rows[first]}: {bad[first]}; {len(bad)} of {len(table.rows)} "
            "rows are unusable. Correct them, or set data.drop_invalid_rows: true."
        )
    kept = [index for index in range(len(table.rows)) if index not in bad]
    if bad:
        log.warning("%s: %d of %d rows left out", source, len(bad), len(table.rows))
    if not kept:
        raise DataError(f"{source}: all {len(bad)} rows are unusable: {bad[min(bad)]}.")
    columns = {name: [table.columns[column][i] for i in kept] for name, column in own.items()}
    if "messages" in columns:
        columns["messages"] = [as_json(value) for value in columns["messages"]]
    return Dataset.from_dict({**columns, "row": [table.rows[i] for i in kept]})


def _no_text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        return f"holds {type(value).__name__}, not text"
    return None if value and value.strip() else "is empty"


def _no_conversation(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "holds no list of messages"
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return "holds a message without a role"
        if not isinstance(message.get("content"), str):
            return "holds a message whose content is no text"
    if not any(message["role"] == "assistant" and message["content"] for message in value):
        return "holds no answer of the assistant"
    return None
