"""One finished run per backend, shared by the tests that look at it or go on from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from tests.support.tiny import put, recipe_for, train


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """No process group outlives a test."""
    with tiny.own_world():
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe of a run of 8 steps in 2 stages that saves after 3, 6 and 8."""
    recipe = tiny.make(tmp_path_factory.mktemp("tiny"))
    changes = {
        "scpl.objective": {"name": "supcon", "projection": "linear"},
        "train.save_steps": 3,
        "train.save_total_limit": 2,
        "train.logging_steps": 1,
    }
    return put(recipe, changes)


@pytest.fixture(scope="session")
def plain_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in plain torch."""
    folder = tmp_path_factory.mktemp("whole") / "none"
    assert train(recipe_for(base, "none", folder)) == 0
    return folder


@pytest.fixture(scope="session")
def deepspeed_run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run under DeepSpeed ZeRO-1, tracked by Weights & Biases, offline."""
    folder = tmp_path_factory.mktemp("whole") / "deepspeed"
    trackers = [{"name": "wandb", "mode": "offline"}]
    named = {"trackers": trackers, "train.run_name": "my run"}
    assert train(recipe_for(base, "deepspeed", folder, **named)) == 0
    return folder


@pytest.fixture(params=["plain_run", "deepspeed_run"])
def run(request: pytest.FixtureRequest) -> Path:
    """Both, one after the other; the folder's name is the backend's."""
    return request.getfixturevalue(request.param)
