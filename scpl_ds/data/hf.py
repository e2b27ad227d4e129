"""Labelled text from the Hugging Face hub (or a local data set folder) through ``datasets``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from scpl_ds.data._base import DataOptions, DataSource, Splits, Streamed, Texts
from scpl_ds.data._columns import ColumnOptions, Table, require_columns
from scpl_ds.data._labelled import build_splits
from scpl_ds.data._texts import build_texts, text_stream
from scpl_ds.data.files import table_of_dataset
from scpl_ds.errors import DataError
from scpl_ds.recipe_fields import AbsolutePath, NameOrFolder
from scpl_ds.registry import did_you_mean

Splitted = DatasetDict | IterableDatasetDict


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

    def stream_texts(self) -> Streamed:
        options, wanted = self.options, self.options.text_columns()
        dataset = _fetch(options, streaming=True)
        held_out = self._split(dataset, "data.eval_split", options.eval_split, wanted)
        texts = None if held_out is None else self.limit(build_texts(None, held_out, options))
        stream, name = None, options.train_split
        if name is not None:
            rows: Any = self._rows(dataset, "data.train_split", name)
            if isinstance(rows, Dataset):  # of `save_to_disk`: on disk, and stays there
                rows = rows.to_iterable_dataset()
            where = f"{options.dataset} split '{name}'"
            require_columns(_columns_of(rows, where), wanted, where=where)
            stream = text_stream(rows, wanted, where)
        return Streamed(stream, texts)

    def _tables(self, wanted: Mapping[str, str]) -> tuple[Table | None, Table | None]:
        dataset, options = _fetch(self.options), self.options
        train = self._split(dataset, "data.train_split", options.train_split, wanted)
        return train, self._split(dataset, "data.eval_split", options.eval_split, wanted)

    def _split(
        self, dataset: Splitted, key: str, name: str | None, wanted: Mapping[str, str]
    ) -> Table | None:
        if name is None:
            return None
        where = f"{self.options.dataset} split '{name}'"
        rows = self._rows(dataset, key, name)
        require_columns(_columns_of(rows, where), wanted, where=where)
        if isinstance(rows, Dataset):
            return table_of_dataset(rows, wanted, origin=f"{where}, row")
        found = list(rows.select_columns(list(dict.fromkeys(wanted.values()))))
        columns = {name: [row[name] for row in found] for name in wanted.values()}
        return Table(f"{where}, row", range(len(found)), columns)

    def _rows(self, dataset: Splitted, key: str, name: str) -> Dataset | IterableDataset:
        if name not in dataset:
            found = [str(split) for split in dataset]
            raise DataError(
                f"{key}: '{self.options.dataset}' has no split '{name}'"
                f"{did_you_mean(name, found) or '.'} Splits found: {', '.join(found)}. "
                f"Set {key} to one of them, or to null."
            )
        return dataset[name]


def _columns_of(rows: Dataset | IterableDataset, where: str) -> list[str]:
    """Names of the columns; a stream may know them from its first row only."""
    if rows.column_names is not None:
        return rows.column_names
    for row in rows:
        return list(row)
    raise DataError(f"{where}: no rows, the data set is empty.")


def _fetch(options: HubOptions, *, streaming: bool = False) -> Splitted:
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
                streaming=streaming,
                cache_dir=None if options.cache_dir is None else str(options.cache_dir),
            )
    # Not narrower: datasets lets errors of httpx, fsspec, pyarrow, pandas and its builders through,
    # and each means the same to a user: this data set cannot be had as asked.
    except Exception as error:
        raise DataError(_why_not(options, error)) from error
    if not isinstance(loaded, datasets.DatasetDict | datasets.IterableDatasetDict):
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
