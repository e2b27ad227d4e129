"""The sweep and the saved view that launch/ has: as W&B's own code reads them, without sending."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from scpl_ds.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SWEEP = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())


def drawn() -> dict[str, Any]:
    """A point of the sweep, as the service would send it."""
    return {
        name: asked["values"][-1] if "values" in asked else asked["max"]
        for name, asked in SWEEP["parameters"].items()
    }


def command_of(point: dict[str, Any]) -> list[str]:
    """As ``wandb agent`` puts it together (wandb_agent.py, ``_command_run``)."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    args = {name: {"value": value} for name, value in point.items()}
    made = utils.create_sweep_command_args({"args": args})
    macros = {**made, "env": ["/usr/bin/env"], "program": [SWEEP["program"]]}
    command: list[str] = []
    for word in utils.create_sweep_command(list(SWEEP["command"])):
        is_macro = word.startswith("${") and word.endswith("}")
        command += macros[word[2:-1]] if is_macro else [word]
    return command


def test_the_agents_command_trains_the_point_in_a_folder_of_its_own(tmp_path: Path):
    """The real shell, with a launcher that only says what it was given."""
    point = drawn()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "deepspeed.sh").write_text('printf "%s\\n" "$@"\n')
    said = subprocess.run(
        command_of(point), cwd=tmp_path, env={**os.environ, "WANDB_RUN_ID": "abc123"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    recipe_file, *overrides = said.stdout.splitlines()
    recipe = load_recipe(ROOT / recipe_file, overrides)
    assert recipe.output_dir == Path("runs/sweep/abc123") and recipe.name == "abc123"
    assert recipe.deepspeed.lr == point["deepspeed.optimizer.params.lr"]
    assert recipe.scpl.stages == point["scpl.stages"]
    assert recipe.scpl.objective.options.temperature == point["scpl.objective.temperature"]
    assert recipe.train.seed == point["train.seed"]
    (wandb,) = [each for each in recipe.trackers if each.name == "wandb"]
    assert wandb.options.mode == "online"


def test_every_parameter_changes_what_is_trained():
    """A dotted name that nothing reads would be a sweep over nothing."""
    path = ROOT / SWEEP["program"]
    plain = load_recipe(path).fingerprint()
    for name, asked in SWEEP["parameters"].items():
        values = asked.get("values") or [asked["min"], asked["max"]]
        prints = {load_recipe(path, [f"{name}={value}"]).fingerprint() for value in values}
        assert len(prints) == len(values) and prints != {plain}, name


VIEW = """
import json, sys
sys.path.insert(0, "launch")
from wandb_workspace import workspace
made = workspace("me", "mine", 3)._to_model().model_dump(by_alias=True, mode="json")
sections = made["spec"]["section"]["panelBankConfig"]["sections"]
print(json.dumps([[s["name"], [p["config"] for p in s["panels"]]] for s in sections]))
"""


def test_the_view_has_a_section_for_every_stage(tmp_path: Path):
    """In a process of its own, as W&B's packages are slow to load."""
    pytest.importorskip("wandb_workspaces")
    import json

    done = subprocess.run(
        [sys.executable, "-c", VIEW], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    sections = dict(json.loads(done.stdout.splitlines()[-1]))
    assert list(sections) == [
        "Results", "All stages", "stage0", "stage1", "stage2", "Speed", "Tables",
    ]  # fmt: skip
    for k in range(3):
        lines = [panel["metrics"] for panel in sections[f"stage{k}"]]
        assert [f"stage{k}/loss"] in lines
        assert {panel["xAxis"] for panel in sections[f"stage{k}"]} == {"train/global_step"}
