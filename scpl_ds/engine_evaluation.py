"""Forward without training: ``eval_batch`` as DeepSpeed has it, and the stream beneath it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scpl_ds.batch import Evaluated, MicroBatch, Tag
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.p2p import BoundaryChannel, EndOfData, Expected
from scpl_ds.engine_facts import EngineFacts
from scpl_ds.errors import DataError
from scpl_ds.stage import exits_of

Batch = Mapping[str, Tensor] | Sequence[Any] | Tensor


class EngineEvaluation(EngineFacts):
    """What of an engine does not train."""

    channel: BoundaryChannel
    device: torch.device
    collate: Callable[[Batch], dict[str, Tensor]]
    _eval_calls: int

    def eval_batch(
        self,
        data_iter: Iterator[Batch] | None,
        return_logits: bool = False,
        compute_loss: bool = True,
        reduce_output: str | None = "avg",
        bcast_loss: bool = True,
        num_micro_batches: int | None = None,
    ) -> Any:
        """Forward ``num_micro_batches`` (default: as in training) without training.

        DeepSpeed's arguments and return shapes. Every rank must call it.

        Returns:
            The last stage's task loss, mean over micro-batches and data-parallel ranks (on every
            rank with ``bcast_loss``, else on the last stage's ranks; None where there is none).
            ``reduce_output=None`` gives the losses of this rank's micro-batches instead, on the
            last stage's ranks. With ``return_logits`` a pair ``(loss, logits)``; logits are on the
            last stage's ranks only, concatenated over the micro-batches, [B, num_labels].

        Raises:
            DataError: ``data_iter`` holds fewer micro-batches.
            ValueError: ``reduce_output`` is neither ``"avg"`` nor None.
        """
        if reduce_output not in ("avg", None):
            raise ValueError(f"reduce_output must be 'avg' or None, got {reduce_output!r}.")
        count = num_micro_batches or self.micro_batches
        losses: list[Tensor] = []
        logits: list[Tensor] = []
        for output in self.evaluate(data_iter, count):
            if output.loss is not None:
                losses.append(output.loss)
            if return_logits and output.logits is not None:
                logits.append(output.logits)
        result: Any = None
        if compute_loss and reduce_output is None:
            result = torch.stack(losses) if losses else None
        elif compute_loss:
            result = self._mean([float(loss) for loss in losses])
            if not (bcast_loss or self.is_last_stage()):
                result = None
        if not return_logits:
            return result
        return result, (torch.cat(logits) if logits else None)

    def evaluate(
        self, data_iter: Iterator[Batch] | None, num_micro_batches: int
    ) -> Iterator[Evaluated]:
        """Stream ``num_micro_batches`` through the stages without training; one result for each.

        Data-parallel ranks must ask for equally many: backends that gather parameters in forward
        (ZeRO-3, FSDP2) would wait for the missing one.
        """
        inputs = None if data_iter is None else self._collated(data_iter)
        return self.evaluate_inputs(inputs, num_micro_batches)

    def _collated(self, data_iter: Iterator[Batch]) -> Iterator[dict[str, Tensor]]:
        """Asked with ``next`` alone: the loaders of DeepSpeed begin anew with ``iter``."""
        with contextlib.suppress(StopIteration):
            while True:
                yield self.collate(next(data_iter))

    def evaluate_inputs(
        self, inputs: Iterator[Mapping[str, Tensor]] | None, num_micro_batches: int
    ) -> Iterator[Evaluated]:
        """:meth:`evaluate` of what the model takes, not of items of a data set."""
        call, self._eval_calls = self._eval_calls, self._eval_calls + 1
        self.channel.reset("eval")
        for n in range(num_micro_batches):
            try:
                output = self._evaluate_one(inputs, call, n)
            except EndOfData:
                self.channel.send_end()
                self.channel.drain()
                raise DataError(
                    f"The evaluation data ended after {n} of {num_micro_batches} micro-batches."
                ) from None
            except Exception as error:
                self.channel.send_error(f"{type(error).__name__}: {error}")
                raise
            yield output
        self.channel.drain()

    def _evaluate_one(
        self, inputs: Iterator[Mapping[str, Tensor]] | None, call: int, n: int
    ) -> Evaluated:
        if not self.is_first_stage():
            batch = self.channel.receive(Expected("eval", call, n))
        elif inputs is None:
            raise DataError("eval_batch() has no data: pass data_iter on first-stage ranks.")
        else:
            try:
                batch = MicroBatch(dict(next(inputs)), Tag(call, n, n)).to(self.device)
            except StopIteration:
                raise EndOfData from None
        loss = None
        for stage in self.stages:
            batch, loss = stage.evaluate(batch)
        if not self.is_last_stage():
            self.channel.flush()  # the micro-batch before, now that this one has been queued
            self.channel.send(batch, "eval")
            return Evaluated(None, None, None)
        return Evaluated(loss, self.stages[-1].logits, batch.labels, exits_of(batch))

    def _mean(self, values: list[float]) -> Tensor | None:
        """Mean of all ranks' values, on every rank (waits); None where nobody has any."""
        everything = [value for part in gather_objects(self.mesh, values) for value in part]
        return torch.tensor(sum(everything) / len(everything)) if everything else None
