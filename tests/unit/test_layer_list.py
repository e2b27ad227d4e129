"""Cuts of a list of layers: literal tables."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from scpl_ds.errors import PartitionError
from scpl_ds.partition.layer_list import LayerSpec, plan_layers


def linear(width: int = 4) -> nn.Module:
    return nn.Linear(4, width)


def frozen() -> nn.Module:
    return linear().requires_grad_(False)


@pytest.mark.parametrize(
    ("layers", "stages", "method", "bounds"),
    [
        ([linear(), linear(), nn.Flatten(), nn.ReLU()], 2, "parameters", (0, 1, 4)),
        ([linear(), linear(), nn.Flatten(), nn.ReLU()], 2, "uniform", (0, 1, 4)),
        ([linear(), nn.ReLU(), nn.ReLU(), linear()], 2, "uniform", (0, 2, 4)),
        ([nn.Flatten(), nn.ReLU(), linear(), linear()], 2, "uniform", (0, 3, 4)),
        ([linear(), nn.ReLU(), nn.ReLU(), linear()], 2, "type:relu", (0, 2, 4)),
        ([nn.ReLU(), nn.ReLU(), linear(), linear()], 2, "type:relu", (0, 3, 4)),
        ([frozen(), frozen(), linear(), LayerSpec(nn.Linear, 4, 4)], 2, "uniform", (0, 3, 4)),
        ([linear(), nn.ReLU(), nn.Flatten()], 1, "parameters", (0, 3)),
    ],
)
def test_no_cut_leaves_a_stage_with_nothing_to_train(
    layers: list[Any], stages: int, method: str, bounds: tuple[int, ...]
):
    assert plan_layers(layers, stages, method).bounds == bounds


@pytest.mark.parametrize("method", ["parameters", "uniform", "type:relu", "flops"])
def test_more_stages_than_layers_to_train_are_refused(method: str):
    """[Linear, Linear, Flatten, ReLU] in 3 stages was cut at (0, 1, 3, 4): the last trains none."""
    layers = [linear(), linear(), nn.Flatten(), nn.ReLU()]
    with pytest.raises(
        PartitionError, match=r"2 of 4 layers have something to train.*3 stages.*at most 2"
    ):
        plan_layers(layers, 3, method)
    with pytest.raises(PartitionError, match="none of the 1 layers has anything to train"):
        plan_layers([nn.ReLU()], 1, method)


def test_ranges_are_taken_as_written():
    layers = [linear(), linear(), nn.Flatten(), nn.ReLU()]
    assert plan_layers(layers, 2, [[0, 2], [2, 4]]).bounds == (0, 2, 4)
