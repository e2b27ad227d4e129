"""What a data source is: options in, two checked splits of labelled text out.

A new source is one file with a :class:`DataSource` and one line in ``scpl_ds/registry.py``, or
none (``data: {name: "my_package.my_module:MySource"}``).
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from scpl_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger(__name__)
S = TypeVar("S", "Splits", "Texts")


class DataOptions(BaseModel):
    """Options every source has: the keys of the recipe's ``data`` section, without ``name``."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    max_length: PositiveInt = 128
    """Longest sample in tokens, special tokens included; longer ones are cut, which is logged."""
    pad_token: str | None = None
    """For a tokenizer that has no padding token (GPT-2, Llama): ``eos`` to use its end-of-text
    token, or the text of any token it knows. None keeps what the tokenizer says."""
    pad_to_multiple_of: PositiveInt | None = None
    """Round the length of every batch up to a multiple (8 or 64 for tensor cores). None: do not."""
    packing: bool = False
    """``causal-lm``: lay whole pieces beside each other in rows of up to ``max_length`` tokens;
    mask and positions keep them apart."""
    completion_only: bool = True
    """``causal-lm``: of prompts with completions and of conversations, only the answers are
    learned and scored."""
    streaming: bool = False
    """``causal-lm``: read and tokenise the training data as they are asked for, instead of all of
    them before the first step. Needs ``train.max_steps``; the evaluation data are read ahead."""
    shuffle_buffer: PositiveInt = 10_000
    """``streaming``: rows read ahead and shuffled together, by ``train.seed``; 1 keeps their
    order."""
    max_train_samples: PositiveInt | None = None
    """Keep this many training samples, drawn by ``seed``. None keeps all. Of ``causal-lm`` on
    documents a sample is a piece of ``max_length`` tokens, or a packed row."""
    max_eval_samples: PositiveInt | None = None
    """Keep this many evaluation samples, drawn by ``seed``. None keeps all."""
    seed: NonNegativeInt = 0
    """Which samples ``max_train_samples`` and ``max_eval_samples`` keep. The order of training
    has its own seed, ``train.seed``."""

    @model_validator(mode="after")
    def _stream_has_no_sample(self) -> Self:
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                "max_train_samples draws from all of the samples, which a stream does not know; "
                "remove it, train.max_steps ends the training"
            )
        return self


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of one run, every row checked: no empty text, every label a class id.

    Columns: ``text`` (str), ``text_pair`` (str, only when asked for), ``label`` (int64 from 0) and
    ``row`` (int64, where the sample stands in its origin; optional).
    """

    train: Dataset | None
    """What is trained on; None for an evaluation-only source."""
    eval: Dataset | None
    """What is scored; None when there is none."""
    label_names: tuple[str, ...]
    """Class id -> name, for the model's config."""
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """``train`` and ``eval`` -> what a row number follows, such as ``reviews.csv, line``."""

    def at(self, split: str, index: int) -> str:
        """Where sample ``index`` of a split was read, for messages: ``reviews.csv, line 12``."""
        return _place(self.train if split == "train" else self.eval, self.origin, split, index)


def _place(dataset: Dataset | None, origin: Mapping[str, str], split: str, index: int) -> str:
    assert dataset is not None
    row = dataset[index]["row"] if "row" in dataset.column_names else index
    return f"{origin.get(split, f'{split} split, row')} {row}"


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a language model is trained on, every row checked: nothing is empty.

    Columns: ``text``; or ``prompt`` and ``completion``; or ``messages``, a list of
    ``{"role": ..., "content": ...}``, or JSON of one, which keeps messages with other keys or types
    as they were read. And ``row``, where it stands in its origin.
    """

    kind: Literal["text", "prompt", "messages"]
    train: Dataset | None
    eval: Dataset | None
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """As in :class:`Splits`."""

    def at(self, split: str, index: int) -> str:
        """Where sample ``index`` of a split was read, for messages."""
        return _place(self.train if split == "train" else self.eval, self.origin, split, index)


@dataclasses.dataclass(frozen=True)
class TextStream:
    """Rows of text that are read one after the other and looked at on the way."""

    kind: Literal["text", "prompt", "messages"]
    rows: IterableDataset
    columns: Mapping[str, str]
    """``text``, or ``prompt`` and ``completion``, or ``messages`` -> the column of ``rows``."""
    origin: str
    """What a row number follows in messages."""
    numbered: bool = False
    """Rows have their number in ``row``; else they are counted, shard by shard."""


class Streamed(NamedTuple):
    """Training data as a stream, evaluation data in memory."""

    train: TextStream | None
    eval: Texts | None


class DataSource(abc.ABC):
    """Where text comes from. Made from a recipe's ``data`` section."""

    Options: ClassVar[type[DataOptions]] = DataOptions
    """The keys this source takes; a subclass of :class:`DataOptions`."""

    def __init__(self, options: DataOptions, *, name: str = "") -> None:
        self.options = options
        self.name = name
        """The name it was asked for by; one class may serve several (``csv``, ``jsonl``)."""

    @abc.abstractmethod
    def load(self) -> Splits:
        """Read, check and sample. Costs seconds, trains nothing.

        Raises:
            DataError: Anything about the data that would break or spoil training.
        """

    def load_texts(self) -> Texts:
        """The same for ``model.task: causal-lm``, which needs no labels.

        Raises:
            DataError: As ``load``; or this source has labelled text only.
        """
        raise DataError(
            f"data.name: '{self.name}' gives labelled samples, which model.task: causal-lm has no "
            "use for. Use text, jsonl, csv, tsv, parquet or hf."
        )

    def stream_texts(self) -> Streamed:
        """:meth:`load_texts` with ``streaming``: no training row has been read yet.

        Raises:
            DataError: As ``load_texts``; or this source cannot stream.
        """
        raise DataError(
            f"data.streaming: '{self.name}' cannot be streamed. Use text, jsonl, csv, tsv, parquet "
            "or hf."
        )

    def limit(self, splits: S) -> S:
        """The splits cut to ``max_train_samples`` and ``max_eval_samples``, in their old order.

        Documents are left: their samples are pieces, drawn when they have been tokenised.
        """
        options = self.options
        if isinstance(splits, Texts) and splits.kind == "text":
            return splits
        return dataclasses.replace(
            splits,
            train=_draw(splits.train, options.max_train_samples, options.seed),
            eval=_draw(splits.eval, options.max_eval_samples, options.seed),
        )


def in_held_out(text: str, fraction: float) -> bool:
    """Whether a text belongs to the held-out part: a property of the text alone."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < fraction


def _draw(dataset: Dataset | None, count: int | None, seed: int) -> Dataset | None:
    if dataset is None or count is None or count >= len(dataset):
        return dataset
    return dataset.select(drawn(len(dataset), count, seed), keep_in_memory=True)


def drawn(total: int, count: int, seed: int) -> np.ndarray:
    """Which ``count`` of ``total`` samples ``max_*_samples`` keeps, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def check_labels(splits: Splits, num_labels: int | None = None) -> int:
    """Number of classes to build the model with, once the labels are known to fit it.

    Args:
        splits: What a source loaded.
        num_labels: ``model.num_labels`` of the recipe; None takes the number found in the data.

    Raises:
        DataError: A split is empty, a label is not in [0, ``num_labels``), the data holds more
            classes than the model, or training has one class only (nothing to contrast).
    """
    if splits.train is None and splits.eval is None:
        raise DataError("The data source gave neither a train nor an eval split.")
    classes = num_labels if num_labels is not None else len(splits.label_names)
    for split, dataset in (("train", splits.train), ("eval", splits.eval)):
        if dataset is None:
            continue
        if len(dataset) == 0:
            raise DataError(
                f"The {split} split is empty ({splits.origin.get(split, 'no rows')} 0)."
            )
        labels = np.asarray(dataset.with_format("numpy")["label"][:])
        outside = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(outside):
            first = int(outside[0])
            label = int(labels[first])
            name = splits.label_names[label] if 0 <= label < len(splits.label_names) else label
            raise DataError(
                f"{splits.at(split, first)}: label {label} ('{name}') is out of range: "
                f"model.num_labels is {classes}, so labels run from 0 to {classes - 1}; "
                f"{len(outside)} of {len(dataset)} rows of the {split} split are outside. "
                f"The data has {len(splits.label_names)} classes: set model.num_labels: "
                f"{len(splits.label_names)}, or correct the labels."
            )
        if split == "train" and len(found := np.unique(labels)) < 2:
            raise DataError(
                f"All {len(dataset)} training samples have label {int(found[0])}: with one class "
                f"there is nothing to tell apart. Check data.label_column and the file."
            )
    if num_labels is not None and num_labels > len(splits.label_names) > 0:
        log.warning(
            "model.num_labels is %d but the data has %d classes; the others are never trained.",
            num_labels,
            len(splits.label_names),
        )
    return classes
