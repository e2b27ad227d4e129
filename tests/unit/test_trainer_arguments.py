"""Every field of transformers' ``TrainingArguments`` is honoured, or is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from scpl_ds.data.given import SOURCE
from scpl_ds.errors import RecipeError
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.trainer_arguments import mapping_of, problems_of_arguments, with_steps
from scpl_ds.trainer_fields import FIELDS, table
from tests.support.tiny import own_world

OF_OLDER_TRANSFORMERS = {"group_by_length", "warmup_ratio"}


@pytest.fixture(autouse=True)
def world():
    with own_world():
        yield


def recipe_of(scpl: Any = None, **given: Any) -> Recipe:
    args = TrainingArguments("run", **{"report_to": "none", **given})
    model, data = {"name_or_path": "demo"}, {"name": SOURCE}
    mapping = mapping_of(args, {"stages": 2} if scpl is None else scpl, model, data)
    return with_steps(recipe_from_mapping(mapping), args, total=100, epoch=10)


def test_no_field_of_the_installed_transformers_is_left_out():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(FIELDS) - names <= OF_OLDER_TRANSFORMERS
    assert names <= set(FIELDS)


def test_the_defaults_are_honoured_and_mean_what_they_mean_in_trainer():
    train, section = recipe_of().train, recipe_of().deepspeed
    assert (train.num_train_epochs, train.eval_strategy, train.save_steps) == (3.0, "no", 500)
    assert (train.logging_steps, train.lr_scheduler_type, train.export) == (500, "linear", False)
    assert (section.micro_batch_size, section.gradient_clipping, section.lr) == (8, 1.0, 5e-5)
    assert section.optimizer.params["weight_decay"] == 0.0
    assert recipe_of().scpl.sharding == "ddp"


REFUSED: dict[str, Any] = {
    "accelerator_config": {"split_batches": True},
    "auto_find_batch_size": True,
    "batch_eval_metrics": True,
    "debug": "underflow_overflow",
    "eval_delay": 3,
    "eval_do_concat_batches": False,
    "full_determinism": True,
    "ignore_data_skip": True,
    "include_for_metrics": ["inputs"],
    "include_num_input_tokens_seen": "all",
    "label_smoothing_factor": 0.1,
    "liger_kernel_config": {"rope": True},
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "neftune_noise_alpha": 5.0,
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
    "save_on_each_node": True,
    "save_only_model": True,
    "skip_memory_metrics": False,
    "torch_empty_cache_steps": 3,
    "use_liger_kernel": True,
}
CANNOT_BE_SET_HERE = {"bf16_full_eval", "fp16_full_eval", "parallelism_config"}
"""They need a GPU, or a device mesh, for TrainingArguments to take them."""


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_value_that_cannot_be_honoured_is_refused_by_name(name: str):
    args = TrainingArguments("run", report_to="none", **{name: REFUSED[name]})
    assert [problem.path for problem in problems_of_arguments(args)] == [name]


def test_every_refused_field_is_tried():
    kinds = {name for name, field in FIELDS.items() if field.kind == "refused"}
    assert kinds == set(REFUSED) | CANNOT_BE_SET_HERE


@pytest.mark.parametrize(
    "given, name",
    [
        ({"optim": "adafactor"}, "optim"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy"),
        ({"report_to": "comet_ml"}, "report_to"),
        ({"push_to_hub": True, "hub_model_id": "me/x"}, r"hub_strategy: 'every_save' cannot be"),
        (
            {"push_to_hub": True, "hub_strategy": "end", "hub_model_id": "a/b/c"},
            r"hub_model_id: push_to_hub: 'a/b/c' is no name of a repository.*hub_model_id='owner",
        ),
        ({"label_names": ["start_positions"]}, "label_names"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        (
            {"activation_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs",
        ),
    ],
)  # fmt: skip
def test_a_mapped_field_refuses_the_values_it_does_not_have(given: dict[str, Any], name: str):
    with pytest.raises(RecipeError, match=name):
        recipe_of(**given)


def test_all_problems_are_told_at_once():
    with pytest.raises(RecipeError, match="2 problems in TrainingArguments"):
        recipe_of(optim="adafactor", label_smoothing_factor=0.1)


def test_parts_of_all_steps_and_epochs_become_steps():
    train = recipe_of(
        eval_strategy="steps", eval_steps=0.25, save_steps=0.5, logging_strategy="epoch",
        warmup_steps=0.1,
    ).train  # fmt: skip
    assert (train.eval_steps, train.save_steps, train.logging_steps) == (25, 50, 10)
    assert (train.warmup_ratio, train.warmup_steps) == (0.1, None)
    assert recipe_of(logging_strategy="no").train.logging_steps == 100


def test_values_go_where_a_recipe_has_them():
    recipe = recipe_of(
        optim="sgd", bf16=True, use_cpu=True, seed=7, data_seed=8, gradient_accumulation_steps=4,
        max_grad_norm=0.5, report_to=["wandb"], train_sampling_strategy="group_by_length",
        ddp_timeout=77, eval_on_start=True, logging_first_step=True,
    )  # fmt: skip
    assert recipe.deepspeed.optimizer.type == "sgd"
    assert (recipe.deepspeed.autocast, recipe.deepspeed.precision) == ("bf16", "fp32")
    assert (recipe.train.seed, recipe.train.order_seed) == (7, 8)
    assert recipe.deepspeed.batch(1).accumulation == 4
    assert recipe.deepspeed.gradient_clipping == 0.5
    assert [tracker.name for tracker in recipe.trackers] == ["console", "wandb"]
    assert recipe.train.group_by_length and recipe.train.eval_on_start
    assert recipe.train.logging_first_step and recipe.scpl.timeout_s == 77


def test_a_ds_config_may_hold_scpl_and_its_auto_values_are_those_of_the_arguments(tmp_path: Path):
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "scpl": {"stages": 3, "objective": {"name": "supcon", "temperature": 0.2}},
    }
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    given = {"per_device_train_batch_size": 5, "learning_rate": 1e-3, "bf16": True, "use_cpu": True}
    for deepspeed in (config, str(path)):
        recipe = recipe_of({"stages": 2}, deepspeed=deepspeed, **given)
        assert (recipe.scpl.stages, recipe.scpl.objective.name) == (2, "supcon")
        assert recipe.scpl.sharding == "deepspeed"
        assert recipe.deepspeed.micro_batch_size == 5 and recipe.deepspeed.lr == 1e-3
        assert (recipe.deepspeed.zero_stage, recipe.deepspeed.precision) == (1, "bf16")
    assert recipe_of({}, deepspeed=config, **given).scpl.stages == 3


def test_a_ds_config_without_a_precision_takes_that_of_the_arguments():
    config: dict[str, Any] = {"zero_optimization": {"stage": 1}}
    given = {"bf16": True, "use_cpu": True}
    assert recipe_of(deepspeed=config, **given).deepspeed.precision == "bf16"
    assert recipe_of(deepspeed=config).deepspeed.precision == "fp32"
    own = {**config, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    section = recipe_of(deepspeed=own, **given).deepspeed
    assert (section.precision, section.autocast) == ("fp32", "bf16")


@pytest.mark.parametrize("block", [{"bf16": {"enabled": False}}, {"fp16": {"enabled": True}}])
def test_a_ds_config_of_another_precision_than_the_arguments_is_refused(block: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"bf16: True, but args\.deepspeed has"):
        recipe_of(deepspeed={"zero_optimization": {"stage": 1}, **block}, bf16=True, use_cpu=True)


def test_without_stages_the_message_says_where_to_give_them():
    with pytest.raises(RecipeError, match="stages"):
        recipe_of({})


def test_the_page_has_the_table():
    page = Path(__file__).parents[2] / "docs" / "from-trainer.md"
    assert table() in page.read_text(encoding="utf-8")
