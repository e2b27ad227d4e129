"""``scpl-ds bench chaos``: every figure of it, over a few kills."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from scpl_ds.bench import chaos

pytestmark = pytest.mark.forks


def test_a_run_that_was_killed_ends_as_one_that_was_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chaos, "STEPS", 12)
    saved: list[dict[str, Any]] = []
    chaos.main(argparse.Namespace(kills=2, seed=1), saved.append)
    figures = saved[-1]
    assert figures["kills"] == 2 and figures["runs"] >= 1 and figures["bitwise_equal"] is True
    assert figures["lost"] == figures["wrong_exits"] == 0
    assert 0 < figures["max_exit_seconds"] < 30


def test_a_run_that_ends_otherwise_is_told(monkeypatch: pytest.MonkeyPatch):
    """A checkpoint with a place in the data that is not its own, say."""
    monkeypatch.setattr(chaos, "STEPS", 4)
    result = chaos._result
    monkeypatch.setattr(
        chaos,
        "_result",
        lambda run: {n: t + (run.name == "whole") for n, t in result(run).items()},
    )
    saved: list[dict[str, Any]] = []
    chaos.main(argparse.Namespace(kills=1, seed=0), saved.append)
    assert saved[-1]["bitwise_equal"] is False
