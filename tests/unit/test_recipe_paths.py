"""Paths in a recipe: ``~`` is the home folder; data and models are found from every folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scpl_ds.recipe import load_recipe, recipe_from_mapping
from tests.support.recipes import GOOD, changed, write

HUB = {"name": "hf", "dataset": "reviews"}
FILES = {"name": "csv", "train_file": "data/train.csv", "eval_file": "~/dev.csv"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the working folder is ``work`` in it."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.mark.parametrize("key", ["output_dir", "export_dir", "resume_from_checkpoint"])
def test_a_tilde_in_train_is_the_home_folder(key: str, home: Path):
    """``train.output_dir=~/x`` made a folder called ``~``."""
    train = recipe_from_mapping(changed(f"train.{key}", "~/x")).train
    assert getattr(train, key) == home / "x"


@pytest.mark.parametrize("key", ["name_or_path", "tokenizer_name_or_path"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/m", "m"),
        ("./m", "work/m"),
        ("m", "work/m"),
        ("org/other", None),
        ("other", None),
        ("demo", None),
        ("demo-lm", None),
    ],
)
def test_a_model_folder_is_kept_as_an_absolute_path_and_a_hub_name_as_a_name(
    key: str, written: str, meant: str | None, home: Path
):
    """``scpl-ds eval`` looked for ``./m`` in the folder it was called in."""
    for folder in ("work/m", "work/demo", "work/demo-lm"):
        (home / folder).mkdir()
    model = recipe_from_mapping(changed(f"model.{key}", written)).model
    assert getattr(model, key) == (written if meant is None else str(home / meant))


def test_data_files_are_kept_as_absolute_paths(home: Path, tmp_path: Path):
    recipe = recipe_from_mapping(changed("data", FILES))
    written = recipe.to_mapping()["data"]
    assert written["train_file"] == str(home / "work/data/train.csv")
    assert written["eval_file"] == str(home / "dev.csv")
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_a_local_data_set_is_kept_as_an_absolute_path(home: Path):
    assert recipe_from_mapping(changed("data", HUB)).to_mapping()["data"]["dataset"] == "reviews"
    (home / "work/reviews").mkdir()
    kept = recipe_from_mapping(changed("data", HUB | {"cache_dir": "~/c"})).to_mapping()["data"]
    assert kept["dataset"] == str(home / "work/reviews")
    assert kept["cache_dir"] == str(home / "c")


def test_a_deepspeed_file_may_lie_in_the_home_folder(home: Path):
    write(home, json.dumps(GOOD["deepspeed"] | {"train_micro_batch_size_per_gpu": 5}), "ds.json")
    path = write(home / "work", json.dumps(GOOD | {"deepspeed": "~/ds.json"}))
    assert load_recipe(path).deepspeed.micro_batch_size == 5
