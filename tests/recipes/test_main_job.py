"""The main job on a tiny model in one process: fit, score, export, interrupt, resume."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import scpl_ds
from scpl_ds.checkpoint_files import MANIFEST, seal, write_text
from scpl_ds.cli import main
from scpl_ds.recipe import recipe_from_mapping
from tests.support.tiny import DROP, Bomb, assert_same, put, recipe_for, tensors_of, train
from tests.support.wandb_file import read_wandb_file

Recipe = dict[str, Any]
BOMB = "tests.support.tiny:Bomb"
STEPS = 8


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[float, ...]]:
    names = ("step", "stage0/loss", "stage1/loss", "head/loss", "lr")
    return [tuple(row[n] for n in names) for row in rows_of(run) if "lr" in row]


# -- what a run leaves ---------------------------------------------------------------------


def test_result_json_says_how_good_the_export_is_and_where_it_lies(run: Path):
    result = json.loads((run / "result.json").read_text())
    promised = {
        "eval_accuracy", "majority_accuracy", "stages", "ranks", "samples_per_s", "train_seconds",
        "export_dir",
    }  # fmt: skip
    assert promised <= result.keys()
    assert (result["stages"], result["ranks"], result["steps"]) == (2, 1, STEPS)
    assert result["majority_accuracy"] == 11 / 21  # labels 0, 1, 0 ... of 21 rows
    assert result["eval_accuracy"] == result["stage_eval_accuracy"]
    assert Path(result["export_dir"]) == run / "export"
    assert result["train_seconds"] > 0 and result["samples_per_s"] > 0


def test_metrics_jsonl_has_every_stages_loss_at_every_logging_step(run: Path):
    rows = rows_of(run)
    steps = [row for row in rows if "stage0/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    wanted = {
        "stage0/loss", "stage1/loss", "head/loss", "stage0/grad_norm", "stage1/grad_norm",
        "stage0/valid_anchor_fraction", "perf/tokens_per_s", "perf/samples_per_s",
        "perf/peak_memory_gib", "lr", "epoch",
    }  # fmt: skip
    assert all(wanted <= row.keys() for row in steps)
    assert steps[-1]["epoch"] == 1.0 and steps[-1]["lr"] < steps[0]["lr"]
    scored = [row for row in rows if "val/accuracy" in row]
    assert [row["step"] for row in scored] == [STEPS]


def test_a_run_keeps_recipe_plan_log_and_the_latest_checkpoints(run: Path):
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-6", "checkpoint-8"]
    assert (run / "latest").read_text().split()[0] == "checkpoint-8"
    assert "2 stages" in (run / "plan.txt").read_text()
    assert "saved checkpoint-8" in (run / "logs" / "rank0.log").read_text()
    assert (run / "recipe.yaml").is_file()
    left = [path.name for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]
    assert left == []


def test_weights_and_biases_gets_one_offline_run_with_every_stage(deepspeed_run: Path):
    (file,) = deepspeed_run.glob("wandb/offline-run-*/run-*.wandb")
    tracked = read_wandb_file(file)
    steps = [row["train/global_step"] for row in tracked.history if "stage0/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert all("stage1/loss" in row for row in tracked.history if "stage0/loss" in row)
    assert tracked.config["recipe"]["scpl"]["stages"] == 2
    assert [row["layers"] for row in tracked.config["partition"]]
    assert (
        tracked.summary["eval_accuracy"]
        == json.loads((deepspeed_run / "result.json").read_text())["eval_accuracy"]
    )
    assert (tracked.exit_code, tracked.name) == (0, "my run")


# -- the export ----------------------------------------------------------------------------

READER = """
import csv, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model_dir, data, out = sys.argv[1:]
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForSequenceClassification.from_pretrained(model_dir).eval()
texts = [row["text"] for row in csv.DictReader(open(data))]
logits = []
with torch.inference_mode():
    for at in range(0, len(texts), 8):
        batch = tokenizer(texts[at : at + 8], truncation=True, max_length=16, padding=True,
                          return_tensors="pt")
        logits.append(model(**batch).logits)
assert not [name for name in sys.modules if name.split(".")[0] == "scpl_ds"]
save_file({"logits": torch.cat(logits)}, out)
"""


def test_the_export_gives_the_logits_of_eval_without_scpl_ds(
    run: Path, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    assert main(["eval", str(run), "--logits", str(ours)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["samples"] == 21
    result = json.loads((run / "result.json").read_text())
    assert said["val/accuracy"] == result["eval_accuracy"]
    argv = [str(run / "export"), base["data"]["eval_file"], str(theirs)]
    subprocess.run(
        [sys.executable, "-c", READER, *argv],
        check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wanted, found = load_file(ours), load_file(theirs)
    assert wanted["logits"].shape == (21, 2)
    torch.testing.assert_close(found["logits"], wanted["logits"], rtol=0, atol=0)
    accuracy = float((found["logits"].argmax(-1) == wanted["labels"]).float().mean())
    assert accuracy == pytest.approx(said["val/accuracy"])


def test_export_of_a_run_equals_the_runs_own_export(run: Path, tmp_path: Path):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    own = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == own
    assert main(["export", str(run), str(tmp_path / "out")]) == 0, "an earlier export is replaced"


def files_but_card(folder: Path) -> dict[str, bytes]:
    """The model card has the scores of a run, which a checkpoint alone does not know."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.pop("README.md")
    return found


def test_a_checkpoint_copied_alone_is_exported(run: Path, tmp_path: Path):
    """It was refused for want of a recipe.yaml beside it; its manifest says the task."""
    alone = shutil.copytree(run / f"checkpoint-{STEPS}", tmp_path / "elsewhere")
    assert main(["export", str(alone), str(tmp_path / "out")]) == 0
    assert files_but_card(tmp_path / "out") == files_but_card(run / "export")


def test_a_checkpoint_that_knows_no_recipe_is_exported_when_the_task_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """What engine.save_checkpoint(model_files=) leaves; without --task the message names it."""
    alone = shutil.copytree(run / f"checkpoint-{STEPS}", tmp_path / "api" / f"checkpoint-{STEPS}")
    manifest = json.loads((alone / MANIFEST).read_text())
    scpl = manifest["client_state"]["recipe"].pop("scpl")
    manifest["client_state"] = {"recipe": {"scpl": scpl}}  # which says what the local heads are
    write_text(alone / MANIFEST, seal(manifest))
    out = tmp_path / "out"
    assert main(["export", str(alone), str(out)]) == 2
    assert "--task" in capsys.readouterr().err
    assert main(["export", str(alone), str(out), "--task", "sequence-classification"]) == 0
    assert files_but_card(out) == files_but_card(run / "export")


def test_the_name_of_a_run_folder_may_hold_anything(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It is passed on as an override, and `#` begins a comment in YAML."""
    folder = tmp_path / "my run #1: {a}"
    shutil.copytree(plain_run, folder)
    assert main(["eval", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(folder / "checkpoint-8")
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0


def test_fit_can_be_called_twice_in_one_program(base: Recipe, tmp_path: Path):
    results = []
    for name in ("first", "second"):
        changes = {"train.max_steps": 1}
        recipe = recipe_for(base, "deepspeed", tmp_path / name, **changes)
        results.append(scpl_ds.fit(recipe_from_mapping(recipe)))
    for key in ("eval_accuracy", "steps", "majority_accuracy"):
        assert results[0][key] == results[1][key]
    found, wanted = (tensors_of(tmp_path / n / "checkpoint-1") for n in ("first", "second"))
    assert_same(found, wanted)


def test_export_refuses_to_replace_a_folder_of_something_else(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It used to move any folder aside and delete it: `scpl-ds export RUN ~` took the home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    assert main(["export", str(run), str(tmp_path / "home")]) == 2
    assert "holds thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


def test_eval_scores_the_checkpoint_it_is_given(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", str(run / "checkpoint-6")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["checkpoint"] == str(run / "checkpoint-6")
    assert said["samples"] == 21 and 0 <= said["val/accuracy"] <= 1


def test_eval_refuses_a_logits_file_in_no_folder_before_it_scores(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", str(run), "--logits", str(tmp_path / "no" / "logits")]) == 2
    assert "does not exist" in capsys.readouterr().err


# -- going on ------------------------------------------------------------------------------


def test_a_run_interrupted_twice_ends_with_the_parameters_of_one_that_was_not(
    run: Path, base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_for(base, run.name, tmp_path / "run", trackers=[{"name": BOMB}])
    monkeypatch.setattr(Bomb, "at", 5)
    assert train(recipe) == 130
    assert not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(Bomb, "at", 7)
    assert train(recipe, "train.resume_from_checkpoint=true") == 130
    monkeypatch.setattr(Bomb, "at", 0)
    assert train(recipe, "train.resume_from_checkpoint=true") == 0
    found, wanted = tmp_path / "run" / "checkpoint-8", run / "checkpoint-8"
    assert_same(tensors_of(found), tensors_of(wanted))
    assert losses(tmp_path / "run") == losses(run)
    assert not (tmp_path / "run.1").exists()


def test_an_earlier_run_in_the_same_folder_is_kept_aside(base: Recipe, tmp_path: Path):
    recipe = recipe_for(base, "none", tmp_path / "run", **{"train.max_steps": 1})
    assert train(recipe, "train.seed=1") == 0
    first = tensors_of(tmp_path / "run" / "checkpoint-1")
    assert train(recipe, "train.seed=2") == 0
    assert_same(tensors_of(tmp_path / "run.1" / "checkpoint-1"), first)
    assert train(recipe, "train.seed=1") == 0
    assert_same(tensors_of(tmp_path / "run" / "checkpoint-1"), first)
    assert (tmp_path / "run.2" / "result.json").is_file()


def test_going_back_to_an_early_checkpoint_keeps_what_latest_names(base: Recipe, tmp_path: Path):
    """`save_total_limit` counted by step number and removed the checkpoint just written."""
    recipe = recipe_for(base, "none", tmp_path / "run", **{"train.save_total_limit": 1})
    recipe = put(recipe, {"train.save_steps": 1, "train.max_steps": 3})
    assert train(recipe, "train.save_total_limit=3") == 0
    early = tmp_path / "run" / "checkpoint-1"
    changes = [f"train.resume_from_checkpoint={early}", "train.max_steps=2"]
    assert train(recipe, *changes) == 0
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "run" / "latest").read_text().split()[0] == "checkpoint-2"


def test_resuming_a_finished_run_gives_its_result_again(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = recipe_for(base, "none", tmp_path / "run", **{"train.max_steps": 2})
    assert train(recipe) == 0
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    before = tensors_of(tmp_path / "run" / "checkpoint-2")
    assert train(recipe, "train.resume_from_checkpoint=true") == 0
    assert "Nothing is left to train: the checkpoint is at step 2 of 2" in capsys.readouterr().err
    again = json.loads((tmp_path / "run" / "result.json").read_text())
    for key in ("eval_accuracy", "stage_eval_accuracy", "steps"):
        assert again[key] == first[key]
    assert_same(tensors_of(tmp_path / "run" / "checkpoint-2"), before)


def test_resume_under_more_stages_keeps_the_head_whose_boundary_stays(
    run: Path, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """4 layers: a cut into [0, 2) [2, 4) goes on as four stages; with lr 0 nothing moves."""
    changes = {
        "scpl.stages": 4,
        "deepspeed.optimizer.params": {"lr": 0.0, "weight_decay": 0.0},
        "train.resume_from_checkpoint": str(run / "checkpoint-8"),
        "train.num_train_epochs": DROP,
        "train.max_steps": 9,
    }
    recipe = recipe_for(base, run.name, tmp_path / "more", **changes)
    capsys.readouterr()
    assert train(recipe) == 0
    said = capsys.readouterr().err
    assert "has no local head for layer 0" in said and "has no local head for layer 2" in said
    assert "no local head for layer 1" not in said
    before = {n.split("/", 1)[1]: t for n, t in tensors_of(run / "checkpoint-8").items()}
    after = {
        n.split("/", 1)[1]: t for n, t in tensors_of(tmp_path / "more" / "checkpoint-9").items()
    }
    heads = [name for name in after if name.startswith("scpl_heads.")]
    assert {name.split(".")[1] for name in heads} == {"layer_0", "layer_1", "layer_2"}
    kept = {n: t for n, t in before.items() if "exp_avg" not in n}
    assert_same({n: after[n] for n in kept}, kept)


# -- settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True, "both"])
@pytest.mark.parametrize("sharding", ["none", "deepspeed"])
def test_every_way_to_train_the_last_stage_trains_and_exports(
    sharding: str, detach: bool | str, base: Recipe, tmp_path: Path
):
    changes = {"scpl.head.detach_features": detach, "train.max_steps": 2}
    assert train(recipe_for(base, sharding, tmp_path / "run", **changes)) == 0
    row = losses(tmp_path / "run")[-1]
    _, _, last_stage, head, _ = row
    assert (last_stage == head) is (detach is False)
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    names = {name.partition("/")[2] for name in tensors_of(tmp_path / "run" / "checkpoint-2")}
    assert any(name.startswith("scpl_heads.layer_3.") for name in names) is (detach is not False)


def test_without_an_evaluation_split_the_run_says_so_once_and_goes_on(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    changes = {"data.eval_file": DROP, "train.max_steps": 2}
    recipe = recipe_for(base, "none", tmp_path / "run", **changes)
    assert train(recipe) == 0
    said = capsys.readouterr().err
    assert said.count("has no evaluation split") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval_accuracy"] is None and result["majority_accuracy"] is None
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "has no evaluation split to score" in capsys.readouterr().err


def test_a_run_learns(base: Recipe, tmp_path: Path):
    """Two words tell the class: a few epochs are enough, whatever the random start."""
    changes = {
        "deepspeed.optimizer.params.lr": 1e-2,
        "train.num_train_epochs": 6,
        "train.save_steps": DROP,
        "train.eval_strategy": False,
    }
    assert train(recipe_for(base, "none", tmp_path / "run", **changes)) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["eval_accuracy"] >= 0.8
