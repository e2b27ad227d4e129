"""The engine a DeepSpeed user knows: ``train_batch``, ``eval_batch``, ``save_checkpoint``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scpl_ds.batch import Evaluated, MicroBatch, Tag, as_inputs, sizes_of
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, EndOfData, Expected
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.engine_backprop import Backprop, BackpropWalk
from scpl_ds.engine_calibration import Calibration, calibrate
from scpl_ds.engine_checkpoints import Facts, Saves, open_checkpoint
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
        calibration: Calibration | None = None,
    ) -> None:
        self.stages, self.plan, self.mesh = list(stages), plan, mesh
        self._saves = Saves(mesh)
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
        self._given = self._data_iterator  # the same, without what calibrate() has put back
        self.collate: Callable[[Batch], dict[str, Tensor]] = as_inputs
        self._last_loss: Tensor | None = None
        self._calibration = calibration

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
        if self.is_first_stage() and iterator is not self._given:
            self._data_iterator = self._given = iterator

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

    @property
    def to_calibrate(self) -> bool:
        """Whether ``calibrate`` has something to do; the same on every rank."""
        return self._calibration is not None and bool(self._calibration.stages)

    def calibrate(self, data_iter: Iterator[Batch] | None = None) -> None:
        """Let local heads begin where the model, as it came, would end (objectives that ask for it,
        ``logit_lens``): the first ``train_batch`` does it, if nobody has before. Nothing is done
        where there is nothing to do; else every rank must call it.

        ``train_batch`` gets the batches again that are read here. With ``data_iter`` given they are
        read from that one, and the engine's own data stay where they are.
        """
        todo, self._calibration = self._calibration, None
        if todo is None or not todo.stages:
            return
        given = self._data_iterator if data_iter is None else data_iter
        rest = calibrate(self, given if self.is_first_stage() else None, *todo)
        if data_iter is None:
            self._data_iterator = rest

    def _load(self, number: int) -> MicroBatch:
        if self._data_iterator is None:
            raise DataError("train_batch() has no data: pass data_iter, or call set_dataiterator.")
        try:
            item = next(self._data_iterator)
        except StopIteration:
            raise EndOfData from None
        tag = Tag(self.global_steps, number, self._batch_id)
        self._batch_id += 1
        inputs = self.collate(item)
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
        call, self._eval_calls = self._eval_calls, self._eval_calls + 1
        self.channel.reset("eval")
        for n in range(num_micro_batches):
            try:
                output = self._evaluate_one(data_iter, call, n)
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

    def _evaluate_one(self, data_iter: Iterator[Batch] | None, call: int, n: int) -> Evaluated:
        if not self.is_first_stage():
            batch = self.channel.receive(Expected("eval", call, n))
        elif data_iter is None:
            raise DataError("eval_batch() has no data: pass data_iter on first-stage ranks.")
        else:
            try:
                inputs = self.collate(next(data_iter))
            except StopIteration:
                raise EndOfData from None
            batch = MicroBatch(inputs, Tag(call, n, n)).to(self.device)
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
        background: bool = False,
        on_saved: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write ``save_dir/tag`` (default ``checkpoint-<step>``), whole or not at all.

        Every rank must call it after the same number of steps; it waits for all of them.
        ``client_state`` must be plain JSON; rank 0's is kept.

        Args:
            model_files: A folder with the model's config.json and tokenizer, copied along so that
                the checkpoint can be exported.
            background: Return once everything has been copied to the host's memory; a thread
                writes it. The next save or load, or ``finish_saving``, waits for it.
            on_saved: Called on rank 0 with the folder, once it is in place.

        Raises:
            SaveError: A rank could not write its part, or that of the save before; on every rank.
        """
        self.drain()
        folder = Path(save_dir) / (tag or f"checkpoint-{self.global_steps}")
        state = {**(client_state or {}), "batch_id": self._batch_id}
        facts = Facts(
            self.global_steps, self.plan.bounds, state, save_latest, model_files, on_saved
        )
        self._saves.save(self.stages, folder, facts, background=background)
        return folder

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is being written in the background. Every rank must call it.

        Raises:
            SaveError: A rank could not write its part; on every rank.
        """
        self._saves.wait()

    def load_checkpoint(
        self,
        load_dir: str | Path,
        tag: str | None = None,
        load_optimizer_states: bool = True,
        load_module_only: bool = False,
    ) -> tuple[Path, dict[str, Any]]:
        """Restore ``load_dir/tag`` (default: what ``latest`` names) into this engine's stages.

        ``load_module_only`` takes the weights and leaves optimizer and step count as they are.
        Every rank must call it; every file is compared with its checksum before anything is loaded.

        Returns:
            The checkpoint's folder and the ``client_state`` it was saved with.

        Raises:
            CheckpointError: Missing, incomplete, damaged, or of another model.
        """
        self.drain()
        self._saves.wait()
        with_optimizer = load_optimizer_states and not load_module_only
        reader = open_checkpoint(self.mesh, Path(load_dir), tag, with_optimizer=with_optimizer)
        reader.require_layers(self.plan.bounds[-1])
        if self.plan.method == "time" and tuple(reader.manifest["bounds"]) != self.plan.bounds:
            log.warning(
                "scpl.partition: time cut at layers %s this time, and %s at %s: local heads whose "
                "boundary moved start anew. To keep the cut, write it down as ranges.",
                list(self.plan.bounds), reader.folder, reader.manifest["bounds"],
            )  # fmt: skip
        for stage in self.stages:
            stage.read(reader, with_optimizer=with_optimizer)
        if self._calibration is not None:
            self._calibration = self._calibration.without(reader.names(), self.plan.bounds)
        client_state = dict(reader.manifest["client_state"])
        batch_id = int(client_state.pop("batch_id", 0))
        if not load_module_only:
            self._batch_id, self.global_steps = batch_id, int(reader.manifest["step"])
            self.channel.reset("train")
        return reader.folder, client_state
