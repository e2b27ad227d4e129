"""Keys of a recipe for the hub, and for what the trackers show."""

from __future__ import annotations

from typing import Any

import pytest

from scpl_ds.errors import RecipeError
from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.trainer_end import destination
from tests.support.recipes import changed


def recipe_with(**train: Any) -> Any:
    return recipe_from_mapping(changed("train", {**changed("train.seed", 1)["train"], **train}))


@pytest.mark.parametrize(
    "keys", [{"push_to_hub": "me/x"}, {"push_to_hub": True, "hub_model_id": "me/x"}]
)
def test_a_name_for_short_says_where_and_that(keys: dict[str, Any]):
    recipe = recipe_with(**keys, hub_revision="v1", hub_private_repo=True)
    assert destination(recipe) == ("me/x", True, "v1")
    again = recipe_from_mapping(recipe.to_mapping())
    assert again == recipe and destination(again) == destination(recipe)


def test_without_a_name_it_is_the_runs_own_and_without_the_key_there_is_none():
    assert destination(recipe_with(push_to_hub=True, run_name="mine")) == ("mine", None, None)
    assert destination(recipe_with()) is None


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"push_to_hub": "a/b/c"}, "train.hub_model_id: 'a/b/c' is no name of a repository"),
        (
            {"push_to_hub": True, "run_name": "my run: 3"},
            "train.push_to_hub: true means a repository with the name of the run (train.run_name), "
            "and 'my run: 3' is no name of a repository: Repo id must use alphanumeric",
        ),
        ({"push_to_hub": True, "output_dir": "runs/a--b"}, "(train.output_dir), and 'a--b' is no"),
        ({"push_to_hub": True, "output_dir": "."}, "Name one: train.push_to_hub: owner/name"),
        ({"push_to_hub": "a/b", "hub_model_id": "a/c"}, "keep one of the two"),
        ({"hub_revision": "v1"}, "train.hub_revision: has no effect without push_to_hub"),
        ({"push_to_hub": True, "export": False}, "train.push_to_hub: uploads the export"),
        ({"hub_token": "hf_secret0123456789"}, "set HF_TOKEN in the environment"),
        ({"sample_predictions": -1}, "train.sample_predictions: must be greater than or equal"),
        ({"sample_predictions": 3, "eval_strategy": "no"}, "are of evaluations"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], told: str):
    with pytest.raises(RecipeError) as caught:
        recipe_with(**keys)
    assert told in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_run_of_any_name_may_be_uploaded_under_another_or_not_at_all():
    assert recipe_with(run_name="my run: 3").name == "my run: 3"
    assert recipe_with(run_name="my run: 3", push_to_hub="me/x").name == "my run: 3"


def test_a_language_model_has_no_classes_to_show():
    recipe = changed("model.task", "causal-lm")
    recipe["train"] = {**recipe.get("train", {}), "sample_predictions": 3}
    with pytest.raises(RecipeError, match=r"shows train\.sample_prompts"):
        recipe_from_mapping(recipe)


def test_none_of_it_is_another_run():
    """The fingerprint says what a run may go on from."""
    plain, more = recipe_with(), recipe_with(push_to_hub="me/x", sample_predictions=3)
    assert plain.fingerprint() == more.fingerprint()
