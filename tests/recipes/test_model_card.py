"""The model card of an export, and its way to the hub: read back with huggingface_hub."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from scpl_ds import export_hub
from scpl_ds.checkpoint import Reader
from scpl_ds.cli import main
from scpl_ds.export_card import write_card
from tests.support.tiny import recipe_for, train
from tests.unit.test_export_hub import Hub

Recipe = dict[str, Any]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """A hub that takes everything."""
    monkeypatch.setattr(export_hub, "HfApi", Hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    return Hub


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_the_card_has_the_scores_of_result_json_and_the_name_of_what_was_scored(run: Path):
    card, result = card_of(run / "export"), json.loads((run / "result.json").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert data.base_model is None and data.license is None and data.language is None
    assert {"scpl", "local-learning"} <= set(data.tags)
    (scored,) = data.eval_results
    assert (scored.metric_type, scored.dataset_name) == ("accuracy", "dev.csv")
    assert scored.metric_value == pytest.approx(result["eval_accuracy"], abs=1e-6)
    assert f"| accuracy | {result['eval_accuracy']:.4g} |" in card.text
    assert f"| {result['majority_accuracy']:.4g} |" in card.text and "21 samples" in card.text


def test_the_card_names_no_folder_of_this_machine(run: Path):
    assert not re.search(r"(?<![:/\w])/\w+/\w+", card_of(run / "export").text)


def test_the_cards_own_lines_load_the_model(run: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = re.findall(r"```python\n(.*?)```", card_of(run / "export").text, re.DOTALL)
    monkeypatch.chdir(run / "export")
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["model"].config.num_labels == 2 and len(names["tokenizer"]) > 10


def test_stages_and_settings_are_those_of_the_run(run: Path):
    text = card_of(run / "export").text
    assert "| 0 | 0-1 |" in text and "| 1 | 2-3 |" in text
    assert "| local objective | `supcon` |" in text and "| optimizer steps | `8` |" in text
    assert "A training rule of their own".lower() in text.lower()


def test_a_checkpoint_without_a_score_of_its_own_gets_a_card_without_one(run: Path, tmp_path: Path):
    assert main(["export", str(run / "checkpoint-6"), str(tmp_path / "out")]) == 0
    card = card_of(tmp_path / "out")
    assert card.data.eval_results is None and "## Scores" not in card.text
    assert "| optimizer steps | `6` |" in card.text


def test_a_result_that_is_no_longer_to_be_read_gives_no_score(plain_run: Path, tmp_path: Path):
    copy = shutil.copytree(plain_run, tmp_path / "run")
    (copy / "result.json").write_text("{")
    assert main(["export", str(copy), str(tmp_path / "out")]) == 0
    assert card_of(tmp_path / "out").data.eval_results is None


def changed(run: Path, **sections: Any) -> dict[str, Any]:
    """A run's manifest, with other values in its recipe."""
    manifest = json.loads(json.dumps(Reader(run / "checkpoint-8").manifest))
    for name, values in sections.items():
        manifest["client_state"]["recipe"][name] |= values
    return manifest


def test_names_of_the_hub_become_metadata(plain_run: Path, tmp_path: Path):
    data = {"name": "hf", "dataset": "nyu-mll/glue", "config": "mrpc", "eval_split": "validation"}
    manifest = changed(plain_run, model={"name_or_path": "bert-base-uncased"}, data=data)
    write_card(tmp_path, manifest, "sequence-classification", {"eval_accuracy": 0.75})
    found = card_of(tmp_path).data
    assert (found.base_model, found.datasets) == ("bert-base-uncased", ["nyu-mll/glue"])
    (scored,) = found.eval_results
    assert (scored.dataset_type, scored.dataset_config, scored.dataset_split) == (
        "nyu-mll/glue", "mrpc", "validation",
    )  # fmt: skip


def test_an_adapter_is_of_peft_and_a_language_model_has_its_perplexity(
    plain_run: Path, tmp_path: Path
):
    (tmp_path / "adapter_config.json").write_text("{}")
    manifest = changed(plain_run, model={"name_or_path": "demo-lm", "lora": {"r": 8, "alpha": 16}})
    write_card(tmp_path, manifest, "causal-lm", {"eval_perplexity": 12.5})
    card = card_of(tmp_path)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.eval_results[0].metric_type == "perplexity"
    assert "PeftModel.from_pretrained" in card.text and "`8, 16`" in card.text


def test_precision_and_sizes_are_what_was_trained_with_whoever_said_so(
    plain_run: Path, tmp_path: Path
):
    section = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "bf16": {"enabled": "auto"},
        "torch_autocast": {"enabled": True, "dtype": "float16"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
    }  # fmt: skip
    manifest = changed(plain_run, train={"per_device_train_batch_size": 4, "learning_rate": 0.002})
    manifest["client_state"]["recipe"]["deepspeed"] = section
    write_card(tmp_path, manifest, "sequence-classification")
    text = card_of(tmp_path).text
    assert "`auto`" not in text
    for setting, value in {
        "precision": "fp32", "autocast": "fp16", "micro-batch size": 4, "learning rate": 0.002,
        "gradient accumulation": 1,
    }.items():  # fmt: skip
        assert f"| {setting} | `{value}` |" in text


def test_backpropagation_is_not_called_a_local_rule(plain_run: Path, tmp_path: Path):
    write_card(tmp_path, changed(plain_run, scpl={"method": "bp"}), "sequence-classification")
    text = card_of(tmp_path).text
    assert "backpropagation through all stages" in text and "## Limits" not in text
    assert "| method | `backpropagation` |" in text and "supcon" not in text


def test_one_stage_is_called_backpropagation_and_polish_is_named(plain_run: Path, tmp_path: Path):
    write_card(tmp_path, changed(plain_run, scpl={"stages": 1}), "sequence-classification")
    text = card_of(tmp_path).text
    assert "this is backpropagation" in text and "learned from a loss of its own" not in text
    write_card(tmp_path, changed(plain_run, scpl={"polish": 0.25}), "sequence-classification")
    assert "The last part of the steps (0.25 of them)" in card_of(tmp_path).text


def test_a_checkpoint_without_a_recipe_gets_what_is_known(plain_run: Path, tmp_path: Path):
    manifest = {**Reader(plain_run / "checkpoint-8").manifest, "client_state": {"note": 1}}
    write_card(tmp_path, manifest, "sequence-classification", {"eval_accuracy": 0.5})
    card = card_of(tmp_path)
    assert card.data.eval_results is None and "| 0 | 0-1 |" in card.text
    assert "## Training" not in card.text and "## Versions" not in card.text


# -- to the hub ----------------------------------------------------------------------------


def test_a_run_uploads_its_export_with_the_finished_card(hub: Any, base: Recipe, tmp_path: Path):
    more = {"train.max_steps": 1, "train.push_to_hub": "me/mine", "train.hub_private_repo": True}
    assert train(recipe_for(base, "none", tmp_path / "run", **more)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["hub_url"] == "https://huggingface.co/me/mine/commit/1"
    (repo, upload) = hub.last.asked
    assert repo[1] == ("me/mine", {"private": True, "exist_ok": True})
    assert upload[1]["folder_path"] == tmp_path / "run" / "export"
    assert {"README.md", "config.json", "model.safetensors"} <= upload[1]["files"]
    assert card_of(tmp_path / "run" / "export").data.eval_results


def test_a_run_whose_upload_fails_keeps_its_result_and_ends_well(
    base: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    more = {"train.max_steps": 1, "train.push_to_hub": "me/mine"}
    assert train(recipe_for(base, "none", tmp_path / "run", **more)) == 0
    said = capsys.readouterr().err
    assert said.count("HF_HUB_OFFLINE is set") == 2, "before the training, and after it"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["hub_url"] is None and result["eval_accuracy"] is not None
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_the_command_uploads_and_says_where(
    hub: Any, plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    argv = ["export", str(plain_run), str(out), "--push-to-hub", "me/mine", "--revision", "v1"]
    assert main(argv) == 0
    assert capsys.readouterr().out.split() == [str(out), "https://huggingface.co/me/mine/commit/1"]
    assert [what for what, _ in hub.last.asked] == ["repo", "branch", "upload"]


def test_the_command_fails_when_the_upload_does_and_the_export_is_there(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    assert main(["export", str(plain_run), str(out), "--push-to-hub", "me/mine"]) == 1
    assert "`hf upload me/mine" in capsys.readouterr().err
    assert card_of(out).data.eval_results


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--push-to-hub", "a/b/c"], "is no name of a repository"),
        (["--private"], "add it"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], told: str,
):  # fmt: skip
    try:
        code = main(["export", str(plain_run), str(tmp_path / "out"), *more])
    except SystemExit as left:
        code = left.code
    assert code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
