"""Model and data that a script has made already, in the place of what a recipe names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scpl_ds.data._base import DataOptions, DataSource, Splits, Texts
from scpl_ds.data._identity import checksum_of_drawn
from scpl_ds.data.prepared import Data, Facts
from scpl_ds.errors import DataError
from scpl_ds.partition.stage_module import PreTrainedModel
from scpl_ds.recipe import Recipe

SOURCE = f"{__name__}:GivenSource"
"""``data.name`` of a recipe whose run is given its data."""


class GivenOptions(DataOptions):
    """Of data that no file holds."""

    own_metrics: bool = False
    """Evaluations have numbers of the script's own, ``train.metric_for_best_model`` among them."""


class GivenSource(DataSource):
    """Stands in the ``recipe.yaml`` of a run whose data were objects of a script."""

    Options: ClassVar[type[DataOptions]] = GivenOptions

    def load(self) -> Splits:
        raise self._gone()

    def load_texts(self) -> Texts:
        raise self._gone()

    def _gone(self) -> DataError:
        return DataError(
            "data: this run was given its data by a script (scpl_ds.Trainer), so nothing here can "
            "read them again. Call trainer.evaluate(data) in that script, or name data that can be "
            "read: data={name: csv, eval_file: dev.csv} on the command line."
        )


@dataclasses.dataclass(frozen=True)
class Given:
    """What a script hands to a run."""

    model: PreTrainedModel | None
    """Used as it is, weights included; None: the recipe's is read."""
    train: Dataset[Any] | None
    eval: Dataset[Any] | None
    collate: Callable[[list[Any]], Mapping[str, Tensor]]
    tokenizer: Any = None
    """Saved beside the model; None where the script has none."""
    lengths: Callable[[Dataset[Any]], np.ndarray] | None = None
    """Tokens of each sample, for ``train.group_by_length``."""


class WithLengths(Dataset[Any]):
    """A data set that knows how long its samples are."""

    def __init__(self, dataset: Any, lengths: np.ndarray) -> None:
        self._dataset, self.lengths = dataset, lengths

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index]


def size_of(dataset: Any) -> int:
    """Samples of a data set; 0 where there is none."""
    return 0 if dataset is None else len(dataset)


def data_of(recipe: Recipe, given: Given) -> Data:
    """A script's data as a run takes them, on a first-stage rank.

    Raises:
        DataError: The collator's batches have no ``labels``, or entries that are not tensors.
    """
    train: Any = given.train if given.train is not None else range(0)
    held_out: Any = given.eval if given.eval is not None else range(0)
    checksum: str | None = None
    if given.train is not None:
        _check(given, train)
        checksum = checksum_of_drawn(train)
        if recipe.train.group_by_length and given.lengths is not None:
            train = WithLengths(train, given.lengths(train))
    classes = given.model.config.num_labels if given.model is not None else recipe.model.num_labels
    num_labels = None if recipe.model.task == "causal-lm" else classes
    pad = getattr(given.tokenizer, "pad_token_id", None)
    facts = Facts(num_labels, (), pad, len(train), len(held_out), None, train_checksum=checksum)
    collate = cast("Callable[[list[Any]], dict[str, Tensor]]", given.collate)
    return Data(facts, given.tokenizer, train, held_out, collate=collate)


def _check(given: Given, train: Sequence[Any]) -> None:
    if len(train) == 0:
        raise DataError("train_dataset is empty: 0 samples.")
    batch = given.collate([train[0]])
    wrong = [name for name, value in batch.items() if not torch.is_tensor(value)]
    if wrong:
        raise DataError(
            f"'{wrong[0]}' of a batch is a {type(batch[wrong[0]]).__name__}, not a tensor. Drop "
            "the column (remove_unused_columns=True does), or make a tensor of it in data_collator."
        )
    if "labels" not in batch:
        raise DataError(
            f"A batch of train_dataset has {', '.join(batch)} and no 'labels', which every stage "
            "learns from. Name the column 'label' or 'labels', or put them there in data_collator "
            "(a language model: DataCollatorForLanguageModeling(tokenizer, mlm=False))."
        )
