"""A chain of stages computes what the whole Hugging Face model computes, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scpl_ds.partition.anatomy import Anatomy, anatomy_of, auto_class
from scpl_ds.partition.loading import load_stage
from scpl_ds.partition.plan import make_plan
from scpl_ds.partition.stage_module import StageModule, StageOutput
from tests.support.models import CASE_IDS, CASES, Architecture, batch, save

SEED = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run_chain(stages: list[StageModule], inputs: dict[str, Tensor]) -> StageOutput:
    hidden = None
    for stage in stages:
        output = stage(inputs, hidden)
        hidden = output.hidden_states
    return output


def spans(anatomy: Anatomy, num_stages: int) -> list[tuple[int, int]]:
    plan = make_plan(anatomy, num_stages, "uniform")
    return [plan.span(k) for k in range(num_stages)]


def assert_bitwise(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("architecture", "task"), CASES, ids=CASE_IDS)
def test_stage_chain_equals_whole_model(
    architecture: Architecture, task: str, tmp_path: Path
) -> None:
    config = architecture.config()
    path = save(config, task, tmp_path)
    whole = auto_class(task).from_pretrained(path)
    anatomy = anatomy_of(whole.config, task)
    for num_stages in (2, 3):
        stages = [
            load_stage(path, task, anatomy, start, end, config=whole.config, seed=SEED)
            for start, end in spans(anatomy, num_stages)
        ]
        for padding in ("none", "left", "right"):
            inputs = batch(task, padding)
            with torch.no_grad():
                expected = whole(**inputs)
                actual = run_chain(stages, inputs)
            assert_bitwise(actual.logits, expected.logits)
            assert_bitwise(actual.loss, expected.loss)
