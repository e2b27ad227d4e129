"""The rooms of the package: who may import whom, who may use which library, how long a file may be.

Every import counts, also inside functions and under ``TYPE_CHECKING``; only the names in
``registry.py`` are strings and do not. A new file inside a room needs no change here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "scpl_ds"
MAX_LINES = 400

# From top to bottom. A top-level file `recipe_files.py` belongs to the room `recipe`. A room may
# import from the lines below its own, never from its own line.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in (
        "__init__ __main__",
        "cli",
        "bench doctor report",
        "trainer",
        "evaluation generation reporting",
        "setup early_exit",
        "memory",
        "build",
        "engine",
        "stage export run_folder progress",
        "sharding checkpoint data trackers baselines",
        "distributed",
        "partition objectives schedules optim meter timeline",
        "recipe batch simulation lock",
        "ds",
        "problems",
        "registry",
        "errors",
    )
)

ROOMS = frozenset().union(*LAYERS)

# Library -> who may import it: a room, or one file in it.
OWNERS: dict[str, frozenset[str]] = {
    "torch.distributed": frozenset({"distributed", "sharding", "baselines"}),
    "torch.distributed.checkpoint": frozenset(
        {"distributed", "sharding", "baselines", "checkpoint"}
    ),
    "transformers": frozenset(
        {
            "partition",
            "data",
            "checkpoint",
            "export",
            "trainer_hf.py",
            "trainer_arguments.py",
            "trainer_callbacks.py",
            "trainer_export.py",
            "trainer_predictions.py",
        }
    ),
    "deepspeed": frozenset(
        {
            "sharding/deepspeed.py",
            "sharding/_deepspeed_files.py",
            "sharding/_deepspeed_world.py",
            "baselines",
        }
    ),
    "wandb": frozenset({"trackers/wandb.py", "trackers/_wandb_artifacts.py"}),
    "mlflow": frozenset({"trackers/mlflow.py"}),
    "huggingface_hub": frozenset({"export", "doctor", "data", "recipe"}),
    "peft": frozenset({"partition/lora.py"}),
    "bitsandbytes": frozenset({"partition/lora_base.py"}),
}
ONLY_INSIDE_FUNCTIONS = frozenset({"wandb", "mlflow", "deepspeed", "peft", "bitsandbytes"})
MAY_PRINT = frozenset({"cli"})


class Use(NamedTuple):
    """One import (or one ``torch.distributed`` spelled as an attribute)."""

    module: str
    line: int
    inside_function: bool


def room_of(path: str) -> str:
    """``partition/plan.py`` -> ``partition``; ``ds_keys.py`` -> ``ds``; ``cli.py`` -> ``cli``."""
    top = path.split("/")[0].removesuffix(".py")
    prefix = top.split("_")[0]
    return prefix if top not in ROOMS and prefix in ROOMS else top


def uses(source: str, path: str) -> Iterator[Use]:
    """Every module a file imports, by its full name."""
    package = ["scpl_ds", *path.split("/")[:-1]]

    def visit(node: ast.AST, inside: bool) -> Iterator[Use]:
        for child in ast.iter_child_nodes(node):
            deeper = inside or isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Use(alias.name, child.lineno, inside)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                # What is imported may be a submodule: `from torch import distributed`.
                for alias in child.names:
                    yield Use(f"{module}.{alias.name}", child.lineno, inside)
            elif isinstance(child, ast.Attribute) and ast.unparse(child) == "torch.distributed":
                yield Use("torch.distributed", child.lineno, True)
            elif (
                isinstance(child, ast.Call)
                and ast.unparse(child.func).endswith(("import_module", "__import__"))
                and child.args
                and isinstance(child.args[0], ast.Constant)
            ):
                yield Use(str(child.args[0].value), child.lineno, inside)
            yield from visit(child, deeper)

    yield from visit(ast.parse(source), False)


def layer_of(room: str) -> int | None:
    return next((i for i, rooms in enumerate(LAYERS) if room in rooms), None)


def prints(source: str) -> list[int]:
    """Lines with a call of ``print``; the ``main`` of a ``python -m`` module may have them."""
    tree = ast.parse(source)
    own_command = 'if __name__ == "__main__":' in source
    allowed: set[ast.AST] = set()
    for node in tree.body:
        if own_command and isinstance(node, ast.FunctionDef) and node.name == "main":
            allowed |= set(ast.walk(node))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and node not in allowed
    ]


def violations(source: str, path: str) -> list[str]:
    """What is wrong with one file, as sentences; ``path`` is relative to the package."""
    room, found = room_of(path), []
    own_layer = layer_of(room)
    if own_layer is None:
        return [f"{path}: the room '{room}' is in no layer; put it into LAYERS"]
    for use in uses(source, path):
        where = f"{path}:{use.line}"
        parts = use.module.split(".")
        if parts[0] == "scpl_ds":
            if parts[1:] == ["__version__"]:  # stands before every import of __init__.py
                continue
            target = room_of(parts[1]) if len(parts) > 1 else "__init__"
            target_layer = layer_of(target)
            if target_layer is None and len(parts) > 2:
                continue  # a file in no layer, reported under its own name
            if target_layer is None:  # a name of scpl_ds/__init__.py
                target, target_layer = "__init__", 0
            if target != room and target_layer <= own_layer:
                found.append(f"{where}: '{room}' must not import '{target}' ({use.module})")
            continue
        library = next(
            (
                n
                for n in sorted(OWNERS, key=len, reverse=True)
                if f"{use.module}.".startswith(n + ".")
            ),
            None,
        )
        if library is None:
            continue
        if not {room, path} & OWNERS[library]:
            allowed = ", ".join(sorted(OWNERS[library]))
            found.append(f"{where}: {library} belongs to {allowed}, not to '{room}'")
        elif library in ONLY_INSIDE_FUNCTIONS and not use.inside_function:
            found.append(f"{where}: {library} must be imported inside the function that needs it")
    if room not in MAY_PRINT:
        found += [
            f"{path}:{line}: library code must not print; use logging" for line in prints(source)
        ]
    return found


FILES = sorted(str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_point_downwards_and_libraries_stay_in_their_rooms(path):
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize("path", FILES)
def test_a_file_stays_under_400_lines(path):
    lines = len((PACKAGE / path).read_text(encoding="utf-8").splitlines())
    assert lines < MAX_LINES, f"{path} has {lines} lines; split it by what changes together"


@pytest.mark.parametrize(
    "path, source, expected",
    [
        ("objectives/x.py", "from scpl_ds.engine import Engine", "must not import 'engine'"),
        ("objectives/x.py", "def f():\n    import scpl_ds.optim", "must not import 'optim'"),
        ("objectives/x.py", "from ..stage import Stage", "must not import 'stage'"),
        ("objectives/x.py", "from scpl_ds import trainer", "must not import 'trainer'"),
        ("objectives/x.py", "from scpl_ds import Engine", "must not import '__init__'"),
        ("data/x.py", "from scpl_ds.trackers._base import Tracker", "must not import 'trackers'"),
        ("errors.py", "import scpl_ds.registry", "must not import 'registry'"),
        ("ds_keys.py", "from scpl_ds.recipe import Recipe", "must not import 'recipe'"),
        ("batch.py", "from scpl_ds.recipe_files import f", "must not import 'recipe'"),
        ("stage.py", "import torch.distributed as dist", "torch.distributed belongs to"),
        ("stage.py", "from torch import distributed", "torch.distributed belongs to"),
        ("stage.py", "import torch\nrank = torch.distributed.get_rank()", "belongs to"),
        ("checkpoint.py", "import torch.distributed", "torch.distributed belongs to"),
        ("engine.py", "from transformers import AutoModel", "transformers belongs to"),
        ("sharding/none.py", "import deepspeed", "deepspeed belongs to"),
        ("sharding/deepspeed.py", "import deepspeed", "inside the function"),
        ("trackers/wandb.py", "import wandb", "inside the function"),
        ("engine.py", "import importlib\nimportlib.import_module('deepspeed')", "belongs to"),
        ("engine.py", "def f():\n    print('hello')", "must not print"),
        ("engine.py", "def main():\n    print('hello')", "must not print"),
        ("helpers.py", "", "is in no layer"),
    ],
)
def test_the_rule_sees_a_file_that_breaks_it(path, source, expected):
    found = violations(source, path)
    assert len(found) == 1 and expected in found[0], found


@pytest.mark.parametrize(
    "path, source",
    [
        ("objectives/x.py", "from scpl_ds.objectives._base import Objective"),
        ("objectives/x.py", "from ._base import Objective"),
        ("objectives/x.py", "from scpl_ds import registry"),
        ("ds_config.py", "from scpl_ds.ds_keys import KEYS"),
        ("recipe.py", "from scpl_ds.recipe_sections import ModelSection"),
        ("stage.py", "from scpl_ds.sharding._base import Backend"),
        ("checkpoint.py", "import torch.distributed.checkpoint as dcp"),
        ("distributed/x.py", "import torch.distributed as dist"),
        ("partition/x.py", "from transformers import AutoModel"),
        ("trackers/wandb.py", "def f():\n    import wandb"),
        ("trackers/console.py", "console.print('x')"),
        ("cli.py", "print('x')"),
        ("data/x.py", 'def main():\n    print(1)\nif __name__ == "__main__":\n    main()'),
        ("__init__.py", "from scpl_ds.engine import Engine"),
    ],
)
def test_the_rule_leaves_a_good_file_alone(path, source):
    assert violations(source, path) == []
