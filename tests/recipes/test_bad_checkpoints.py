"""A checkpoint that a run cannot go on from is refused by `scpl-ds` before anything is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import RobertaConfig

from scpl_ds.checkpoint_files import seal
from scpl_ds.cli import main
from tests.support import tiny
from tests.support.tiny import bert_config, recipe_for, train

Recipe = dict[str, Any]
OF_BERT = bert_config().to_dict()
ROBERTA = {name: OF_BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")} | {
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 34,
    "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (bert_config(num_hidden_layers=3), ("is of another model: it has 4 layers, this one 3",)),
        (bert_config(num_hidden_layers=5), ("it has 4 layers, this one 5",)),
        (
            bert_config(intermediate_size=48),
            ("is of another model", "[32, 16] there and [48, 16] here"),
        ),
        (RobertaConfig(**ROBERTA), ("is of another model: it has no 'roberta.",)),
    ],
    ids=["fewer-layers", "more-layers", "wider", "other-architecture"],
)
def test_a_checkpoint_of_another_model_is_refused(
    plain_run: Path, base: Recipe, other: Any, words: tuple[str, ...],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    tiny.save_model(tmp_path / "model", other)
    changes = {
        "model.name_or_path": str(tmp_path / "model"),
        "train.resume_from_checkpoint": str(plain_run / "checkpoint-8"),
    }
    recipe = recipe_for(base, "none", tmp_path / "run", **changes)
    capsys.readouterr()
    assert train(recipe) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.max_train_samples": 32}, ("num_samples 64, this run's 32",)),
        ({"train.seed": 1}, ("seed 42, this run's 1",)),
    ],
    ids=["other-data", "other-seed"],
)
def test_an_order_of_samples_that_cannot_be_continued_is_refused(
    plain_run: Path, base: Recipe, changes: dict[str, Any], words: tuple[str, ...],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    path = str(plain_run / "checkpoint-8")
    recipe = recipe_for(base, "none", tmp_path / "run", **changes)
    assert train(recipe, f"train.resume_from_checkpoint={path}") == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garbage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\x80\x81")


def other_format(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(seal({**manifest, "format": 99}))


def truncated(folder: Path) -> None:
    path = folder / "stage-1.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def a_file_less(folder: Path) -> None:
    (folder / "stage-0.optimizer.safetensors").unlink()


def same_size_but_damaged(folder: Path) -> None:
    path = folder / "stage-1.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def one_bit_of_a_weight(folder: Path) -> None:
    path = folder / "stage-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)


def one_bit_of_the_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 8', '"step": 9'))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (no_manifest, "is not a complete checkpoint (no manifest.json): the save was interrupted"),
        (garbage_manifest, "manifest.json is damaged"),
        (other_format, "has checkpoint format 99"),
        (truncated, "stage-1.safetensors has"),
        (a_file_less, "stage-0.optimizer.safetensors has no bytes"),
        (same_size_but_damaged, "stage-1.safetensors is damaged: its checksum is"),
        (one_bit_of_a_weight, "stage-0.safetensors is damaged: its checksum is"),
        (one_bit_of_the_manifest, "manifest.json is damaged: its checksum is not"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_last_good_one_named(
    plain_run: Path, base: Recipe, damage: Callable[[Path], None], word: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(plain_run, copy)
    damage(copy / "checkpoint-8")
    recipe = recipe_for(base, "none", tmp_path / "run")
    capsys.readouterr()
    assert train(recipe, f"train.resume_from_checkpoint={copy / 'checkpoint-8'}") == 2
    said = capsys.readouterr().err
    assert word in said and said.count("scpl-ds: CheckpointError") == 1
    assert f"Resume with train.resume_from_checkpoint={copy / 'checkpoint-6'}" in said
    assert not (tmp_path / "run").exists()
    bad = str(copy / "checkpoint-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    for argv in (["eval", bad], ["export", bad, str(tmp_path / "x")]):
        if damage is not a_file_less or argv[0] == "eval":
            assert main(argv) == 2
            assert word in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "x or half of it"


def test_a_checkpoint_that_does_not_exist_is_refused_by_its_name(
    plain_run: Path, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = recipe_for(base, "none", tmp_path / "run")
    assert train(recipe, f"train.resume_from_checkpoint={plain_run / 'checkpoint-7'}") == 2
    said = capsys.readouterr().err
    assert "There is no checkpoint" in said and "checkpoint-7: no such folder" in said
    assert f"Latest complete checkpoint: {plain_run / 'checkpoint-8'}" in said


def test_resume_true_goes_on_from_the_last_complete_checkpoint_and_says_so(
    plain_run: Path, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(plain_run, tmp_path / "run")
    no_manifest(tmp_path / "run" / "checkpoint-8")
    recipe = recipe_for(base, "none", tmp_path / "run")
    assert train(recipe, "train.resume_from_checkpoint=true") == 0
    said = capsys.readouterr().err
    assert "checkpoint-8 is missing or incomplete" in said and "checkpoint-6 is the last" in said
    tiny.assert_same(
        tiny.tensors_of(tmp_path / "run" / "checkpoint-8"),
        tiny.tensors_of(plain_run / "checkpoint-8"),
    )
