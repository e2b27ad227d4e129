"""The engine a DeepSpeed user knows: ``train_batch``, ``eval_batch``, ``save_checkpoint``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from scpl_ds.batch import MicroBatch, Tag, as_inputs, sizes_of
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, EndOfData
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.engine_backprop import Backprop, BackpropWalk
from scpl_ds.engine_calibration import ReadAhead, calibrate
from scpl_ds.engine_checkpoints import Facts, Saves, open_checkpoint
from scpl_ds.engine_evaluation import EngineEvaluation
from scpl_ds.engine_step import StepWalk
from scpl_ds.errors import DataError
from scpl_ds.partition.plan import PartitionPlan
from scpl_ds.schedules import Schedule
from scpl_ds.stage import Stage
from scpl_ds.timeline import Timeline

log = logging.getLogger(__name__)
Batch = Mapping[str, Tensor] | Sequence[Any] | Tensor


class Engine(EngineEvaluation):
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
        self.on_error: Callable[[BaseException], None] | None = None
        """Told of what ends a ``train_batch`` before the other ranks are waited for."""
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
            if self.on_error is not None:
                self.on_error(error)
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

    def settle_saving(self, limit_s: float) -> None:
        """Let this rank's thread go on with a checkpoint for at most so long: after an error, when
        the others cannot be waited for. Never raises."""
        self._saves.settle(limit_s)

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
        there = set(reader.names()) if int(reader.manifest["step"]) > 0 else set()
        self._heads_there = {s.index for s in self.stages if s.module.head_names() <= there}
        client_state = dict(reader.manifest["client_state"])
        batch_id = int(client_state.pop("batch_id", 0))
        if not load_module_only:
            self._batch_id, self.global_steps = batch_id, int(reader.manifest["step"])
            self.channel.reset("train")
        return reader.folder, client_state
