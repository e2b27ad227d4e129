"""One optimizer step end to end: the gradient of the task loss through all stages."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scpl_ds.baselines.end_to_end import EndToEnd
from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, Expected
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.engine_step import step_together, timed
from scpl_ds.errors import DataError
from scpl_ds.objectives._base import IGNORED_LABEL, StageView
from scpl_ds.partition.lora_base import DTYPES, base_dtype_of
from scpl_ds.sharding._torch import TorchBackend
from scpl_ds.stage import Stage
from scpl_ds.timeline import Kind, Timeline


class Backprop(NamedTuple):
    """Which steps are taken end to end, and how."""

    first_step: int
    """The first of them, 0-based; all later ones are too."""
    schedule: str
    """Order of work on a rank, of ``recipe_scpl.BACKPROP_SCHEDULES``."""
    joint: bool
    """Every local objective's loss is added to the task's, nothing detached."""


class BackpropWalk:
    """Walks a step of ``scpl.method: bp`` or ``joint``, or of the end of a run with ``polish``.

    The stages, their optimizers and their random numbers are those of the run; only the gradient is
    another one. It is clipped by its norm over all stages, as backpropagation of the whole model
    is. The micro-batches of a step reach every rank before it begins, padded to one length.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        mesh: Mesh,
        channel: BoundaryChannel,
        section: DeepSpeedSection,
        device: torch.device,
        how: Backprop,
    ) -> None:
        self.timeline = Timeline()
        self.first_step = how.first_step
        self._stages, self._mesh, self._channel = list(stages), mesh, channel
        self._section, self._device = section, device
        self._chain = _Chain(self._stages, section.gradient_accumulation_steps, joint=how.joint)
        self._step = 0
        self._gap: float | None = None
        self._end_to_end = EndToEnd(
            self._chain,
            mesh,
            device,
            schedule=how.schedule,
            begin_forward=self._begin_forward,
            doing=self._doing,
            sent=self._count,
        )

    def run(self, step: int, lr: float, load: Callable[[int], MicroBatch]) -> None:
        """As ``engine_step.StepWalk.run``."""
        self._step = step
        start = self.timeline.begin("data")
        inputs = self._inputs(step, load)
        self.timeline.end("data", start, stage=-1, step=step, micro_batch=-1)
        if "labels" not in inputs:
            raise DataError(
                f"backpropagation found no 'labels' in step {step}; the batch holds "
                f"{sorted(inputs)}."
            )
        self._gap = self.timeline.begin("receive")
        self._end_to_end.run(inputs, self._section.gradient_accumulation_steps)
        self._close_gap()
        if (limit := self._section.gradient_clipping) > 0:
            step_together(self._stages, self._mesh, limit, lr, self.timeline, step)
            return
        for stage in self._stages:
            update = functools.partial(stage.step, lr)
            timed(self.timeline, "step", step, update, stage=stage.index)

    def discard(self) -> None:
        """Forget the gradients of a step that will not be finished."""
        for stage in self._stages:
            stage.discard_step()

    def _inputs(self, step: int, load: Callable[[int], MicroBatch]) -> dict[str, Tensor]:
        """All micro-batches of the step behind each other, from the first rank."""
        if self._mesh.previous_rank is None:
            batches = [load(n).inputs for n in range(self._section.gradient_accumulation_steps)]
            inputs = joined(batches, self._chain.pad_token_id)
        else:
            self._channel.reset("train")  # a step is one message here
            inputs = self._channel.receive(Expected("train", step, 0)).inputs
        if self._mesh.next_rank is not None:
            nothing = torch.zeros(0, device=self._device)
            self._channel.send(MicroBatch(inputs, Tag(step, 0, step), nothing), "train")
            self._channel.flush()
        return inputs

    def _begin_forward(self, micro_batch: int) -> None:
        self._chain.number = (self._step, micro_batch)

    def _count(self, nbytes: int) -> None:
        self._channel.bytes_sent += nbytes

    @contextlib.contextmanager
    def _doing(self, kind: Kind, stage: int = 0, micro_batch: int = -1) -> Iterator[None]:
        """Around one action; what passed since the last one was waiting for other ranks."""
        del stage  # of torch's: a rank; ours may be several
        self._close_gap()
        start = self.timeline.begin(kind)
        yield
        here = self._stages[0].index
        self.timeline.end(kind, start, stage=here, step=self._step, micro_batch=micro_batch)
        self._gap = self.timeline.begin("receive")

    def _close_gap(self) -> None:
        if self._gap is not None:
            self.timeline.end("receive", self._gap, stage=-1, step=self._step, micro_batch=-1)
            self._gap = None


class _Chain(nn.Module):
    """All stages of a rank as one module: hidden states in, hidden states or the loss out."""

    def __init__(self, stages: Sequence[Stage], micro_batches: int, *, joint: bool) -> None:
        super().__init__()
        # Registered: torch's zero-bubble schedule asks the module for its parameters.
        self.modules_of_stages = nn.ModuleList(stage.module for stage in stages)
        self._stages, self._joint, self._micro_batches = list(stages), joint, micro_batches
        self.number: tuple[int, int] = (0, 0)
        """Step and micro-batch of the next forward."""
        self.hidden_size = stages[-1].module.body.hidden_size or stages[0].module.body.hidden_size

    @property
    def pad_token_id(self) -> int:
        """What fills ``input_ids`` where nothing is."""
        model = getattr(self._stages[0].module.body, "model", None)
        config = getattr(model, "config", None)
        found = None if config is None else getattr(config.get_text_config(), "pad_token_id", None)
        return found or 0

    def forward(self, entering: Tensor, /, **inputs: Tensor) -> Tensor:
        hidden = None if self._stages[0].module.body.is_first else entering
        loss: Tensor | None = None
        for stage in self._stages:
            backend = stage.backend
            assert isinstance(backend, TorchBackend), "the recipe's check asks for sharding: none"
            with stage.dropout_of(*self.number), backend.autocast():
                hidden, loss = self._through(stage, inputs, hidden)
        assert hidden is not None
        return hidden.float().contiguous() if loss is None else loss / self._micro_batches

    def _through(self, stage: Stage, inputs: dict[str, Tensor], hidden: Tensor | None) -> Any:
        """Hidden states with gradient, and the task loss on the last stage."""
        if hidden is not None and (held := base_dtype_of(stage.module.body)) is not None:
            hidden = hidden.to(DTYPES[held])  # they came in fp32, whatever the stage left them in
        output = stage.module.body(inputs, hidden)
        leaving = output.hidden_states
        metrics: dict[str, Tensor] = {}
        if output.loss is not None:
            metrics = {"head_loss": output.loss.detach(), "loss": output.loss.detach()}
        objective = stage.module.objective
        if self._joint and objective is not None:
            local = objective.learn(StageView(leaving, hidden, inputs, {}))
            metrics |= {**local.metrics, "loss": local.loss.detach()}
            leaving = _AlsoLearn.apply(leaving, local.loss / self._micro_batches)
        stage.count(metrics)
        loss = None if output.loss is None else output.loss.float()
        return leaving, loss


class _AlsoLearn(torch.autograd.Function):
    """The identity on what leaves a stage, whose backward also goes into a loss."""

    @staticmethod
    def forward(ctx: Any, leaving: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return leaving.clone()  # torch's zero-bubble schedule detaches it in place: no view

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], torch.ones_like(ctx.like)


def joined(batches: Sequence[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Micro-batches behind each other, [M x B, ...], padded on the right to the longest.

    Raises:
        DataError: They hold different inputs, or numbers of rows, or would be padded without a mask
            that says where.
    """
    first = batches[0]
    for other in batches[1:]:
        if set(other) != set(first) or any(len(other[k]) != len(first[k]) for k in first):
            found = [{k: list(v.shape) for k, v in batch.items()} for batch in batches]
            raise DataError(
                "backpropagation needs micro-batches with the same inputs and rows in a step, but "
                f"they hold {found}."
            )
    together: dict[str, Tensor] = {}
    for name in first:
        tensors = [batch[name] for batch in batches]
        if tensors[0].ndim > 1 and len({tensor.shape[1] for tensor in tensors}) > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            if "attention_mask" not in first:
                raise DataError(
                    f"backpropagation pads the micro-batches of a step to one length ('{name}': "
                    f"{[t.shape[1] for t in tensors]}), and without an 'attention_mask' nobody "
                    "would know where. Give one, or micro-batches of one length."
                )
            fill = {"input_ids": pad_token_id, "labels": IGNORED_LABEL}.get(name, 0)
            after = [0, 0] * (tensors[0].ndim - 2)  # the dimensions behind the positions stay
            tensors = [F.pad(t, (*after, 0, longest - t.shape[1]), value=fill) for t in tensors]
        together[name] = torch.cat(tensors)
    return together
