"""Rivals that ``torch.distributed.pipelining`` schedules."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import get_schedule_class

from scpl_ds.baselines._base import Job, Part, Rival, lane, lane_size, ring_bytes
from scpl_ds.baselines._timed_stage import TimedStage
from scpl_ds.distributed.collectives import average_gradients
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import RecipeError


class Style(NamedTuple):
    """One schedule, and where it wants its stages."""

    schedule: str
    """As torch's ``get_schedule_class`` knows it."""
    stages_per_rank: int = 1
    v_shaped: bool = False
    """Rank r of P has the stages r and 2 P - 1 - r, and not r and P + r."""
    in_one_piece: bool = False
    """The whole step is one micro-batch."""

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        """Stages of a pipeline rank, in rising order."""
        if self.v_shaped:
            return [rank, 2 * ranks - 1 - rank]
        return [rank + ranks * turn for turn in range(self.stages_per_rank)]


STYLES: dict[str, Style] = {
    "naive": Style("GPipe", in_one_piece=True),
    "torch-gpipe": Style("GPipe"),
    "torch-1f1b": Style("1F1B"),
    "torch-interleaved-1f1b": Style("Interleaved1F1B", 2),
    "torch-looped-bfs": Style("LoopedBFS", 2),
    "torch-interleaved-zero-bubble": Style("InterleavedZeroBubble", 2),
    "torch-zbv": Style("ZBVZeroBubble", 2, v_shaped=True),
    "torch-dualpipev": Style("DualPipeV", 2, v_shaped=True),
}


class TorchPipelining(Rival):
    """One schedule of torch's over this model.

    Every rank has the tokens and the mask, so only hidden states and their gradients travel.
    ``bytes_sent`` counts the tensors that torch is given to send. Losses are divided by the number
    of micro-batches, which is cheaper than torch's own scaling of every gradient, and shapes are
    told and not found out. With several data-parallel ranks gradients are averaged after the
    backwards.
    """

    def __init__(self, name: str, job: Job, mesh: Mesh) -> None:
        super().__init__(name, job, mesh)
        self._style = style = STYLES[name]
        self._num_stages = mesh.pp_size * style.stages_per_rank
        self._micro_batches = 1 if style.in_one_piece else job.num_micro_batches
        self._rows = lane_size(name, job, mesh) * job.num_micro_batches // self._micro_batches
        self._group: Any = None
        for dp_rank in range(mesh.dp_size):
            group = mesh.new_group([mesh.rank_of(pp, dp_rank) for pp in range(mesh.pp_size)])
            if dp_rank == mesh.dp_rank:
                self._group = group
        spans = job.cut(self._num_stages)
        here = style.stages_of(mesh.pp_rank, mesh.pp_size)
        self._parts = [Part(job, stage, spans) for stage in here]
        self._schedules: dict[int, Any] = {}
        self._schedule(job.sequence_length)  # or it would be refused in the first step
        self._optimizer = job.optimizer(
            named for part in self._parts for named in part.named_parameters()
        )

    def _schedule(self, length: int) -> Any:
        """Torch's schedule for batches of ``length`` positions."""
        if length in self._schedules:
            return self._schedules[length]
        stages = [
            TimedStage(
                part,
                part.stage,
                self.num_stages,
                self.job.device,
                input_args=self.example(part.stage - 1, length),
                output_args=self.example(part.stage, length),
                group=self._group,
                doing=self.doing,
                sent=self._count,
            )
            for part in self._parts
        ]
        make: Any = get_schedule_class(self._style.schedule)
        single = self._style.stages_per_rank == 1
        try:
            schedule = make(
                stages[0] if single else stages,
                self._micro_batches,
                loss_fn=lambda loss, _: loss / self._micro_batches,
                scale_grads=False,
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise RecipeError(
                f"{self.name}: torch's {self._style.schedule} does not run {self._micro_batches} "
                f"micro-batches over {self._num_stages} stages on {self.mesh.pp_size} ranks: "
                f"{text} Change the number of micro-batches or of ranks."
            ) from error
        self._schedules[length] = schedule
        return schedule

    def _train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None:
        own = lane(inputs, self.job, self.mesh)
        schedule = self._schedule(own["input_ids"].shape[1])
        first = any(part.body.is_first for part in self._parts)
        last = any(part.body.is_last for part in self._parts)
        losses: list[Tensor] = []
        schedule.step(
            *([own["input_ids"]] if first else []),
            target=own["labels"] if last else None,
            losses=losses,
            return_outputs=False,
            **own,
        )
        if self.mesh.dp_size > 1:
            trained = [p for part in self._parts for p in part.parameters() if p.requires_grad]
            average_gradients(trained, self.mesh)
            self.bytes_sent += ring_bytes(trained, self.mesh.dp_size)
        self.update(self._optimizer)
        return torch.stack(losses).detach().sum() if last else None

    def example(self, stage: int, length: int) -> Tensor:
        """What leaves ``stage`` for one micro-batch, without its numbers; -1: what enters 0."""
        if stage == self._num_stages - 1:
            return torch.empty((), device="meta", requires_grad=True)
        shape = (self._rows, length)
        if stage < 0:
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.empty(
            (*shape, self.job.hidden_size),
            dtype=self.job.autocast or torch.float32,
            device="meta",
            requires_grad=True,
        )

    @property
    def num_stages(self) -> int:
        return self._num_stages

    def _count(self, nbytes: int) -> None:
        self.bytes_sent += nbytes

    def parameters(self) -> dict[str, Tensor]:
        return {k: v for part in self._parts for k, v in part.body.hf_state_dict().items()}
