"""From columns to checked ``text``, ``text_pair``, ``label`` for classifiers."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, Features, Value

from scpl_ds.data._base import Splits, check_labels
from scpl_ds.data._columns import ColumnOptions, RawSplit
from scpl_ds.errors import DataError
from scpl_ds.registry import did_you_mean

log = logging.getLogger(__name__)


def build_splits(
    train: RawSplit | None, held_out: RawSplit | None, options: ColumnOptions
) -> Splits:
    """Checked splits of raw columns, labels turned into class ids; ``max_*_samples`` not applied.

    Raises:
        DataError: Empty split, empty text, missing or unusable label, one class only, a label in
            the eval split that training does not have.
    """
    train = None if train is None else _checked_rows(train, options)
    held_out = None if held_out is None else _checked_rows(held_out, options)
    reference = train if train is not None else held_out
    if reference is None:
        raise DataError("The data source has neither training nor evaluation data.")
    own, other = reference.class_names, None if held_out is None else held_out.class_names
    if held_out is not None and own is not None and other is not None and other != own:
        raise DataError(
            f"{held_out.source} has the classes {_list(other)}, but {reference.source} has "
            f"{_list(own)}: one id would mean two things. Store both with the same classes."
        )
    ids = _class_ids(reference, options)
    names = tuple(name for name, _ in sorted(_names(reference, ids, options), key=lambda p: p[1]))
    splits = Splits(
        train=None if train is None else _dataset(train, ids, names, options),
        eval=None if held_out is None else _dataset(held_out, ids, names, options),
        label_names=names,
        origin={s: r.origin for s, r in (("train", train), ("eval", held_out)) if r is not None},
    )
    check_labels(splits)
    _warn_of_overlap(train, held_out)
    return splits


def _checked_rows(raw: RawSplit, options: ColumnOptions) -> RawSplit:
    """All rows of a split that can be used; refuses (or drops, when asked) the others."""
    if not raw.texts:
        raise DataError(f"{raw.source}: no rows, the data set is empty.")
    bad: dict[int, str] = {}
    columns = [(options.text_column, raw.texts), (options.text_pair_column, raw.pairs)]
    for column, values in columns:
        for index, value in enumerate(values or ()):
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{raw.at(index)}: column '{column}' holds {type(value).__name__} "
                    f"{_short(value)}, not text. Check data.text_column and data.text_pair_column."
                )
            if value is None or not value.strip():
                bad.setdefault(index, f"column '{column}' is empty")
    for index, label in enumerate(raw.labels):
        if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
            bad.setdefault(index, f"column '{options.label_column}' has no label")
        elif _is_whole(label) and label < 0 and not _is_named(label, raw, options):
            bad.setdefault(index, f"label is {label}, which stands for 'no label' in hub data sets")
    if not bad:
        return raw
    if not options.drop_invalid_rows:
        first = min(bad)
        raise DataError(
            f"{raw.at(first)}: {bad[first]}; {len(bad)} of {len(raw.texts)} rows are unusable. "
            f"Correct them, or set data.drop_invalid_rows: true to leave them out."
        )
    log.warning(
        "%s: %d of %d rows left out (data.drop_invalid_rows), the first at %s: %s",
        raw.source,
        len(bad),
        len(raw.texts),
        raw.at(min(bad)),
        bad[min(bad)],
    )
    kept = raw.take([index for index in range(len(raw.texts)) if index not in bad])
    if not kept.texts:
        raise DataError(
            f"{raw.at(min(bad))}: {bad[min(bad)]}, and so for all {len(bad)} rows: nothing is left."
            f" Hub test splits often come without labels; use another split."
        )
    return kept


def _is_named(number: float, raw: RawSplit, options: ColumnOptions) -> bool:
    """Whether a number is the name of a class; of a ``ClassLabel`` it is always an id."""
    return raw.class_names is None and str(int(number)) in (options.label_names or ())


def _class_ids(raw: RawSplit, options: ColumnOptions) -> dict[Any, int]:
    """Label value -> class id, decided by the training split alone."""
    values: dict[Any, int] = {}
    for index, label in enumerate(raw.labels):
        if isinstance(label, float) and not label.is_integer():
            raise DataError(
                f"{raw.at(index)}: label {label} is not a whole number. scpl_ds trains "
                f"classifiers; regression is not supported. Turn the values into classes first."
            )
        if not isinstance(label, str | int | float):
            raise DataError(
                f"{raw.at(index)}: column '{options.label_column}' holds {type(label).__name__} "
                f"{_short(label)}; a label is a whole number or a name. Multi-label data is not "
                f"supported."
            )
        values.setdefault(_key(label), index)
    numbers = [value for value in values if isinstance(value, int)]
    if numbers and len(numbers) < len(values):
        other = next(value for value in values if isinstance(value, str))
        raise DataError(
            f"{raw.at(values[other])}: label '{other}' is text, but {raw.at(values[numbers[0]])} "
            f"has the number {numbers[0]}. Use one kind of label."
        )
    if numbers and raw.class_names is not None:
        return _ids_of_class_label(raw, values, raw.class_names, options.label_names)
    if options.label_names is not None:
        return _ids_of_given_names(raw, values, options.label_names)
    if not numbers:
        return {value: index for index, value in enumerate(sorted(values))}
    # A class id that never occurs is nearly always a 1-based file; training it would waste a class.
    # Not the whole list: a label may be 10**9.
    absent = list(itertools.islice((k for k in range(max(numbers)) if k not in values), 11))
    if absent:
        names = ", ".join(f"'{n}'" for n in sorted(numbers)[:8])
        raise DataError(
            f"{raw.source}: labels are {_list(sorted(numbers))}, so class "
            f"{_list(absent)} never occurs; class ids must run from 0 without gaps. To map the "
            f"values to ids set data.label_names: [{names}{', ...' if len(numbers) > 8 else ''}]."
        )
    return {value: value for value in numbers}


def _ids_of_class_label(
    raw: RawSplit, values: dict[Any, int], own: tuple[str, ...], given: tuple[str, ...] | None
) -> dict[Any, int]:
    """A ``ClassLabel`` stores ids; they are never looked up among its names, even if these are
    numbers.

    ``data.label_names`` puts its classes in another order, or renames them.
    """
    names = own if given is None else given
    if given is not None and sorted(given) == sorted(own):
        ids = {index: given.index(name) for index, name in enumerate(own)}
    else:
        moved = [n for n in own if n in names and names.index(n) != own.index(n)]
        if moved:
            raise DataError(
                f"data.label_names: in {raw.source} '{moved[0]}' is class {own.index(moved[0])}, "
                f"not {names.index(moved[0])}. Its classes are {_list(own)}: give all of these in "
                f"the order wanted, or new names in this order."
            )
        ids = {index: index for index in range(len(names))}
    for value, index in values.items():
        if value not in ids:
            name = own[value] if 0 <= value < len(own) else "no class"
            raise DataError(
                f"{raw.at(index)}: label {value} ('{name}') has no name among the {len(names)} of "
                f"data.label_names: {_list(names)}. Name all {len(own)} classes: {_list(own)}."
            )
    return ids


def _ids_of_given_names(
    raw: RawSplit, values: dict[Any, int], given: tuple[str, ...]
) -> dict[Any, int]:
    by_name = {name: index for index, name in enumerate(given)}
    if len(by_name) < len(given):
        raise DataError(f"data.label_names: {list(given)} holds a name twice.")
    if all(isinstance(value, int) and str(value) not in by_name for value in values):
        by_value: dict[Any, int] = {index: index for index in range(len(given))}
    else:
        by_value = {
            (
                int(name) if isinstance(next(iter(values)), int) and _looks_whole(name) else name
            ): index
            for name, index in by_name.items()
        }
    for value, index in values.items():
        if value not in by_value:
            raise DataError(
                f"{raw.at(index)}: label '{value}' is not among the {len(given)} label names "
                f"{_list(given)}{did_you_mean(str(value), given)}"
            )
    return by_value


def _names(raw: RawSplit, ids: dict[Any, int], options: ColumnOptions) -> Iterable[tuple[str, int]]:
    given = options.label_names or (raw.class_names if raw.class_names else None)
    if given is not None:
        return [(name, index) for index, name in enumerate(given)]
    return [(str(value), index) for value, index in ids.items()]


def _dataset(
    raw: RawSplit, ids: dict[Any, int], names: Sequence[str], options: ColumnOptions
) -> Dataset:
    labels = []
    for index, label in enumerate(raw.labels):
        key = _key(label) if isinstance(label, str | int | float) else None
        if key not in ids:
            raise DataError(
                f"{raw.at(index)}: label '{label}' does not occur in training, which has "
                f"{_list(names)}{did_you_mean(str(label), names) or '.'} Correct it, or list all "
                f"classes in data.label_names."
            )
        labels.append(ids[key])
    columns: dict[str, Any] = {"text": list(raw.texts), "label": labels, "row": list(raw.rows)}
    features = {"text": Value("string"), "label": Value("int64"), "row": Value("int64")}
    if raw.pairs is not None:
        columns["text_pair"] = list(raw.pairs)
        features["text_pair"] = Value("string")
    return Dataset.from_dict(columns, features=Features(features))


def _warn_of_overlap(train: RawSplit | None, held_out: RawSplit | None) -> None:
    if train is None or held_out is None:
        return
    seen = set(zip(train.texts, train.pairs or [None] * len(train.texts), strict=True))
    pairs = held_out.pairs or [None] * len(held_out.texts)
    count = sum(sample in seen for sample in zip(held_out.texts, pairs, strict=True))
    if count:
        log.warning(
            "%d of %d evaluation samples also occur in training, word for word: "
            "the accuracy will be flattering.",
            count,
            len(held_out.texts),
        )


def _key(label: str | int | float) -> str | int:
    """The value a label is compared by: 1.0, True and 1 are one class, ' pos' and 'pos' are one."""
    return (
        label.strip() if isinstance(label, str) else int(label) if _is_whole(label) else str(label)
    )


def _is_whole(label: object) -> bool:
    return isinstance(label, int) or (isinstance(label, float) and label.is_integer())


def _looks_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdigit()


def _list(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:10])
    return f"{shown} and {len(values) - 10} more" if len(values) > 10 else shown


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
