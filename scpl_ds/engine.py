"""The engine a DeepSpeed user knows: ``train_batch``, ``eval_batch``, ``save_checkpoint``."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scpl_ds import checkpoint
from scpl_ds.batch import Evaluated, MicroBatch, Tag, as_inputs, sizes_of
from scpl_ds.distributed.collectives import barrier, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, EndOfData, Expected
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.engine_backprop import Backprop, BackpropWalk
from scpl_ds.engine_calibration import ReadAhead, calibrate
from scpl_ds.engine_facts import EngineFacts
from scpl_ds.engine_step import StepWalk
from scpl_ds.errors import DataError
from scpl_ds.partition.plan import PartitionPlan
from scpl_ds.schedules import Schedule
from scpl_ds.stage import Stage, exits_of
from scpl_ds.timeline import Timeline

log = logging.getLogger(__name__)
Batch = Mapping[str, Tensor] | Sequence[Any] | Tensor


class Engine(EngineFacts):
    """Trains this rank's stages. One call of ``train_batch`` is one optimizer step.

    Unlike DeepSpeed's ``PipelineEngine`` it never waits for a later stage: an early stage may be
    steps ahead of the last one, bounded by ``scpl.max_in_flight``. ``drain``, ``reduce_loss``,
    ``eval_batch`` and ``save_checkpoint`` bring all stages to the same step.

    Made by ``scpl_ds.initialize``.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        plan: PartitionPlan,
        mesh: Mesh,
        channel: BoundaryChannel,
        section: DeepSpeedSection,
        *,
        schedule: Schedule,
        lr_at: Callable[[int], float],
        device: torch.device,
        sync: Literal["none", "step"] = "none",
        clip_scope: Literal["stage", "global"] = "stage",
        backprop: Backprop | None = None,
        calibrates: bool = False,
    ) -> None:
        self.stages, self.plan, self.mesh = list(stages), plan, mesh
        self.section, self.device = section, device
        self.global_steps = 0
        """Optimizer steps taken; equal on all ranks after the same number of ``train_batch``."""
        self.samples_seen = 0
        """Samples that this first-stage rank has trained on; 0 on other ranks."""
        self.tokens_seen = 0
        """Likewise real tokens, without padding."""
        self.channel, self.lr_at = channel, lr_at
        self._walk = StepWalk(
            self.stages, plan.num_stages, mesh, channel, section,
            schedule=schedule, sync=sync, clip_scope=clip_scope,
        )  # fmt: skip
        how = (self.stages, mesh, channel, section, device)
        self._backprop = None if backprop is None else BackpropWalk(*how, backprop)
        self.start_timeline(keep=False)
        self._batch_id = self._eval_calls = 0
        self._data_iterator: Iterator[Batch] | None = None
        self.collate: Callable[[Batch], dict[str, Tensor]] = as_inputs
        self._last_loss: Tensor | None = None
        self._ahead = ReadAhead(lambda item: self.collate(item))
        self._calibrates = calibrates
        self._heads_there: set[int] = set()
        """Stages whose local head came from a checkpoint."""

    @property
    def timeline(self) -> Timeline:
        """What this rank did in its training steps, and when."""
        return self._walk.timeline

    def start_timeline(self, *, keep: bool) -> None:
        """Begin a new timeline; ``keep``: every action of it, for a trace."""
        self._walk.timeline = Timeline(keep=keep, device=self.device)
        if self._backprop is not None:
            self._backprop.timeline = self._walk.timeline

    # -- data ------------------------------------------------------------------------------

    def set_dataiterator(self, iterator: Iterator[Batch]) -> None:
        """Batches for ``train_batch()`` without an argument; kept on first-stage ranks only."""
        self._data_iterator = iterator if self.is_first_stage() else None

    def set_batch_fn(self, fn: Callable[[Any], dict[str, Tensor]]) -> None:
        """How a batch of the data iterator becomes the model's inputs; default ``as_inputs``."""
        self.collate = fn

    # -- training --------------------------------------------------------------------------

    def train_batch(self, data_iter: Iterator[Batch] | None = None) -> Tensor:
        """One optimizer step over ``gradient_accumulation_steps`` micro-batches of ``data_iter``.

        Args:
            data_iter: Read on first-stage ranks only; each item is a dict as a tokenizer's collator
                gives it, with ``labels``, or an ``(inputs, labels)`` pair.

        Returns:
            The loss of this rank's last stage, scalar, mean over the micro-batches of this
            data-parallel rank: the task loss on the last stage, the local loss elsewhere (NaN where
            there is none: frozen stages, backpropagation). It is
            *this* rank's: DeepSpeed's broadcast of the last stage's loss would flush the pipeline
            every step. ``reduce_loss()`` asks for the run's.

        Raises:
            StopIteration: The data ended; raised on every rank of this lane (the ranks with the
                same data-parallel number). Micro-batches of the unfinished step are forgotten.
                All lanes must hold equally many: a lane that goes on waits for the others.
            BoundaryError: A neighbour is gone, late or out of step.
        """
        if data_iter is not None:
            self.set_dataiterator(data_iter)
        self.calibrate()
        later, walk = self._backprop, self._walk
        if later is not None and self.global_steps >= later.first_step:
            walk = later
        try:
            walk.run(self.global_steps, self.lr_at(self.global_steps), self._load)
        except EndOfData:
            walk.discard()
            self.channel.send_end()
            self.channel.drain()
            raise StopIteration(f"the data ended in step {self.global_steps}") from None
        except Exception as error:
            walk.discard()
            self.channel.send_error(f"{type(error).__name__}: {error}")
            raise
        self.global_steps += 1
        last = self.stages[-1].metrics
        self._last_loss = last.get("head_loss", last.get("loss", torch.tensor(math.nan)))
        return self._last_loss

    def calibrate(self, data_iter: Iterator[Batch] | None = None, *, put_back: bool = True) -> None:
        """Let local heads begin where the model, as it came, would end (objectives that ask for it,
        ``logit_lens``). The first ``train_batch`` does it on its own data, if nobody has before;
        every rank must call it.

        What is read of ``data_iter`` is trained on when ``train_batch`` is given the same iterator;
        with ``put_back=False`` it is forgotten, for those who go back in the data themselves.
        """
        if not self._calibrates:
            return
        own = {
            stage.index: stage.module.objective.calibration()
            for stage in self.stages
            if stage.module.objective is not None and stage.index not in self._heads_there
        }
        source = self._data_iterator if data_iter is None else data_iter
        wanted = {k: positions for k, positions in own.items() if positions}
        done = calibrate(self, source if self.is_first_stage() else None, self._ahead, wanted)
        self._calibrates = not done
        if not put_back:
            self._ahead.forget()

    def _load(self, number: int) -> MicroBatch:
        if self._data_iterator is None:
            raise DataError("train_batch() has no data: pass data_iter, or call set_dataiterator.")
        try:
            inputs = self._ahead.next(self._data_iterator)
        except StopIteration:
            raise EndOfData from None
        tag = Tag(self.global_steps, number, self._batch_id)
        self._batch_id += 1
        self._count(inputs)
        return MicroBatch(inputs, tag).to(self.device)

    def _count(self, inputs: Mapping[str, Tensor]) -> None:
        """Before the batch moves to the device, so that counting waits for nothing."""
        samples, tokens = sizes_of(inputs)
        self.samples_seen += samples
        self.tokens_seen += tokens

    def reduce_loss(self) -> Tensor:
        """The last stage's loss of the last step, mean over data-parallel ranks, on every rank.

        Waits for all ranks, so it flushes the pipeline: call it now and then.
        """
        own = self._last_loss if self.is_last_stage() else None
        if (loss := self._mean([] if own is None else [float(own)])) is None:
            raise RuntimeError("reduce_loss() before the first train_batch().")
        return loss

    def _mean(self, values: list[float]) -> Tensor | None:
        """Mean of all ranks' values, on every rank (waits); None where nobody has any."""
        everything = [value for part in gather_objects(self.mesh, values) for value in part]
        return torch.tensor(sum(everything) / len(everything)) if everything else None

    def metrics(self) -> dict[str, Tensor]:
        """Numbers of the last step of this rank's stages (0-dim tensors; reading one waits for
        it)."""
        result: dict[str, Tensor] = {}
        for stage in self.stages:
            for name, value in stage.metrics.items():
                key = "head/loss" if name == "head_loss" else f"stage{stage.index}/{name}"
                result[key] = value
        return result

    def drain(self) -> None:
        """Wait until the neighbour has taken everything this rank sent."""
        self.channel.drain()

    # -- evaluation ------------------------------------------------------------------------

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

    # -- checkpoints -----------------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        *,
        model_files: Path | None = None,
    ) -> Path:
        """Write ``save_dir/tag`` (default ``checkpoint-<step>``), whole or not at all.

        Every rank must call it after the same number of steps; it waits for all of them.
        ``client_state`` must be plain JSON; rank 0's is kept. ``model_files``: a folder with the
        model's config.json and tokenizer, copied along so that the checkpoint can be exported.
        """
        self.drain()
        folder = Path(save_dir) / (tag or f"checkpoint-{self.global_steps}")
        with checkpoint.Writer(folder, is_coordinator=self.mesh.rank == 0) as writer:
            barrier(self.mesh)
            for stage in self.stages:
                stage.write(writer)
            barrier(self.mesh)
            if self.mesh.rank == 0:
                writer.finish(
                    step=self.global_steps,
                    bounds=self.plan.bounds,
                    client_state={**(client_state or {}), "batch_id": self._batch_id},
                    save_latest=save_latest,
                    model_files=model_files,
                )
        barrier(self.mesh)
        return folder

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_optimizer_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[Path, dict[str, Any]]:
        """Restore ``load_dir/tag`` (default: what ``latest`` names) into this engine's stages.

        ``load_module_only`` takes the weights and leaves optimizer and step count as they are.

        Returns:
            The checkpoint's folder and the ``client_state`` it was saved with.

        Raises:
            CheckpointError: Missing, incomplete, or of another model.
        """
        self.drain()
        reader = checkpoint.Reader(checkpoint.resolve(Path(load_dir), tag))
        reader.require_layers(self.plan.bounds[-1])
        if self.plan.method == "time" and tuple(reader.manifest["bounds"]) != self.plan.bounds:
            log.warning(
                "scpl.partition: time cut at layers %s this time, and %s at %s: local heads whose "
                "boundary moved start anew. To keep the cut, write it down as ranges.",
                list(self.plan.bounds), reader.folder, reader.manifest["bounds"],
            )  # fmt: skip
        with_optimizer = load_optimizer_states and not load_module_only
        for stage in self.stages:
            stage.read(reader, with_optimizer=with_optimizer)
        there = set(reader.names()) if int(reader.manifest["step"]) > 0 else set()
        self._heads_there = {s.index for s in self.stages if s.module.head_names() <= there}
        client_state = dict(reader.manifest["client_state"])
        batch_id = int(client_state.pop("batch_id", 0))
        if not load_module_only:
            self._batch_id, self.global_steps = batch_id, int(reader.manifest["step"])
            self.channel.reset("train")
        return reader.folder, client_state
