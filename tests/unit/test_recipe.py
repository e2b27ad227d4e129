"""Loading recipes: overrides, files, round trips, fingerprints, world sizes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from scpl_ds.errors import RecipeError
from scpl_ds.recipe import (
    Recipe,
    check_world,
    load_recipe,
    recipe_from_ds_config,
    recipe_from_mapping,
)
from tests.support.recipes import GOOD, changed, write


class OwnSource:
    """A data source of a user's own, as far as a recipe looks at it."""

    class Options(pydantic.BaseModel, extra="forbid"):
        rows: int = 1


@pytest.fixture
def good_file(tmp_path: Path) -> Path:
    return write(tmp_path, json.dumps(GOOD), "mine.json")


def test_overrides_are_yaml_and_reach_list_items_by_name(tmp_path: Path):
    mapping = GOOD | {"trackers": ["console", {"name": "wandb", "project": "a"}]}
    path = write(tmp_path, json.dumps(mapping), "mine.json")
    recipe = load_recipe(
        path,
        [
            "scpl.stages=3",
            "deepspeed.optimizer.params.lr=1e-4",
            "scpl.partition=[[0, 2], [2, 4], [4, 6]]",
            "trackers.wandb.project=b",
            "trackers.0.progress=false",
            "train.resume_from_checkpoint=true",
            "--train.run_name=x=y",
        ],
    )
    assert recipe.scpl.stages == 3
    assert recipe.scpl.partition == ((0, 2), (2, 4), (4, 6))
    assert recipe.deepspeed.lr == 1e-4
    assert recipe.trackers[1].options.model_dump()["project"] == "b"
    assert recipe.trackers[0].options.model_dump()["progress"] is False
    assert recipe.train.resume_from_checkpoint is True
    assert recipe.name == "x=y"


def test_an_override_turns_a_bare_name_into_a_mapping(tmp_path: Path):
    mapping = GOOD | {"scpl": {"stages": 2, "objective": "supcon"}, "data": "demo"}
    path = write(tmp_path, json.dumps(mapping), "mine.json")
    recipe = load_recipe(path, ["scpl.objective.temperature=0.5", "data.max_length=7"])
    assert recipe.scpl.objective.options.model_dump()["temperature"] == 0.5
    assert recipe.data.options.model_dump()["max_length"] == 7


def test_an_override_of_save_steps_changes_the_strategy_of_the_file(tmp_path: Path):
    mapping = GOOD | {"train": {"save_strategy": "epoch", "eval_strategy": "no"}}
    path = write(tmp_path, json.dumps(mapping), "mine.json")
    recipe = load_recipe(path, ["train.save_steps=5"])
    assert (recipe.train.save_strategy, recipe.train.save_steps) == ("steps", 5)
    with pytest.raises(RecipeError, match="save_steps: has no effect with save_strategy: epoch"):
        load_recipe(path, ["train.save_steps=5", "train.save_strategy=epoch"])


def test_a_strategy_of_steps_alone_has_hugging_faces_steps():
    """They were required here, although the Trainer has defaults for them."""
    steps = {"eval_strategy": "steps", "save_strategy": "steps"}
    train = recipe_from_mapping(GOOD | {"train": steps | {"logging_steps": 7}}).train
    assert (train.eval_steps, train.save_steps) == (7, 500)
    assert recipe_from_mapping(GOOD | {"train": steps}).train.eval_steps == 10


def test_one_tracker_may_be_written_as_its_name(tmp_path: Path):
    path = write(tmp_path, json.dumps(GOOD | {"trackers": "wandb"}))
    assert [t.name for t in load_recipe(path).trackers] == ["wandb"]
    (tracker,) = load_recipe(path, ["trackers.wandb.mode=offline"]).trackers
    assert tracker.options.model_dump()["mode"] == "offline"
    assert [t.name for t in load_recipe(path, ["trackers=jsonl"]).trackers] == ["jsonl"]


def with_scheduler(kind: str, **train: object) -> Recipe:
    mapping = changed("deepspeed.scheduler", {"type": kind, "params": {"warmup_max_lr": 1e-4}})
    mapping["train"] |= train
    return recipe_from_mapping(mapping)


def test_a_constant_rate_with_warmup_is_what_warmup_lr_is():
    recipe = with_scheduler("WarmupLR", lr_scheduler_type="constant_with_warmup")
    assert recipe.deepspeed.scheduler is not None
    with pytest.raises(RecipeError, match=r"train\.lr_scheduler_type: deepspeed\.scheduler is set"):
        with_scheduler("WarmupLR", lr_scheduler_type="cosine")
    with pytest.raises(RecipeError, match=r"train\.lr_scheduler_type: deepspeed\.scheduler is set"):
        with_scheduler("WarmupDecayLR", lr_scheduler_type="constant_with_warmup")


def test_a_micro_batch_nobody_wrote_down_is_said_aloud(caplog: pytest.LogCaptureFixture):
    """``auto`` with a silent ``train`` was 8 in silence, and it changes what is trained."""
    key = "train_micro_batch_size_per_gpu"
    with caplog.at_level("WARNING"):
        assert recipe_from_mapping(changed(f"deepspeed.{key}", "auto")).deepspeed.batch(1)[0] == 8
    (record,) = caplog.records
    assert f"deepspeed.{key} is 'auto'" in record.getMessage()
    assert "Hugging Face's 8" in record.getMessage()
    caplog.clear()
    mapping = changed(f"deepspeed.{key}", "auto")
    mapping["train"]["per_device_train_batch_size"] = 8
    recipe_from_mapping(mapping)
    assert not caplog.records


def test_yaml_reading_1e_minus_4_as_text_and_no_as_false_is_mended(tmp_path: Path):
    text = (
        "model: {name_or_path: demo}\n"
        "scpl: {stages: 2, objective: {name: supcon, temperature: 1e-1}}\n"
        "deepspeed: {train_micro_batch_size_per_gpu: auto, "
        "optimizer: {type: AdamW, params: {eps: 1e-6}}}\n"
        "data: demo\n"
        "train: {learning_rate: 3e-5, eval_strategy: no, per_device_train_batch_size: 4}\n"
    )
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.train.learning_rate == 3e-5 == recipe.deepspeed.lr
    assert recipe.deepspeed.optimizer.params["eps"] == 1e-6
    assert recipe.scpl.objective.options.model_dump()["temperature"] == 0.1
    assert recipe.train.eval_strategy == "no"
    assert recipe.deepspeed.micro_batch_size == 4


def test_a_deepspeed_path_is_relative_to_the_recipe_and_can_be_overridden_inside(tmp_path: Path):
    folder = tmp_path / "configs"
    folder.mkdir()
    # Tabs, as editors write JSON.
    (folder / "ds.json").write_text('{\n\t"train_micro_batch_size_per_gpu": 6\n}\n')
    path = write(folder, json.dumps(GOOD | {"deepspeed": "ds.json"}), "mine.json")
    assert load_recipe(path).deepspeed.micro_batch_size == 6
    recipe = load_recipe(path, ["deepspeed.train_micro_batch_size_per_gpu=7"])
    assert recipe.deepspeed.micro_batch_size == 7
    other = write(tmp_path, '{"train_micro_batch_size_per_gpu": 9}', "other.json")
    assert load_recipe(path, [f"deepspeed={other}"]).deepspeed.micro_batch_size == 9


def test_the_run_folder_is_named_after_the_recipe_file(good_file: Path):
    recipe = load_recipe(good_file)
    assert recipe.output_dir == Path("runs/mine") and recipe.name == "mine"
    assert recipe.export_dir == Path("runs/mine/export")
    assert load_recipe(good_file, ["train.output_dir=out/a"]).name == "a"


def test_a_recipe_round_trips_through_yaml(tmp_path: Path):
    hub = {"name": "hf", "dataset": "a/b", "eval_split": None, "label_names": ["x", "y"]}
    mapping = changed("data", hub) | {"trackers": ["console", {"name": "wandb", "tags": ["t"]}]}
    mapping["scpl"]["partition"] = [[0, 3], [3, 6]]
    mapping["train"] |= {"save_steps": 7, "resume_from_checkpoint": "runs/x"}
    recipe = recipe_from_mapping(mapping)
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again == recipe
    assert again.data.options.model_dump()["eval_split"] is None
    assert again.to_yaml() == recipe.to_yaml()


def test_a_recipe_cannot_be_changed():
    recipe = recipe_from_mapping(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        recipe.scpl.stages = 3  # type: ignore[misc]


def test_the_mapping_given_is_left_alone():
    before = copy.deepcopy(GOOD)
    recipe = recipe_from_mapping(GOOD)
    assert recipe.deepspeed.resolve(2)["train_batch_size"] == 16
    assert before == GOOD


SAME = [
    "trackers=[]",
    "train.output_dir=elsewhere",
    "train.logging_steps=1",
    "train.save_steps=5",
    "train.profile=true",
    "scpl.pipeline_ranks=1",
    "scpl.max_in_flight=9",
    "scpl.transport=gloo",
    "scpl.objective.chunk_size=7",
    "train.learning_rate=5e-5",
    "deepspeed.steps_per_print=3",
    "deepspeed.gradient_accumulation_steps=1",
]
OTHER = [
    "train.seed=1",
    "train.num_train_epochs=2",
    "scpl.stages=3",
    "scpl.objective.temperature=0.3",
    "scpl.head.detach_features=true",
    "scpl.boundary_dtype=bf16",
    "deepspeed.optimizer.params.lr=1e-5",
    "train.gradient_accumulation_steps=2",
    "train.max_grad_norm=0.5",
    "data.max_length=32",
    "model.name_or_path=other",
    "train.lr_scheduler_type=cosine",
]


@pytest.mark.parametrize("override", SAME)
def test_the_fingerprint_ignores_what_does_not_change_the_numbers(good_file: Path, override: str):
    assert load_recipe(good_file, [override]).fingerprint() == load_recipe(good_file).fingerprint()


@pytest.mark.parametrize("override", OTHER)
def test_the_fingerprint_sees_what_changes_the_numbers(good_file: Path, override: str):
    assert load_recipe(good_file, [override]).fingerprint() != load_recipe(good_file).fingerprint()


def staged(stages: int, ranks: int | str = "auto") -> Recipe:
    mapping = copy.deepcopy(GOOD)
    mapping["scpl"] = {"stages": stages, "pipeline_ranks": ranks}
    return recipe_from_mapping(mapping)


@pytest.mark.parametrize(
    ("stages", "ranks", "world", "expected"),
    [
        (2, "auto", 1, (1, 1)),
        (2, "auto", 2, (2, 1)),
        (2, "auto", 4, (2, 2)),
        (4, "auto", 6, (3, 2)),
        (3, "auto", 4, (2, 2)),
        (3, "auto", 7, (1, 7)),
        (6, "auto", 4, (4, 1)),
        (4, 2, 8, (2, 4)),
        (4, 1, 3, (1, 3)),
    ],
)
def test_ranks_are_dealt_to_pipeline_first(
    stages: int, ranks: int | str, world: int, expected: tuple[int, int]
):
    assert check_world(staged(stages, ranks), world) == expected


@pytest.mark.parametrize(
    ("stages", "ranks", "world", "text"),
    [
        (
            6,
            6,
            4,
            "scpl.pipeline_ranks: 6 pipeline ranks x 1 dp rank need 6 ranks, but WORLD_SIZE is 4. "
            "Set scpl.pipeline_ranks: 4 (several stages share a rank), or launch 6 ranks.",
        ),
        (
            3,
            3,
            8,
            "scpl.pipeline_ranks: 3 pipeline ranks x 2 dp ranks need 6 ranks, but WORLD_SIZE is 8. "
            "Set scpl.pipeline_ranks: 2 (several stages share a rank), or launch 6 ranks.",
        ),
    ],
)
def test_a_world_that_does_not_fit_says_what_would(stages: int, ranks: int, world: int, text: str):
    with pytest.raises(RecipeError) as caught:
        check_world(staged(stages, ranks), world)
    assert text in str(caught.value)


def test_a_deepspeed_config_with_an_scpl_block_is_split():
    scpl, section = recipe_from_ds_config(
        {"scpl": {"stages": 3}, "train_micro_batch_size_per_gpu": 4}
    )
    assert scpl.stages == 3 and scpl.objective.name == "supcon"
    assert section.micro_batch_size == 4


def test_a_deepspeed_config_file_is_checked_as_strictly(tmp_path: Path):
    config = {"scpl": {"stges": 3}, "train_micro_batch_size_per_gpu": 4, "fp61": {}}
    path = write(tmp_path, json.dumps(config), "ds_config.json")
    with pytest.raises(RecipeError) as caught:
        recipe_from_ds_config(path)
    assert str(caught.value) == (
        f"3 problems in {path}:\n"
        "  scpl.stages: is required\n"
        "  scpl.stges: unknown key; did you mean 'stages'?\n"
        "  deepspeed.fp61: unknown key; did you mean 'fp16'?"
    )
    with pytest.raises(RecipeError, match="scpl: is required"):
        recipe_from_ds_config({"train_micro_batch_size_per_gpu": 4})


def test_a_class_of_the_users_own_brings_its_own_options(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "users_own", sys.modules[__name__])
    mapping = changed("data", {"name": "users_own:OwnSource", "rows": 3})
    assert recipe_from_mapping(mapping).data.options.model_dump()["rows"] == 3
    with pytest.raises(RecipeError, match=r"data\.row: unknown key; did you mean 'rows'"):
        recipe_from_mapping(changed("data", {"name": "users_own:OwnSource", "row": 3}))


def test_importing_the_recipe_needs_neither_torch_nor_transformers_nor_deepspeed():
    code = (
        "import sys, scpl_ds.recipe, scpl_ds.ds_config; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
