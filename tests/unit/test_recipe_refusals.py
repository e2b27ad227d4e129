"""Recipes that cannot run are refused before anything starts, all problems at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.errors import RecipeError
from scpl_ds.recipe import load_recipe, recipe_from_mapping
from tests.support.recipes import GOOD, changed, write

BAD: list[tuple[str, Any, str]] = [
    # what, value, the whole line it must give
    ("scpl.stage", 3, "scpl.stage: unknown key; did you mean 'stages'?"),
    ("modle", {}, "modle: unknown key; did you mean 'model'?"),
    ("scpl.learning_rate", 1e-4, "scpl.learning_rate: unknown key; it belongs in"),
    ("train.temperature", 1, "train.temperature: unknown key; it belongs in 'scpl.objective."),
    ("train.zero_optimization", {}, "it belongs in 'deepspeed.zero_optimization'"),
    ("scpl.head.detach_feature", 1, "unknown key; did you mean 'detach_features'?"),
    ("scpl.head.detach_features", "yes", "must be False, True or 'both', got 'yes'"),
    ("scpl.objective.temprature", 1, "scpl.objective.temprature: unknown key; did you mean 'temp"),
    ("scpl.objective.temperature", -1, "scpl.objective.temperature: must be greater than 0, got"),
    ("scpl.objective", "supcom", "scpl.objective.name: unknown objective 'supcom'; did you mean"),
    ("scpl.objective", 3, "scpl.objective: must be a name or a mapping with a name, got 3"),
    ("scpl.objective", {"temperature": 1}, "scpl.objective.name: is required, one of supcon"),
    (
        "scpl.objective",
        "json:JSONDecoder",
        "has no pydantic model `Options`, so it is no objective",
    ),
    ("scpl.stages", 0, "scpl.stages: must be greater than or equal to 1, got 0"),
    ("scpl.stages", "two", "scpl.stages: must be a valid integer"),
    ("scpl.stages", True, "scpl.stages: must be a number, got True"),
    ("scpl.stages", None, "scpl.stages: is required"),
    ("scpl.pipeline_ranks", 3, "scpl.pipeline_ranks: 3 is more than stages: 2"),
    ("scpl.pipeline_ranks", "all", "must be 'auto' or a whole number of at least 1, got 'all'"),
    ("scpl.partition", "flop", "scpl.partition: unknown method 'flop'; did you mean 'flops'?"),
    ("scpl.partition", [[0, 3], [4, 6]], "scpl.partition: [4, 6] must start at layer 3"),
    ("scpl.partition", [[0, 3], [3, 3]], "[3, 3] holds no layer"),
    ("scpl.partition", [[0, 6]], "scpl.partition: has 1 ranges, but stages is 2"),
    ("scpl.partition", [3, 6], "must be a list of [start, end] layer ranges"),
    ("scpl.sharding", "deepspeeed", "unknown sharding 'deepspeeed'; did you mean 'deepspeed'?"),
    ("scpl.schedule", "1f1b", "scpl.schedule: 1f1b is an order of backpropagation"),
    ("scpl.schedule", "2f2b", "scpl.schedule: unknown schedule '2f2b'"),
    ("scpl.timeout_s", 0, "scpl.timeout_s: must be greater than 0, got 0"),
    ("model.task", "causal", "got 'causal'; did you mean 'causal-lm'?"),
    ("model.name_or_path", "", "model.name_or_path: String should have at least 1 character"),
    ("model.lora", {"alfa": 8}, "model.lora.alfa: unknown key; did you mean 'alpha'?"),
    ("model.lora", {"alpha": 8, "lora_alpha": 8}, "lora_alpha: is the same as alpha"),
    ("model.lora", {"target_modules": "q_proj"}, "must be a list of names, or all-linear, got"),
    ("model.trust_remote_code", True, "model.trust_remote_code: code from a model's repository is"),
    ("model", None, "model: is required"),
    ("model", "bert", "model: must be a mapping, got 'bert'"),
    ("data", None, "data: is required"),
    ("data.name", "cvs", "data.name: unknown data 'cvs'; did you mean 'csv'?"),
    ("data.max_lenght", 8, "data.max_lenght: unknown key; did you mean 'max_length'?"),
    ("data.name", "no.such.module:X", "data.name: cannot import 'no.such.module:X'"),
    ("trackers", [{"name": "wandbb"}], "trackers.0.name: unknown tracker 'wandbb'; did you mean"),
    ("trackers", [{"name": "console", "x": 1}], "trackers.0.x: unknown key"),
    ("trackers", "wandbb", "trackers.0.name: unknown tracker 'wandbb'; did you mean 'wandb'?"),
    ("trackers", 3, "trackers: must be a valid tuple, got 3"),
    ("train.eval_strategy", "stps", "got 'stps'; did you mean 'steps'?"),
    ("train.num_train_epochs", float("nan"), "train.num_train_epochs: must be a finite number"),
    ("train.max_steps", 0, "train.max_steps: 0 steps train nothing"),
    ("train.resume_from_checkpoint", 3, "true, false, auto or the folder of a checkpoint, got 3"),
    ("train.learning_rate", 1e-3, "train.learning_rate: is 0.001, but deepspeed.optimizer.params."),
    (
        "train.per_device_train_batch_size",
        16,
        "is 16, but deepspeed.train_micro_batch_size_per_gpu",
    ),
    ("train.lr", 1, "train.lr: unknown key; it belongs in 'train.learning_rate'"),
    ("deepspeed", None, "deepspeed: is required"),
    ("deepspeed", 3, "deepspeed: must be a mapping or the path of a file, got 3"),
    ("deepspeed", "gone.json", "gone.json does not exist"),
]


@pytest.mark.parametrize(("path", "value", "text"), BAD, ids=[f"{p}={v}" for p, v, _ in BAD])
def test_a_bad_value_is_refused_with_its_path(path: str, value: Any, text: str):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(changed(path, value))
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 problem in the recipe:"
    assert len(lines) == 2 and lines[1].startswith("  ") and text in lines[1]


def test_all_problems_are_listed_at_once_as_the_style_guide_shows(tmp_path: Path):
    mapping = copy.deepcopy(GOOD)
    mapping["deepspeed"]["optimizer"]["params"]["learning_rate"] = 1e-4
    mapping["scpl"]["objective"]["temperature"] = -1
    mapping["train"]["epochs"] = 3
    path = write(tmp_path, json.dumps(mapping), "mine.json")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"3 problems in {path}:\n"
        "  scpl.objective.temperature: must be greater than 0, got -1\n"
        "  train.epochs: unknown key; it belongs in 'train.num_train_epochs'\n"
        "  deepspeed.optimizer.params.learning_rate: unknown key; did you mean 'lr'?"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; start from a file in recipes/"),
        ("# only a comment\n", "is empty"),
        ("- 1\n- 2\n", "must hold a mapping of sections, got [1, 2]"),
        ("scpl: {stages: 2\n", "is not valid YAML"),
        ("model: {a: 1}\nscpl: {stages: 2, stages: 3}\n", "key 'stages' is written twice"),
        ("model: {}\nmodel: {}\n", "(line 2, column 1)"),
        ("scpl: !!python/object:os.system {}\n", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, text: str, message: str):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scpl.stages", "override 'scpl.stages': expected key=value"),
        ("=3", "expected key=value"),
        ("scpl..stages=3", "expected key=value"),
        ("scpl.stages=[3", "scpl.stages: '[3' is not valid YAML"),
        ("scpl.stages.x=1", "'scpl.stages' is 2, not a mapping"),
        ("trackers.wandb.mode=offline", "'trackers.wandb' is nothing, not a mapping"),
        ("trackers.7=console", "the list has no item '7'"),
        ("scpl.stags=3", "scpl.stags: unknown key; did you mean 'stages'?"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str):
    mapping = GOOD | {"trackers": ["console"]}
    path = write(tmp_path, json.dumps(mapping), "mine.json")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "path, value, text",
    [
        ("scpl.sharding", "fsdp", "needs scpl.sharding: deepspeed, found fsdp; remove the key"),
        ("train.save_async", True, "cannot be written in the background; remove it or train."),
    ],
)
def test_deepspeed_files_are_refused_where_they_cannot_be(path: str, value: Any, text: str):
    asked = changed("train.save_deepspeed_files", True)
    assert recipe_from_mapping(asked).train.save_deepspeed_files
    asked[path.split(".")[0]][path.split(".")[1]] = value
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(asked)
    assert f"train.save_deepspeed_files: {text}" in str(caught.value)
