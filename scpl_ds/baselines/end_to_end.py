"""Gradients across the stages of a run: one part a rank, in an order of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import get_schedule_class

from scpl_ds.baselines._timed_stage import Doing, TimedStage
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import RecipeError

_SCHEDULES = {
    "naive": "GPipe",
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "zero_bubble": "InterleavedZeroBubble",
}
"""``scpl.schedule`` -> torch's ``get_schedule_class``; the last with one stage a rank is ZB-H1."""


_MOST_SHAPES = 8


class EndToEndPart(Protocol):
    """What one rank computes: all its stages, nothing detached."""

    hidden_size: int | None
    """Width of what enters and leaves."""

    def __call__(self, entering: Tensor, /, **inputs: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the rank before (on the first one anything: it is not looked
        at) -> hidden states, or on the last rank the loss, divided by the number of
        micro-batches."""
        ...


class EndToEnd:
    """Forward and backward of one optimizer step over all pipeline ranks, for gradients.

    With one pipeline rank a plain loop over the micro-batches. ``naive`` has one micro-batch in the
    pipeline at a time; 1F1B with fewer micro-batches than ranks is GPipe.

    Args:
        part: Of this rank.
        mesh: Who the others are; all ranks make one at the same time.
        device: Where the part is.
        schedule: A name of ``recipe_scpl.BACKPROP_SCHEDULES``.
        begin_forward: Called with the number of the micro-batch before its forward.
        doing: Entered around every action, for a timeline.
        sent: Called with the bytes of hidden states and gradients that leave this rank.
    """

    def __init__(
        self,
        part: EndToEndPart,
        mesh: Mesh,
        device: torch.device,
        *,
        schedule: str,
        begin_forward: Callable[[int], None],
        doing: Doing,
        sent: Callable[[int], None],
    ) -> None:
        self._part, self._mesh, self._device = part, mesh, device
        self._schedule, self._begin = schedule, begin_forward
        self._doing, self._sent = doing, sent
        self._made: dict[tuple[int, int, int], Any] = {}
        self._group: Any = None
        if mesh.pp_size > 1:
            if part.hidden_size is None:
                raise RecipeError(
                    "scpl.method: gradients between ranks need a Hugging Face model whose config "
                    "has a hidden_size; this one is not known. Use one rank, or method: scpl."
                )
            for dp_rank in range(mesh.dp_size):
                group = mesh.new_group([mesh.rank_of(pp, dp_rank) for pp in range(mesh.pp_size)])
                if dp_rank == mesh.dp_rank:
                    self._group = group

    def run(self, inputs: dict[str, Tensor], num_micro_batches: int) -> None:
        """Add the gradients of a step.

        Args:
            inputs: Of all micro-batches behind each other, [M x B, ...], ``labels`` among them; on
                every rank.
            num_micro_batches: M.

        Raises:
            RecipeError: Torch's schedule cannot run so many micro-batches on so many ranks.
        """
        if self._mesh.pp_size == 1:
            for n, chunk in enumerate(chunks(inputs, num_micro_batches)):
                self._begin(n)
                with self._doing("forward", 0, n):
                    loss = self._part(chunk["labels"], **chunk)
                with self._doing("backward", 0, n):
                    loss.backward()
            return
        turns, each = [inputs], num_micro_batches
        if self._schedule == "naive":
            turns, each = chunks(inputs, num_micro_batches), 1
        for turn, batch in enumerate(turns):
            self._step(batch, each, first=turn * each)

    def _step(self, inputs: dict[str, Tensor], num_micro_batches: int, *, first: int) -> None:
        if "input_ids" not in inputs:
            raise RecipeError(
                f"scpl.method: gradients between ranks need 'input_ids' in a batch, which holds "
                f"{sorted(inputs)}. Use one rank, or method: scpl."
            )
        rows, length = inputs["input_ids"].shape
        schedule, stage = self._torch_schedule(rows // num_micro_batches, length, num_micro_batches)
        stage.first = first
        is_first, is_last = self._mesh.previous_rank is None, self._mesh.next_rank is None
        schedule.step(
            *([inputs["input_ids"]] if is_first else []),
            target=inputs["labels"] if is_last else None,
            return_outputs=False,
            **inputs,
        )

    def _torch_schedule(self, rows: int, length: int, num_micro_batches: int) -> Any:
        """Torch's schedule and stage for micro-batches of these shapes."""
        key = (rows, length, num_micro_batches)
        if key in self._made:
            self._made[key] = found = self._made.pop(key)  # the last one used is the last to go
            return found
        ranks, here = self._mesh.pp_size, self._mesh.pp_rank
        name = _SCHEDULES[self._schedule]
        name = "GPipe" if name == "1F1B" and num_micro_batches < ranks else name
        hidden = torch.empty(
            (rows, length, self._part.hidden_size or 0), device="meta", requires_grad=True
        )
        ids = torch.empty((rows, length), dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        assert isinstance(self._part, nn.Module)
        stage = _CountedStage(
            self._part,
            here,
            ranks,
            self._device,
            input_args=ids if here == 0 else hidden,
            output_args=loss if here == ranks - 1 else hidden,
            group=self._group,
            doing=self._doing,
            sent=self._sent,
        )
        stage.begin_forward = self._begin
        make: Any = get_schedule_class(name)
        try:
            schedule = make(
                [stage] if name == "InterleavedZeroBubble" else stage,
                num_micro_batches,
                loss_fn=lambda loss, _: loss,
                scale_grads=False,
            )
        except (ValueError, AssertionError, RuntimeError) as error:
            raise RecipeError(
                f"scpl.schedule: torch's {name} does not run {num_micro_batches} micro-batches on "
                f"{ranks} pipeline ranks: {' '.join(str(error).split())} Change "
                "deepspeed.gradient_accumulation_steps, or use schedule: gpipe."
            ) from error
        if len(self._made) >= _MOST_SHAPES:  # each has buffers for every micro-batch
            self._made.pop(next(iter(self._made)))
        self._made[key] = schedule, stage
        return schedule, stage


class _CountedStage(TimedStage):
    """Says which micro-batch of the step it is about to compute."""

    first = 0
    begin_forward: Callable[[int], None]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.begin_forward(self.first + fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


def chunks(inputs: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step."""
    parts = {name: tensor.chunk(count) for name, tensor in inputs.items()}
    return [{name: parts[name][n] for name in parts} for n in range(count)]
