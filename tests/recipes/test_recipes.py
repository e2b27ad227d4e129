"""Every recipe in ``recipes/`` loads and says how to run it; generated files are current."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scpl_ds.recipe import load_recipe, recipe_schema
from scpl_ds.recipe_docs import build_page

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_loads(path: Path):
    recipe = load_recipe(path)
    assert recipe.output_dir == Path("runs") / path.stem


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_says_how_to_run_it_what_it_needs_and_what_to_expect(path: Path):
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header is not None
    for word in ("Run:", "Needs:", "Expect:"):
        assert re.search(rf"^# {word}\s+\S", header.group(), re.MULTILINE), word
    assert "# yaml-language-server: $schema=recipe.schema.json" in header.group()


@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "quickstart"], ids=by_name)
def test_the_name_of_a_recipe_says_model_data_and_stages(path: Path):
    stages = re.fullmatch(r"[a-z0-9]+_[a-z0-9]+_(\d+)stage(_[a-z0-9]+)?", path.stem)
    assert stages is not None
    assert load_recipe(path).scpl.stages == int(stages.group(1))


def test_the_committed_schema_is_current():
    committed = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text())
    assert committed == recipe_schema(), (
        "run: python -m scpl_ds.recipe_docs recipes/recipe.schema.json"
    )


def test_the_reference_page_is_current():
    assert (ROOT / "docs" / "recipe.md").read_text() == build_page(), (
        "run: python -m scpl_ds.recipe_docs docs/recipe.md"
    )


def test_every_key_has_a_description():
    def check(schema: dict[str, Any], path: str) -> None:
        for key, prop in schema.get("properties", {}).items():
            assert "description" in prop or "$ref" in prop or key == "name", f"{path}.{key}"

    schema = recipe_schema()
    check(schema, "recipe")
    for name in ("ModelSection", "ScplSection", "TrainSection", "HeadSection"):
        check(schema["$defs"][name], name)
    for choice in ("ObjectiveChoice", "DataChoice", "TrackerChoice"):
        variants = schema["$defs"][choice]["anyOf"]
        for variant in [v for v in variants if "enum" in v.get("properties", {}).get("name", {})]:
            check(variant, f"{choice} {variant['properties']['name']}")


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_only_uses_keys_of_the_schema(path: Path):
    """An editor with the schema shows no error in our own recipes."""
    schema = recipe_schema()
    raw = yaml.safe_load(path.read_text())
    for section, value in raw.items():
        prop = schema["properties"][section]
        if section == "deepspeed":
            assert set(value) <= set(prop["anyOf"][1]["properties"])
        elif section not in ("trackers", "data"):
            ref = prop.get("$ref") or prop["allOf"][0]["$ref"]
            assert set(value) <= set(schema["$defs"][ref.rpartition("/")[2]]["properties"])
