"""Stages whose computing is a sleep: many ranks on few cores, all else real.

Engine, schedule, processes, messages of the real size and the optimizer step are those of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scpl_ds.build import build_engine
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel
from scpl_ds.engine import Engine
from scpl_ds.partition.plan import PartitionPlan
from scpl_ds.partition.stage_module import StageOutput
from scpl_ds.recipe import Recipe
from scpl_ds.stage import as_body


class Lengths(NamedTuple):
    """How long a stage takes for one sample, in seconds."""

    forward: float
    backward: float


class _SleepInBackward(torch.autograd.Function):
    """The identity, whose backward takes time."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        time.sleep(ctx.seconds)
        return grads[0], None


class EmulatedBody(nn.Module):
    """A stage body that sleeps for every sample it is given, and learns one number a feature.

    Args:
        start: First layer.
        end: One past the last layer.
        num_layers: Of the whole model.
        hidden_size: D.
        lengths: Of one sample and one layer.
        local_loss: Every stage has a loss of its own; otherwise only the last one.
    """

    def __init__(
        self,
        start: int,
        end: int,
        num_layers: int,
        hidden_size: int,
        lengths: Lengths,
        *,
        local_loss: bool,
    ) -> None:
        super().__init__()
        self.start, self.end, self.hidden_size = start, end, hidden_size
        self.is_first = start == 0
        self.is_last = local_loss or end == num_layers
        """A stage that brings its loss along needs no local objective, as the last one."""
        self.kept = None
        self._lengths = lengths
        self.shift = nn.Parameter(torch.zeros(hidden_size))

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden_states: Tensor | None,
        *,
        detach_features: bool = False,
    ) -> StageOutput:
        """Shapes as :class:`~scpl_ds.partition.stage_module.StageModule`; logits are [B, 2]."""
        rows, positions = inputs["input_ids"].shape
        samples = rows * (self.end - self.start)
        if hidden_states is None:
            hidden_states = torch.zeros(rows, positions, self.hidden_size)
        time.sleep(samples * self._lengths.forward)
        seconds = samples * self._lengths.backward
        hidden = _SleepInBackward.apply(hidden_states + self.shift, seconds)
        assert isinstance(hidden, Tensor)
        if not self.is_last:
            return StageOutput(hidden, None, None)
        logits = hidden[:, 0, :2]
        loss = None
        if "labels" in inputs:
            loss = nn.functional.cross_entropy(logits, inputs["labels"])
        return StageOutput(hidden, loss, logits)


def emulated_engine(
    recipe: Recipe,
    lengths: Lengths,
    hidden_size: int,
    mesh: Mesh,
    device: torch.device,
    *,
    make_channel: Callable[..., BoundaryChannel] = BoundaryChannel,
) -> Engine:
    """The engine of ``recipe`` over emulated stages, one layer each; arguments as
    ``build.build_engine``."""
    stages = recipe.scpl.stages

    def body(k: int) -> EmulatedBody:
        return EmulatedBody(k, k + 1, stages, hidden_size, lengths, local_loss=True)

    return build_engine(
        PartitionPlan(tuple(range(stages + 1)), "uniform"),
        lambda k: as_body(body(k)),
        recipe.scpl,
        recipe.deepspeed,
        mesh,
        device,
        num_labels=2,
        seed=recipe.train.seed,
        lr_at=lambda step: recipe.deepspeed.lr,
        make_channel=make_channel,
    )
