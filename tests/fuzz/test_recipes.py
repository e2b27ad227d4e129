"""Whatever is done to a recipe, it loads and can be planned, or a ``ScplError`` says why not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from scpl_ds.cli import main
from scpl_ds.recipe import load_recipe, recipe_from_mapping, recipe_schema
from tests.support import tiny, tiny_lm
from tests.support.mutations import hunt, mutate_bytes, mutate_tree

RECIPES = Path(__file__).parents[2] / "recipes"
CASES = 2200
PLANNED = 0.1
"""Share of the recipes that load which are planned as well: cutting a model takes 0.1 s."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, dict[str, Any]]]:
    """The real recipes, as text and as data, over two small models of this machine."""
    folder = tmp_path_factory.mktemp("models")
    encoder = str(tiny.save_model(folder / "encoder"))
    language = str(tiny_lm.save(folder / "language"))
    found = []
    for path in sorted(RECIPES.rglob("*.yaml")):
        text = path.read_text()
        recipe = yaml.safe_load(text)
        name = recipe["model"]["name_or_path"]
        task = recipe["model"].get("task", "sequence-classification")
        mine = language if task == "causal-lm" else encoder
        text = text.replace(f"name_or_path: {name}", f"name_or_path: {mine}")
        assert mine in text
        found.append((text.encode(), yaml.safe_load(text)))
    assert len(found) >= 15
    return found


def every_key() -> tuple[str, ...]:
    """Every key that the JSON schema of recipes knows, at any depth."""
    found: set[str] = set()

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            found.update(node.get("properties", {}))
            for part in node.values():
                visit(part)
        elif isinstance(node, list):
            for part in node:
                visit(part)

    visit(recipe_schema())
    return tuple(sorted(found))


def as_text(rng: random.Random, tree: Any) -> tuple[str, bytes]:
    try:
        if rng.random() < 0.5:
            return ".json", json.dumps(tree).encode()
        return ".yaml", yaml.safe_dump(tree).encode()
    except (TypeError, ValueError, yaml.YAMLError, RecursionError):
        # A date in JSON, a surrogate in YAML.
        return ".json", json.dumps(tree, default=repr, skipkeys=True).encode()


def check(path: Path, *, plan: bool) -> None:
    """What every command does with a recipe before it trains."""
    recipe = load_recipe(path)
    again = recipe_from_mapping(yaml.safe_load(recipe.to_yaml()))
    assert again.fingerprint() == recipe.fingerprint()
    assert again.to_mapping() == recipe.to_mapping()
    if plan:
        assert main(["plan", str(path)]) in (0, 2)


@pytest.mark.timeout(1200)  # for a machine that does much else
def test_a_mutated_recipe_loads_or_says_what_is_wrong(
    bases: list[tuple[bytes, dict[str, Any]]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read when imported
    keys = every_key()

    def draw(rng: random.Random) -> tuple[str, Callable[[], None]]:
        text, tree = rng.choice(bases)
        if rng.random() < 0.7:
            what, changed = mutate_tree(rng, tree, keys=keys)
            suffix, content = as_text(rng, changed)
        else:
            what, content = mutate_bytes(rng, text)
            suffix = rng.choice((".yaml", ".json"))
        path = tmp_path / f"mine{suffix}"
        path.write_bytes(content)
        plan = rng.random() < PLANNED
        return what, lambda: check(path, plan=plan)

    outcomes = hunt("recipes", CASES, draw)
    capsys.readouterr()
    # A mutation that is always refused, or never, looks at one side only.
    total = outcomes.total()
    assert outcomes["success"] > total / 20 and outcomes["RecipeError"] > total / 5, outcomes
