"""`scpl-ds eval` on other data than the run's, and from another folder than the run was started
in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import scpl_ds.data.prepared
from scpl_ds.cli import main
from tests.support import tiny
from tests.support.tiny import put

NAMES = ("sad", "cheerful", "never seen")  # not in the order of the alphabet


def named(rows: list[tuple[str, int]]) -> list[tuple[str, str]]:
    return [(text, NAMES[label]) for text, label in rows]


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with tiny.own_world():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in the folder of its model and data, all named by relative paths."""
    folder = tmp_path_factory.mktemp("home")
    recipe = tiny.make(folder)
    tiny.write_csv(folder / "train.csv", named(tiny.sentences(64, seed=1)))
    tiny.write_csv(folder / "dev.csv", named(tiny.sentences(21, seed=2)))
    changes = {
        "model.name_or_path": "model",
        "model.num_labels": 4,
        "data.train_file": "train.csv",
        "data.eval_file": "dev.csv",
        "data.label_names": list(NAMES),
        "train.output_dir": str(folder / "run"),
        "train.num_train_epochs": 2,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert tiny.train(put(recipe, changes)) == 0
    return folder / "run"


def scored(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    code = main(["eval", *argv])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


def test_a_run_is_scored_from_another_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Relative paths of model and data were looked up in the folder of the caller."""
    result = json.loads((run / "result.json").read_text())
    monkeypatch.chdir(tmp_path)
    assert scored([str(run)], capsys)["val/accuracy"] == result["stage_eval_accuracy"]


def test_eval_does_not_tokenise_what_was_trained_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes = []
    tokenize = scpl_ds.data.prepared.tokenize

    def spy(split: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(split))
        return tokenize(split, *args, **kwargs)

    monkeypatch.setattr(scpl_ds.data.prepared, "tokenize", spy)
    scored([str(run)], capsys)
    assert sizes == [21]


@pytest.mark.parametrize("names", ["in the recipe", "in the run's config"])
def test_new_data_are_scored_without_the_training_file_under_the_runs_class_ids(
    names: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It said "has no training split"; the classes of a file alone would be other ids."""
    cheerful = [row for row in named(tiny.sentences(40, seed=3)) if row[1] == "cheerful"]
    other = tiny.write_csv(tmp_path / "other.csv", cheerful)
    argv = [str(run), "data.train_file=null", f"data.eval_file={other}"]
    if names == "in the run's config":
        argv.append("data.label_names=null")
    logits = tmp_path / "logits.safetensors"
    said = scored([*argv, "--logits", str(logits)], capsys)
    assert said["samples"] == len(cheerful)
    labels = load_file(logits)["labels"]
    torch.testing.assert_close(labels, torch.ones(len(cheerful), dtype=torch.int64), rtol=0, atol=0)


def test_a_label_the_run_does_not_know_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tiny.write_csv(tmp_path / "other.csv", [("good", "cheerfull")])
    argv = ["eval", str(run), "data.train_file=null", f"data.eval_file={other}"]
    assert main([*argv, "data.label_names=null"]) == 2
    assert "'cheerfull' is not among the 4 label names sad, cheerful" in capsys.readouterr().err


def test_eval_says_what_it_does_and_nothing_of_a_head_that_it_loads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It said that the classifier is drawn from the seed, and then loaded the trained one."""
    capsys.readouterr()
    again = f"train.output_dir={tmp_path / 'run'}"
    assert main(["train", str(run / "recipe.yaml"), again, "train.max_steps=1"]) == 0
    assert "classifier.weight: drawn from the seed" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert "drawn from the seed" not in said
    for words in ("reading the evaluation data", "in 2 stages", "scoring 21 samples"):
        assert words in said
