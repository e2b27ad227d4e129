"""The hub source, run against local folders: the same code path, no network."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from scpl_ds.data.hf import HubOptions, HubSource
from scpl_ds.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "train.csv").write_text("sentence,label\ngood,1\nbad,0\n")
    (folder / "validation.csv").write_text("sentence,label\nfine,1\n")
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A data set with hub features: named classes, an unlabelled test split."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    splits = {
        "train": {"sentence": ["good", "bad"], "label": [1, 0]},
        "test": {"sentence": ["what"], "label": [-1]},
    }
    path = tmp_path / "saved"
    datasets.DatasetDict(
        {k: datasets.Dataset.from_dict(v, features=features) for k, v in splits.items()}
    ).save_to_disk(path)
    return path


def hub(dataset: Path | str, tmp_path: Path, **options) -> HubSource:
    given = {"text_column": "sentence", "cache_dir": tmp_path / "cache", **options}
    return HubSource(HubOptions(dataset=str(dataset), **given), name="hf")


def test_a_folder_of_files_loads_like_a_hub_data_set(folder: Path, tmp_path: Path):
    splits = hub(folder, tmp_path).load()
    assert splits.train is not None and splits.eval is not None
    assert list(splits.train["text"]) == ["good", "bad"]
    assert list(splits.eval["label"]) == [1]


def test_class_names_of_the_data_set_are_kept(saved: Path, tmp_path: Path):
    splits = hub(saved, tmp_path, eval_split=None).load()
    assert splits.label_names == ("neg", "pos") and splits.eval is None


def test_an_unlabelled_split_is_refused(saved: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"split 'test', row 0: label is -1"):
        hub(saved, tmp_path, eval_split="test").load()


def test_a_missing_split_names_the_splits_there_are(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"no split 'valid'; did.* Splits found: train, validation"):
        hub(folder, tmp_path, eval_split="valid").load()


def test_a_missing_column_names_the_columns_there_are(folder: Path, tmp_path: Path):
    with pytest.raises(
        DataError, match=r"split 'train': data\.text_column: 'txt'.*sentence, label"
    ):
        hub(folder, tmp_path, text_column="txt").load()


def test_a_data_set_that_cannot_be_had_is_named_with_cause_and_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"'no/such' config 'c' cannot be .*HF_HUB_OFFLINE=1.*csv"):
        hub("no/such", tmp_path, config="c").load()
