"""Every recipe of ``recipes/methods/`` trains on two ranks, scores, saves, resumes and exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from scpl_ds.early_exit import EarlyExitModel, curve
from scpl_ds.errors import CheckpointError, RecipeError
from scpl_ds.evaluation import evaluate_run
from scpl_ds.recipe import load_recipe, recipe_from_mapping
from scpl_ds.trainer import fit
from tests.support import tiny
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
CLASSIFY = ("associated", "dascpl", "deinforeg", "early_exit", "predsim")


def overrides(mapping: dict, folder: Path) -> list[str]:
    """A method's recipe on the tiny model and data."""
    data = mapping["data"]
    return [
        f"model.name_or_path={mapping['model']['name_or_path']}",
        f"data={json.dumps(data)}",
        "deepspeed.train_micro_batch_size_per_gpu=8",
        "deepspeed.optimizer.params.lr=3e-3",
        "train.max_steps=6",
        "train.logging_steps=2",
        "train.disable_tqdm=true",
        f"train.output_dir={folder / 'run'}",
        "trackers=[]",
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_method_is_a_line_or_two_of_the_recipe_apart(path: Path):
    text = path.read_text()
    assert f"recipes/methods/{path.name}" in text and re.search(r"^# Expect:", text, re.MULTILINE)
    raw = yaml.safe_load(text)
    common = yaml.safe_load((ROOT / "recipes" / "methods" / "supcon.yaml").read_text())
    for section in ("model", "deepspeed", "data", "train"):
        assert raw[section] == common[section], section
    own = set(raw["scpl"]) - {"stages", "sharding"}
    assert raw["scpl"]["stages"] == 2 and len(own) <= 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_method_trains_on_two_ranks_as_on_one(path: Path, tmp_path: Path):
    """The same numbers, the same checkpoint, an export that transformers reads."""
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        asked = overrides(tiny.make(folder), folder)

        def body(asked: list[str] = asked) -> None:
            recipe = load_recipe(path, asked)
            result = fit(recipe)
            assert result["steps"] == 6
            assert 0 <= result["eval_accuracy"] <= 1
            assert 0 <= result["stage_eval_accuracy"] <= 1
            export = Path(result["export_dir"])
            AutoModelForSequenceClassification.from_pretrained(export)

        run_ranks(ranks, body)
    exports = [load_all(tmp_path / str(ranks) / "run" / "export") for ranks in (1, 2)]
    end_to_end = path.stem in ("bp", "gpipe", "joint", "polish")
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if end_to_end else {"rtol": 0.0, "atol": 0.0}
    assert exports[0].keys() == exports[1].keys()
    for name, tensor in exports[0].items():
        torch.testing.assert_close(exports[1][name], tensor, **tolerance, msg=name)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", ["bp", "associated", "freeze", "early_exit"])
def test_a_stopped_run_of_a_method_goes_on_where_it_was(name: str, tmp_path: Path):
    """Six steps at once, or three, a checkpoint and three more: the same weights to the bit."""
    path = ROOT / "recipes" / "methods" / f"{name}.yaml"
    asked = [*overrides(tiny.make(tmp_path), tmp_path), "train.save_steps=3"]
    resumed = [
        f"train.resume_from_checkpoint={tmp_path / 'run' / 'checkpoint-3'}",
        f"train.output_dir={tmp_path / 'resumed'}",
    ]
    run_ranks(2, lambda: fit(load_recipe(path, asked)) and None)
    run_ranks(2, lambda: fit(load_recipe(path, [*asked, *resumed])) and None)
    first, second = (load_all(tmp_path / run / "export") for run in ("run", "resumed"))
    assert first
    for tensor_name, tensor in first.items():
        torch.testing.assert_close(second[tensor_name], tensor, rtol=0, atol=0, msg=tensor_name)


def trained(folder: Path, objective: object, *, stages: int = 3, **scpl: object) -> Path:
    folder.mkdir(exist_ok=True)
    mapping = tiny.make(folder)
    cuts = [[0, 2], [2, 3], [3, 4]]
    mapping["scpl"] |= {"stages": stages, "partition": cuts, "objective": objective, **scpl}
    mapping["train"] |= {"num_train_epochs": 2}
    recipe = recipe_from_mapping(mapping)
    fit(recipe)
    return folder / "run"


@pytest.mark.parametrize("name", CLASSIFY)
def test_samples_leave_early_where_a_local_head_is_sure(name: str, tmp_path: Path):
    def body() -> None:
        run = trained(tmp_path / "t", name)
        model = EarlyExitModel.from_pretrained(run / "export")
        plain = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
        ids = torch.randint(4, 40, (9, 8))
        mask = torch.ones_like(ids)
        mask[3:, 5:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        everything = model(**inputs)
        assert (everything.layers == 4).all()
        with torch.no_grad():
            if name != "associated":  # its answers are those of the codes
                torch.testing.assert_close(everything.logits, plain(**inputs).logits)
        at_once = model(**inputs, threshold=1e-6)
        assert (at_once.layers == 2).all()
        # What a sample gives does not depend on who leaves beside it.
        sure = at_once.logits.softmax(1).amax(1).sort().values
        between = float((sure[4] + sure[5]) / 2)
        some = model(**inputs, threshold=between)
        assert set(some.layers.tolist()) >= {2}
        for row, layers in enumerate(some.layers.tolist()):
            single = {key: value[row : row + 1] for key, value in inputs.items()}
            alone = model(**single, threshold=between)
            assert alone.layers.tolist() == [layers]
            torch.testing.assert_close(alone.logits[0], some.logits[row], rtol=1e-4, atol=1e-5)
        agree = model(**inputs, patience=1)
        assert set(agree.layers.tolist()) <= {3, 4}
        points = curve(model, [{**inputs, "labels": torch.zeros(9)}], thresholds=[1e-6, 1.0])
        assert [point.average_depth for point in points][:2] == [1.0, 0.5]

    run_ranks(1, body)


@pytest.mark.parametrize("name, freeze", [("early_exit", 0), ("early_exit", 1), ("associated", 0)])
def test_an_evaluation_says_what_leaving_early_costs(name: str, freeze: int, tmp_path: Path):
    def body() -> None:
        run = trained(tmp_path / "t", name, freeze_stages=freeze)
        from scpl_ds import checkpoint
        from scpl_ds.run_folder import open_run

        _, recipe = open_run(run, [])
        found = evaluate_run(
            recipe, checkpoint.resolve(run), exit_thresholds=[0.6, 0.99], exit_patiences=[1]
        )
        assert len(found["early_exit"]) == 4
        whole = found["early_exit"][0]
        assert whole["average_depth"] == 1.0 and whole["accuracy"] == found["val/accuracy"]
        assert "val/accuracy_after_layer_2" in found
        assert ("val/accuracy_after_layer_1" in found) == (freeze == 0)

    run_ranks(1, body)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"objective": "supcon"}, "'supcon' cannot classify"),
        ({"objective": ["supcon", "reconstruction"]}, "'sum' cannot classify"),
        ({"objective": "early_exit", "method": "bp"}, "no local head .*'bp'"),
        ({"objective": "early_exit", "lookahead": 1}, "no local head .*'lookahead': 1"),
    ],
)
def test_who_cannot_leave_early_is_told_before_anything_is_scored(
    keys: dict[str, Any], message: str, tmp_path: Path
):
    mapping = tiny.make(tmp_path)
    mapping["scpl"] |= keys
    with pytest.raises(RecipeError, match=message):
        evaluate_run(recipe_from_mapping(mapping), tmp_path, exit_thresholds=[0.9])


def test_heads_that_cannot_classify_let_nobody_leave(tmp_path: Path):
    def body() -> None:
        run = trained(tmp_path / "t", "supcon")
        with pytest.raises(RecipeError, match="cannot classify"):
            EarlyExitModel.from_pretrained(run / "export")
        (run / "export" / "scpl_heads.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no scpl_heads\.json"):
            EarlyExitModel.from_pretrained(run / "export")

    run_ranks(1, body)


def test_associated_learning_learns_what_its_codes_say(tmp_path: Path):
    """Its answers come through the decoders, on ranks as in one process."""
    accuracies = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        mapping = tiny.make(folder)
        mapping["scpl"] |= {"objective": "associated"}
        mapping["train"] |= {"num_train_epochs": 12}

        def body(mapping: dict = mapping, out: Path = folder / "found.json") -> None:
            result = fit(recipe_from_mapping(mapping))
            out.write_text(json.dumps(result))

        run_ranks(ranks, body)
        accuracies.append(json.loads((folder / "found.json").read_text())["stage_eval_accuracy"])
    assert accuracies[0] == accuracies[1]
    assert accuracies[0] > 0.8


def test_an_evaluation_with_diagnostics_says_what_each_stages_features_are_worth(tmp_path: Path):
    """On two ranks as on one, and nothing else changes."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        mapping = tiny.make(folder)
        mapping["train"] |= {"diagnostics": True}
        run_ranks(ranks, lambda mapping=mapping: fit(recipe_from_mapping(mapping)) and None)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found.append(next(row for row in reversed(rows) if "val/accuracy" in row))
    for stage in range(2):
        for name in ("nearest_class_accuracy", "feature_rank", "alignment", "uniformity"):
            key = f"stage{stage}/{name}"
            assert found[0][key] == pytest.approx(found[1][key], rel=1e-4), key


def test_a_local_loss_may_look_through_copies_of_the_next_layers(tmp_path: Path):
    """The same to the bit on two ranks; the copies are trained, saved and not exported."""
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        mapping = tiny.make(folder)
        mapping["scpl"] |= {"lookahead": 1}
        run_ranks(ranks, lambda mapping=mapping: fit(recipe_from_mapping(mapping)) and None)
    first, second = (load_all(tmp_path / str(r) / "run" / "export") for r in (1, 2))
    assert not any("ahead" in name for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=name)
    last = tmp_path / "1" / "run" / "checkpoint-8"
    saved = load_file(last / "stage-0.safetensors")
    ahead = {name: t for name, t in saved.items() if ".ahead." in name}
    assert any("encoder.layer.2." in name for name in ahead)
    untrained = load_file(tmp_path / "1" / "model" / "model.safetensors")
    moved = [
        name
        for name, tensor in ahead.items()
        if "encoder." in name
        and not torch.equal(tensor, untrained["encoder." + name.partition("encoder.")[2]])
    ]
    assert moved
    assert not (tmp_path / "1" / "run" / "export" / "scpl_heads.json").exists()
