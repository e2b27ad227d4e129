"""Labelled text from the Hugging Face hub (or a local data set folder) through ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from scpl_ds.data._base import DataOptions, DataSource, Splits, Texts
from scpl_ds.data._columns import ColumnOptions, Table, require_columns
from scpl_ds.data._labelled import build_splits
from scpl_ds.data._texts import build_texts
from scpl_ds.data.files import table_of_dataset
from scpl_ds.errors import DataError
from scpl_ds.recipe_fields import AbsolutePath, NameOrFolder
from scpl_ds.registry import did_you_mean

if TYPE_CHECKING:
    from datasets import DatasetDict


class HubOptions(ColumnOptions):
    """Options of ``hf``."""

    dataset: NameOrFolder
    """Name on the hub (``stanfordnlp/sst2``) or a folder: data files, or ``save_to_disk``."""
    config: str | None = None
    """Configuration (subset) of the data set, such as ``mrpc`` of ``nyu-mll/glue``."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit makes a run repeatable."""
    train_split: str | None = "train"
    """Split to train on; null to evaluate only."""
    eval_split: str | None = "validation"
    """Split to evaluate on; null for none."""
    cache_dir: AbsolutePath | None = None
    """Where ``datasets`` keeps what it downloads; None: its own default (``HF_HOME``)."""


class HubSource(DataSource):
    """``data: {name: hf, dataset: stanfordnlp/sst2, text_column: sentence}``.

    Code that a hub repository carries is never run.
    """

    Options: ClassVar[type[DataOptions]] = HubOptions
    options: HubOptions

    def load(self) -> Splits:
        """Download (once) and check both splits.

        Raises:
            DataError: The data set, configuration or split cannot be had, or its rows are unusable.
        """
        tables = self._tables(self.options.columns())
        train, held_out = (table and table.labelled(self.options) for table in tables)
        return self.limit(build_splits(train, held_out, self.options))

    def load_texts(self) -> Texts:
        train, held_out = self._tables(self.options.text_columns())
        return self.limit(build_texts(train, held_out, self.options))

    def _tables(self, wanted: Mapping[str, str]) -> tuple[Table | None, Table | None]:
        dataset, options = _fetch(self.options), self.options
        train = self._split(dataset, "data.train_split", options.train_split, wanted)
        return train, self._split(dataset, "data.eval_split", options.eval_split, wanted)

    def _split(
        self, dataset: DatasetDict, key: str, name: str | None, wanted: Mapping[str, str]
    ) -> Table | None:
        if name is None:
            return None
        where = f"{self.options.dataset} split '{name}'"
        if name not in dataset:
            found = [str(split) for split in dataset]
            raise DataError(
                f"{key}: '{self.options.dataset}' has no split '{name}'{did_you_mean(name, found)} "
                f"Splits found: {', '.join(found)}. Set {key} to one of them, or to null."
            )
        require_columns(dataset[name].column_names, wanted, where=where)
        return table_of_dataset(dataset[name], wanted, origin=f"{where}, row")


def _fetch(options: HubOptions) -> DatasetDict:
    import datasets

    folder = Path(options.dataset)
    try:
        if (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(
                str(folder) if folder.is_dir() else options.dataset,
                options.config,
                revision=options.revision,
                cache_dir=None if options.cache_dir is None else str(options.cache_dir),
            )
    # Not narrower: datasets lets errors of httpx, fsspec, pyarrow, pandas and its builders through,
    # and each means the same to a user: this data set cannot be had as asked.
    except Exception as error:
        raise DataError(_why_not(options, error)) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            f"data.dataset: '{options.dataset}' is one {type(loaded).__name__} without splits; "
            f"save it as a DatasetDict."
        )
    return loaded


def _why_not(options: HubOptions, error: Exception) -> str:
    named = f"'{options.dataset}'" + (f" config '{options.config}'" if options.config else "")
    cause = " ".join(str(error).split())
    return (
        f"data.dataset: {named} cannot be loaded ({type(error).__name__}: {cause[:400]}). "
        f"Check the name, data.config and data.revision on https://huggingface.co/datasets; "
        f"private ones need `hf auth login`. Without a network: fetch it once on a connected "
        f"machine, copy its cache (HF_HOME) and set HF_HUB_OFFLINE=1; or use local files: data: "
        f"{{name: csv, train_file: ...}} (also tsv, jsonl, parquet)."
    )
