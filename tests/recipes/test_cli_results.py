"""What ``train`` and ``generate`` end with: words on a terminal, JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.cli import main
from tests.support import tiny, tiny_lm
from tests.support.tiny import put

PROMPTS = ("the cat", "a dog")


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a small language model."""
    folder = tmp_path_factory.mktemp("speaker")
    for name, times in (("train", 60), ("eval", 6)):
        text = "the cat sat on the mat\na dog ran to the red house\n" * times
        (folder / f"{name}.txt").write_text(text)
    recipe = {
        "model": {"name_or_path": str(tiny_lm.save(folder / "model")), "task": "causal-lm"},
        "scpl": {"stages": 2, "sharding": "none"},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 3.0e-3}},
        },
        "data": {
            "name": "text", "train": str(folder / "train.txt"), "eval": str(folder / "eval.txt"),
            "max_length": 24, "document": "line",
        },
        "train": {"output_dir": str(folder / "run"), "max_steps": 4, "disable_tqdm": True},
        "trackers": [],
    }  # fmt: skip
    assert tiny.train(recipe) == 0
    return folder / "run"


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def test_generate_writes_the_text_behind_the_prompt_or_json_if_asked(
    speaker: Path, capsys: pytest.CaptureFixture[str]
):
    """It used to write JSON to everybody."""
    argv = ["generate", str(speaker), "--max-new-tokens", "6"]
    argv += [f"--prompt={prompt}" for prompt in PROMPTS]
    found = [json.loads(line) for line in said(capsys, *argv, "--json").splitlines()]
    assert [each["prompt"] for each in found] == list(PROMPTS)
    assert said(capsys, *argv) == "\n\n".join(p["prompt"] + p["text"] for p in found) + "\n"
    chat = said(capsys, *argv, "--chat")
    assert chat.startswith("> the cat\n") and "\n\n> a dog\n" in chat


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_train_ends_with_words_on_a_terminal_and_with_json_elsewhere(
    base: dict[str, Any],
    tmp_path: Path,
    more: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "a run"
    recipe = put(base, {"train.output_dir": str(run), "train.max_steps": 2})
    path = tiny.write_recipe(tmp_path / "recipe.yaml", put(recipe, {"train.save_steps": 2}))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    found = said(capsys, "train", str(path), *more)
    result = json.loads((run / "result.json").read_text())
    if more:
        assert json.loads(found) == result
        return
    for words in (
        f"Accuracy   {result['eval_accuracy']:.1%} of the exported model; "
        f"{result['majority_accuracy']:.1%} for the most frequent class alone",
        "Trained    2 steps in", "2 stages on 1 rank", f"Export     {result['export_dir']}",
        f"Next       scpl-ds report '{run}'", f"scpl-ds eval '{run}'", "result.json (--json",
    ):  # fmt: skip
        assert words in found
    assert "{" not in found and len(found.splitlines()) < 12


def test_a_language_model_s_words_have_its_perplexity(speaker: Path):
    from scpl_ds.cli_results import result_in_words

    result = json.loads((speaker / "result.json").read_text())
    words = result_in_words(result)
    assert f"Perplexity {result['eval_perplexity']:.4g} of the exported model" in words
    assert f"scpl-ds generate {speaker}" in words
    stopped = {"stopped": "SIGTERM on rank 0", "steps": 3, "checkpoint": "x", "run_dir": "y"}
    assert "by SIGTERM on rank 0 after step 3" in result_in_words(stopped)
