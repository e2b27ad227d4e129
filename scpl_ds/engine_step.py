"""One optimizer step of one rank: a schedule's actions, carried out."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch

from scpl_ds.batch import MicroBatch
from scpl_ds.distributed.collectives import barrier, sum_over_stages
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, Expected
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.errors import ScheduleError
from scpl_ds.schedules import Backward, Forward, Load, Receive, Schedule, Send, Step
from scpl_ds.stage import Stage
from scpl_ds.timeline import Kind, Timeline

Sync = Literal["none", "step"]
ClipScope = Literal["stage", "global"]
T = TypeVar("T")

_KINDS: dict[type, Kind] = {
    Load: "data",
    Receive: "receive",
    Forward: "forward",
    Send: "send",
    Backward: "backward",
    Step: "step",
}


class StepWalk:
    """Walks the schedule of this rank's stages, one optimizer step a call.

    Args:
        sync: ``step``: no rank begins the next step before all have ended this one.
        clip_scope: ``global``: gradients are clipped by the norm over all stages, for which every
            stage waits for the last.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        num_stages: int,
        mesh: Mesh,
        channel: BoundaryChannel,
        section: DeepSpeedSection,
        *,
        schedule: Schedule,
        sync: Sync,
        clip_scope: ClipScope,
    ) -> None:
        self.timeline = Timeline()
        self._stages = {stage.index: stage for stage in stages}
        self._num_stages, self._mesh, self._channel = num_stages, mesh, channel
        self._section, self._schedule = section, schedule
        self._sync, self._clip_scope = sync, clip_scope
        # Micro-batch -> how far it has come on this rank.
        self._batches: dict[int, MicroBatch] = {}

    def run(self, step: int, lr: float, load: Callable[[int], MicroBatch]) -> None:
        """Step number ``step`` at learning rate ``lr``; ``load`` gives a micro-batch of the data.

        Raises:
            EndOfData: There is no further micro-batch; the step is to be discarded.
            ScheduleError: The schedule leaves a stage without its step, or steps it twice.
        """
        micro_batches = self._section.gradient_accumulation_steps
        stepped: list[int] = []
        for action in self._schedule(list(self._stages), self._num_stages, micro_batches):
            if isinstance(action, Step):
                stepped.append(action.stage)
                if self._clip_scope == "global":
                    continue
            kind = _KINDS[type(action)]
            start = self.timeline.begin(kind)
            if isinstance(action, Step):
                self._stages[action.stage].step(lr)
            else:
                self._carry_out(action, step, load, last=action.micro_batch == micro_batches - 1)
            self.timeline.end(
                kind,
                start,
                stage=getattr(action, "stage", -1),
                step=step,
                micro_batch=getattr(action, "micro_batch", -1),
            )
        self._channel.flush()  # of a schedule that sends after its last backward
        if sorted(stepped) != sorted(self._stages):
            raise ScheduleError(
                f"the schedule stepped the stages {stepped}, but this rank has "
                f"{list(self._stages)}: it must yield Step(k) once for each, after the last "
                "Backward(k, n)."
            )
        if self._clip_scope == "global":
            stages, limit = list(self._stages.values()), self._section.gradient_clipping
            step_together(stages, self._mesh, limit, lr, self.timeline, step)
        if self._sync == "step":
            timed(self.timeline, "sync", step, self._meet)

    def _carry_out(
        self,
        action: Load | Receive | Forward | Send | Backward,
        step: int,
        load: Callable[[int], MicroBatch],
        *,
        last: bool,
    ) -> None:
        batches = self._batches
        match action:
            case Load(n):
                batches[n] = load(n)
            case Receive(n):
                batches[n] = self._channel.receive(Expected("train", step, n))
            case Forward(k, n):
                batches[n] = self._stages[k].forward(batches[n])
                if k + 1 in self._stages:
                    batches[n] = self._channel.across(batches[n])
            case Send(n):
                self._channel.send(batches[n], "train")
            case Backward(k, n):
                if k == max(self._stages):
                    del batches[n]  # sent, or nobody's: freed before the backward
                self._stages[k].backward(last=last)
                self._channel.flush()

    def discard(self) -> None:
        """Forget the micro-batches of a step that will not be finished."""
        self._batches.clear()
        for stage in self._stages.values():
            stage.discard_step()

    def _meet(self) -> None:
        self._channel.drain()
        barrier(self._mesh)


def timed(
    timeline: Timeline, kind: Kind, step: int, work: Callable[[], T], *, stage: int = -1
) -> T:
    """Do ``work``, and write down how long it took."""
    start = timeline.begin(kind)
    result = work()
    timeline.end(kind, start, stage=stage, step=step, micro_batch=-1)
    return result


def step_together(
    stages: Sequence[Stage], mesh: Mesh, limit: float, lr: float, timeline: Timeline, step: int
) -> None:
    """Step this rank's stages, the gradients of all stages clipped to ``limit`` by their common
    norm, as backpropagation would; every rank waits for the others."""
    norms = [float(stage.backend.norm()) for stage in stages]
    # A stage whose gradients are not finite is left out: in fp16 it skips its step.
    squares = sum(norm**2 for norm in norms if math.isfinite(norm))
    total = math.sqrt(timed(timeline, "sync", step, lambda: sum_over_stages(mesh, squares)))
    factor = limit / (total + 1e-6)  # as torch's clip_grad_norm_
    for stage, norm in zip(stages, norms, strict=True):
        clips = factor < 1 and math.isfinite(norm)
        clip_to = (norm + 1e-6) * factor if clips else 0.0
        update = functools.partial(stage.step, lr, clip_to=clip_to)
        timed(timeline, "step", step, update, stage=stage.index)
        stage.metrics["global_grad_norm"] = torch.tensor(total)
