"""What a recipe may say about methods, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from scpl_ds.errors import RecipeError
from scpl_ds.objectives.weighted_sum import WeightedSum
from scpl_ds.recipe import load_recipe, recipe_from_mapping
from tests.support.recipes import GOOD, changed, write

LIST = [{"name": "supcon", "temperature": 0.5}, {"name": "reconstruction", "weight": 0.1}]


def scpl(**keys: Any) -> dict[str, Any]:
    mapping = changed("scpl.sharding", "none")
    mapping["scpl"] |= keys
    return mapping


def test_a_list_of_objectives_is_their_weighted_sum_and_survives_a_round_trip():
    recipe = recipe_from_mapping(scpl(objective=LIST))
    again = recipe_from_mapping(recipe.to_mapping())
    assert again == recipe and again.fingerprint() == recipe.fingerprint()
    made = recipe.scpl.objective.create(hidden_size=8, num_labels=2)
    assert isinstance(made, WeightedSum)
    assert [choice.weight for choice in recipe.scpl.objective.options.parts] == [1.0, 0.1]


def test_a_weight_can_be_set_on_the_command_line(tmp_path):
    import yaml

    path = write(tmp_path, yaml.safe_dump(scpl(objective=LIST)))
    recipe = load_recipe(path, ["scpl.objective.reconstruction.weight=0.3"])
    assert recipe.scpl.objective.options.parts[1].weight == 0.3


@pytest.mark.parametrize(
    "objective, message",
    [
        ([], "parts"),
        ([{"name": "associated"}, {"name": "associated"}], "both make the codes"),
        ([{"name": "supcon", "weight": 0}], "greater than 0"),
        ([{"name": "supcom"}], "did you mean 'supcon'"),
        ([{"name": "supcon", "tau": 1}], "tau"),
        ({"name": "supcon", "weight": 2.0}, "weight"),
    ],
)
def test_what_is_wrong_with_an_objective_is_named(objective: Any, message: str):
    with pytest.raises(RecipeError, match=message):
        recipe_from_mapping(scpl(objective=objective))


@pytest.mark.parametrize(
    "keys, messages",
    [
        ({"method": "bp", "sharding": "ddp"}, ["scpl.sharding", "needs sharding: 'none'"]),
        ({"method": "bp", "boundary_dtype": "bf16"}, ["scpl.boundary_dtype"]),
        ({"method": "bp", "zero_stages": [0, 0]}, ["scpl.zero_stages"]),
        ({"method": "bp", "head": {"detach_features": True}}, ["head.detach_features", "false"]),
        ({"method": "joint", "head": {"detach_features": "both"}}, ["head.detach_features"]),
        ({"method": "bp", "polish": 0.1}, ["scpl.polish", "nothing to polish"]),
        ({"method": "joint", "freeze_stages": 1}, ["scpl.freeze_stages", "joint"]),
        ({"method": "joint", "objective": "associated"}, ["scpl.objective", "use early_exit"]),
        ({"schedule": "gpipe"}, ["scpl.schedule", "method: bp"]),
        ({"method": "bp", "schedule": "a.b:c"}, ["cannot run method: bp"]),
        ({"polish": 0.1, "sharding": "deepspeed"}, ["polish: 0.1 sends gradients"]),
        ({"polish": 1.0}, ["scpl.polish"]),
        ({"polish": 0.1, "freeze_stages": 1}, ["scpl.freeze_stages"]),
        ({"polish": 0.1, "objective": "associated"}, ["scpl.polish", "associated"]),
        ({"freeze_stages": 1, "objective": "associated"}, ["scpl.freeze_stages"]),
        ({"lookahead": 1, "objective": "associated"}, ["scpl.lookahead", "must be 0"]),
        ({"lookahead": 1, "objective": ["supcon", "reconstruction"]}, ["scpl.lookahead"]),
        ({"lookahead": 1, "method": "bp"}, ["scpl.lookahead", "no need"]),
        ({"freeze_stages": 2}, ["leaves none of 2 stages"]),
        ({"freeze_stages": -1}, ["scpl.freeze_stages"]),
        ({"method": "backprop"}, ["scpl.method"]),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_key(keys: dict, messages: list[str]):
    with pytest.raises(RecipeError) as caught:
        recipe_from_mapping(scpl(**keys))
    for message in messages:
        assert message in str(caught.value)


def test_where_the_last_stage_learns_from_follows_the_objective_unless_it_is_said():
    assert recipe_from_mapping(scpl()).scpl.detach_features is False
    assert recipe_from_mapping(scpl(objective="associated")).scpl.detach_features is True
    summed = recipe_from_mapping(scpl(objective=[{"name": "supcon"}, {"name": "associated"}]))
    assert summed.scpl.detach_features is True
    said = scpl(objective="associated", head={"detach_features": False})
    assert recipe_from_mapping(said).scpl.detach_features is False


def test_defaults_of_keys_that_older_recipes_lack_do_not_change_the_fingerprint():
    plain = recipe_from_mapping(GOOD)
    written = recipe_from_mapping(
        changed("scpl.head", {"detach_features": False})
        | {"scpl": {**GOOD["scpl"], "method": "scpl", "freeze_stages": 0, "polish": 0.0}}
    )
    assert written.fingerprint() == plain.fingerprint()
    codes = scpl(objective="associated")
    said = scpl(objective="associated", head={"detach_features": False})
    assert recipe_from_mapping(codes).fingerprint() != recipe_from_mapping(said).fingerprint()
    other = recipe_from_mapping(changed("scpl.freeze_stages", 1))
    assert other.fingerprint() != plain.fingerprint()


def test_which_stages_have_an_objective():
    def asked(**keys: Any) -> list[bool]:
        section = recipe_from_mapping(scpl(stages=3, **keys)).scpl
        return [section.has_objective(k) for k in range(3)]

    assert asked() == [True, True, False]
    assert asked(objective="associated") == [True, True, True]
    assert asked(freeze_stages=1) == [False, True, False]
    assert asked(method="bp") == [False, False, False]
    assert asked(method="joint", objective="early_exit") == [True, True, False]
