"""The hub source, run against local folders: the same code path, no network."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from scpl_ds.data.files import FileOptions, FileSource
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


def classes(names: list[str], tmp_path: Path, **columns: list[int]) -> Path:
    """A data set whose ``label`` is a ``ClassLabel`` of ``names``; ids by split."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    )
    path = tmp_path / "classes"
    datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"sentence": [f"{split} text {i}" for i in range(len(ids))], "label": ids},
                features=features,
            )
            for split, ids in columns.items()
        }
    ).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["1", "0"], [0, 1, 0]),  # came out inverted
        (["1", "2", "3"], [1, 2, 1]),  # came out shifted by one
        (["1", "2", "3", "4", "5"], [0, 1, 2, 3, 4]),  # were refused: "label '0' is not among"
    ],
)
def test_ids_of_a_class_label_stay_ids_when_their_names_are_numbers(
    names: list[str], ids: list[int], tmp_path: Path
):
    """The ids of a ``ClassLabel`` were looked up among its names, so labels changed in silence."""
    splits = hub(classes(names, tmp_path, train=ids), tmp_path, eval_split=None).load()
    assert splits.train is not None
    assert list(splits.train["label"]) == ids
    assert splits.label_names == tuple(names)


def test_an_id_beyond_the_class_names_is_refused(tmp_path: Path):
    path = classes(["a", "b"], tmp_path, train=[0, 1])
    source = hub(path, tmp_path, eval_split=None, label_names=("a",))
    with pytest.raises(DataError, match=r"split 'train', row 1: label 1 \('b'\).*label_names"):
        source.load()


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        (("1", "0"), [1, 0, 1]),  # other names for the ids 0 and 1
        (("pos", "neg"), [0, 1, 0]),  # the same names in another order
        (("bad", "good"), [1, 0, 1]),
    ],
)
def test_label_names_of_a_class_label_rename_or_reorder_its_classes(
    given: tuple[str, str], labels: list[int], tmp_path: Path
):
    path = classes(["neg", "pos"], tmp_path, train=[1, 0, 1])
    splits = hub(path, tmp_path, eval_split=None, label_names=given).load()
    assert splits.train is not None
    assert list(splits.train["label"]) == labels and splits.label_names == given


def test_label_names_that_contradict_the_class_names_are_refused(tmp_path: Path):
    path = classes(["neg", "neutral", "pos"], tmp_path, train=[0, 1, 2])
    names = ("neutral", "bad", "good")
    with pytest.raises(DataError, match=r"data\.label_names: .*'neutral' is class 1.*neg, neutral"):
        hub(path, tmp_path, eval_split=None, label_names=names).load()


def test_two_splits_with_different_class_names_are_refused(tmp_path: Path):
    """Ids were compared as they are: evaluation counted 'pos' as 'neg'."""
    for split, names in (("train", ["neg", "pos"]), ("dev", ["pos", "neg"])):
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        )
        rows = {"text": [f"{split} a", f"{split} b"], "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    files = {"train_file": tmp_path / "train.parquet", "eval_file": tmp_path / "dev.parquet"}
    source = FileSource(FileOptions(**files), name="parquet")
    with pytest.raises(DataError, match=r"dev.parquet has the classes pos, neg, but .*neg, pos"):
        source.load()
