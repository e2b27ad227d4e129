"""A stage: a slice of the model, the objective it learns from, and the backend that shards it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from scpl_ds.batch import MicroBatch
from scpl_ds.checkpoint import Reader, Share, share_out
from scpl_ds.errors import DataError
from scpl_ds.objectives._base import Objective, StageView
from scpl_ds.objectives._targets import task_loss
from scpl_ds.optim import OptimizerState
from scpl_ds.partition.stage_module import StageOutput
from scpl_ds.sharding._base import StageBackend

log = logging.getLogger(__name__)
DetachFeatures = bool | Literal["both"]
HEADS = "scpl_heads"
AHEAD = "ahead"
EXIT = "exit_after_layer_"
"""With the number of a layer: where the local head's scores [B, C] travel in an evaluation."""


class StageBody(Protocol):
    """The slice of a model that a stage runs: ``StageModule`` (Hugging Face) or
    ``LayerListStage``."""

    start: int
    end: int
    is_first: bool
    is_last: bool
    hidden_size: int | None
    kept: frozenset[str] | None

    def __call__(
        self,
        inputs: dict[str, Tensor],
        hidden_states: Tensor | None,
        *,
        detach_features: bool = False,
    ) -> StageOutput: ...


class Watcher(Protocol):
    """Sees features [B, T, D] or [B, D], mask and labels of every micro-batch."""

    def add(self, hidden_states: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None: ...


class LocalStage(nn.Module):
    """A stage as any sharding library sees it: an ordinary module whose forward returns its loss.

    Nothing that enters carries a gradient and nothing that leaves does, so no gradient can cross a
    boundary. On the last stage ``detach_features`` says what the layers learn from:

    - ``True`` (the paper): the local objective; the task head reads detached features.
    - ``False``: the task loss, through head and layers; no local objective.
    - ``"both"``: the sum of the two.
    """

    def __init__(
        self,
        body: StageBody,
        objective: Objective | None,
        *,
        detach_features: DetachFeatures,
        ahead: StageBody | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.objective = objective
        self.ahead = ahead
        """Copies of the next layers, which the local loss looks through."""
        self.looks = False
        """In evaluation too it says what its objective would see, ``features``."""
        self.detach_features = detach_features
        if objective is not None and isinstance(body, nn.Module):
            objective.attach(body)

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden_states: Tensor | None = None,
        extras: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """One micro-batch.

        Returns:
            ``loss`` (scalar, or None where there are no labels), ``hidden_states`` (detached),
            ``logits`` (last stage, detached, else None), ``metrics`` (detached scalars) and
            ``extras`` (detached: what came, and what this stage's objective adds).
        """
        hidden = None if hidden_states is None else hidden_states.detach()
        output = self.body(inputs, hidden, detach_features=self.detach_features is True)
        view = StageView(output.hidden_states, hidden, inputs, extras or {})
        if self.objective is None:
            given: dict[str, Tensor] = {}
            parts = {} if output.loss is None else {"head_loss": output.loss}
            metrics: dict[str, Tensor] = {}
        elif self.training:
            parts, metrics, given = self._learn(self.objective, view, output)
        else:
            output, given = self._answer(self.objective, view, output)
            parts = {} if output.loss is None else {"head_loss": output.loss}
            metrics = {}
        loss = torch.stack([part.float() for part in parts.values()]).sum() if parts else None
        if loss is not None:
            metrics |= {"loss": loss.detach()}
        if "head_loss" in parts:
            metrics |= {"head_loss": parts["head_loss"].detach()}
        looked = {"features": self._behind(view).detach()} if self.looks else {}
        return looked | {
            "loss": loss,
            "hidden_states": output.hidden_states.detach(),
            "logits": None if output.logits is None else output.logits.detach(),
            "metrics": metrics,
            "extras": {**view.extras, **{name: value.detach() for name, value in given.items()}},
        }

    def _behind(self, view: StageView) -> Tensor:
        """The features that the objective sees."""
        if self.ahead is None:
            return view.hidden_states
        return self.ahead(dict(view.inputs), view.hidden_states).hidden_states

    def _learn(self, objective: Objective, view: StageView, output: StageOutput) -> Any:
        """Losses by name, metrics, and what travels on."""
        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        given: dict[str, Tensor] = {}
        if "labels" in view.inputs:
            if self.ahead is not None:
                beyond = self.ahead(dict(view.inputs), view.hidden_states)
                view = view._replace(hidden_states=beyond.hidden_states)
                if beyond.loss is not None:
                    losses["ahead_loss"] = beyond.loss
            local = objective.learn(view)
            losses["local_loss"], metrics, given = local.loss, dict(local.metrics), local.extras
        if output.loss is not None:
            losses["head_loss"] = output.loss
        return losses, metrics, given

    def _answer(self, objective: Objective, view: StageView, output: StageOutput) -> Any:
        """The output, and what travels on: this stage's answer under the layer it was given at."""
        if self.ahead is not None:
            return output, {}  # the head knows what lies behind the copies, which are not run
        answer = objective.answer(view)
        given = dict(answer.extras)
        if answer.logits is not None and self.body.is_last and objective.replaces_head:
            labels = view.inputs.get("labels")
            loss = None if labels is None else task_loss(answer.logits, labels)
            output = output._replace(logits=answer.logits, loss=loss)
        elif answer.logits is not None:
            given[f"{EXIT}{self.body.end - 1}"] = answer.logits
        return output, given

    def checkpoint_names(self) -> dict[str, str]:
        """This module's tensor names -> names in a checkpoint.

        The model's tensors keep Hugging Face's names; a local head is named by the layer it sits
        on, so that a checkpoint cut differently keeps the heads whose boundary stays. Beside
        adapters, what is frozen is in the base model's files and in no checkpoint.
        """
        head = f"{HEADS}.layer_{self.body.end - 1}."
        names = {}
        for name in self.state_dict():
            room, _, rest = name.partition(".")
            own = {"objective": head + rest, "ahead": f"{head}{AHEAD}.{rest}"}
            part = None if room == "objective" else getattr(self, room)
            if part is None or part.kept is None or rest.removeprefix("model.") in part.kept:
                names[name] = own.get(room, rest.removeprefix("model."))
        return names

    def head_names(self) -> frozenset[str]:
        """Checkpoint names of the objective's parameters."""
        names = self.checkpoint_names()
        return frozenset(
            names[ours]
            for ours, _ in self.named_parameters()
            if ours.startswith("objective.") and ours in names
        )

    def memory_names(self) -> frozenset[str]:
        """Checkpoint names of the objective's persistent buffers."""
        learned = dict(self.named_parameters())
        return frozenset(
            theirs
            for ours, theirs in self.checkpoint_names().items()
            if ours.startswith("objective.") and ours not in learned
        )


class Stage:
    """One stage of one rank: its module, its backend, its random numbers, its running totals."""

    def __init__(self, index: int, module: LocalStage, backend: StageBackend, seed: int) -> None:
        self.index, self.module, self.backend = index, module, backend
        self._seed = seed
        self._loss: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.metrics: dict[str, Tensor] = {}
        """Means over the micro-batches of the last finished step, 0-dim, on the stage's device."""
        self.logits: Tensor | None = None
        """Of the last ``evaluate``; on the last stage only."""
        self.probe: Watcher | None = None
        """Given, it sees what every ``evaluate`` computes."""

    def forward(self, batch: MicroBatch) -> MicroBatch:
        """Train-mode forward; keeps the local loss for ``backward``, returns what the next stage
        gets."""
        with self.dropout_of(batch.tag.step, batch.tag.micro_batch):
            output = self._run(batch)
        self.logits = None
        if output["loss"] is None:
            raise DataError(
                f"stage {self.index} found no 'labels' in micro-batch {batch.tag.micro_batch} "
                "of step "
                f"{batch.tag.step}; it holds {sorted(batch.inputs)}. Local objectives need labels."
            )
        self._loss = output["loss"]
        self.count(output["metrics"])
        return batch.with_hidden_states(output["hidden_states"], output["extras"])

    def count(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the numbers of one micro-batch to the step's means."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._count += 1

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[MicroBatch, Tensor | None]:
        """Eval-mode forward; returns what the next stage gets, and the task loss (last stage)."""
        self.module.eval()
        try:
            output = self._run(batch)
        finally:
            self.module.train()
        self.logits = output["logits"]
        if self.probe is not None and batch.labels is not None:
            seen = output.get("features", output["hidden_states"])
            self.probe.add(seen, batch.inputs.get("attention_mask"), batch.labels)
        return batch.with_hidden_states(output["hidden_states"], output["extras"]), output["loss"]

    def backward(self, *, last: bool) -> None:
        """Local backward of the last forward; ``last``: of the step's last micro-batch."""
        assert self._loss is not None, "backward before forward"
        loss, self._loss = self._loss, None
        self.backend.backward(loss, last=last)

    def step(self, lr: float, *, clip_to: float | None = None) -> None:
        """Optimizer step, after the last backward; arguments as :meth:`StageBackend.step`."""
        metrics = self.backend.step(lr, clip_to=clip_to)
        if self.module.objective is not None:
            self.module.objective.commit_step()
        self.close_step(metrics)

    def close_step(self, metrics: Mapping[str, Tensor]) -> None:
        """Make of the counted numbers the step's, beside ``metrics`` of the step itself."""
        self.metrics = {name: total / self._count for name, total in self._sums.items()}
        self.metrics |= {name: value.detach() for name, value in metrics.items()}
        self._sums, self._count = {}, 0

    def discard_step(self) -> None:
        """Forget the micro-batches of a step that will not be finished."""
        self.backend.discard()
        if self.module.objective is not None:
            self.module.objective.discard_step()
        self._loss, self._sums, self._count = None, {}, 0

    def _run(self, batch: MicroBatch) -> dict[str, Any]:
        return self.backend.forward(
            inputs=batch.inputs, hidden_states=batch.hidden_states, extras=batch.extras
        )

    @contextlib.contextmanager
    def dropout_of(self, step: int, micro_batch: int) -> Iterator[None]:
        """Random numbers made of (seed, step, micro-batch, first layer, dp rank), not of a running
        state: the same whatever else runs in this process or before it."""
        device = self.backend.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed_for(step, micro_batch))
            yield

    def _seed_for(self, step: int, micro_batch: int) -> int:
        first_layer, dp_rank = self.module.body.start, self.backend.mesh.dp_rank
        numbers = (self._seed, step, micro_batch, first_layer, dp_rank)
        digest = hashlib.blake2b(struct.pack("<5q", *numbers), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    # -- state, by checkpoint name ---------------------------------------------------------

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Whole tensors of this stage under their checkpoint names (a collective of the stage)."""
        names = self.module.checkpoint_names()
        return _rename(self.backend.parameters_by_name(names.keys()), names)

    def optimizer_state(self) -> OptimizerState:
        """Whole optimizer state under checkpoint names (a collective of the stage)."""
        return _rename_state(self.backend.optimizer_state(), self.module.checkpoint_names())

    def share(self) -> Share:
        """What this rank writes of the stage into a checkpoint (a collective of the stage).

        Parameters are shared out over the data-parallel ranks, with their moments. Buffers are the
        first rank's: those of an objective differ from rank to rank, and belong together.
        """
        rank, ranks = self.backend.mesh.dp_rank, self.backend.mesh.dp_size
        names, learned = self.module.checkpoint_names(), dict(self.module.named_parameters())
        sizes = {name: self.backend.shapes[name].numel() for name in names if name in learned}
        owner = share_out(sizes, ranks)
        keep = {name for name in names if owner.get(name, 0) == rank}
        tensors = _rename(self.backend.parameters_by_name(names.keys(), keep=keep), names)
        state = _rename_state(self.backend.optimizer_state(keep=keep), names)
        return Share(self.index, tensors, state, rank, ranks)

    def write_own_files(self, folder: Path, tag: str) -> list[Path]:
        """The backend's own files, if it has a format (a collective of the stage); returns those
        of this rank.

        Raises:
            OSError: One could not be written.
        """
        return self.backend.write_own_files(folder, tag, self.module.checkpoint_names())

    def read(self, reader: Reader, *, with_optimizer: bool = True) -> None:
        """Take this stage's tensors, and optimizer state, from a checkpoint, whatever its cut.

        Raises:
            CheckpointError: A tensor of the model is missing or has another shape.
        """
        self.discard_step()
        own = {theirs: ours for ours, theirs in self.module.checkpoint_names().items()}
        shapes = {theirs: self.backend.shapes[ours] for theirs, ours in own.items()}
        memory = self.module.memory_names()
        tensors = reader.tensors([name for name in own if name not in memory], shapes)
        tensors |= self._read_memory(reader, {name: shapes[name] for name in memory})
        self.backend.load_parameters(_rename(tensors, own))
        if with_optimizer:
            self.backend.load_optimizer_state(_rename_state(reader.optimizer_state(own), own))

    def _read_memory(self, reader: Reader, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """The objective's buffers, all or none: they are what it remembers of earlier micro-batches
        and not what it learned, so a checkpoint with other ones still fits."""
        if self.module.objective is not None:
            self.module.objective.forget()
        found = reader.tensors(set(shapes) & set(reader.names()))
        if all(name in found and found[name].shape == shape for name, shape in shapes.items()):
            return found
        log.warning(
            "%s does not hold what the local objective of stage %d remembers, or not in this size "
            "(%s): it starts with an empty memory.",
            reader.folder, self.index,
            ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())),
        )  # fmt: skip
        return {}


def _rename(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor for name, tensor in tensors.items() if name in names}


def _rename_state(state: OptimizerState, names: Mapping[str, str]) -> OptimizerState:
    moments = {key: _rename(by_name, names) for key, by_name in state.moments.items()}
    return dataclasses.replace(state, moments=moments)


def exits_of(batch: MicroBatch) -> dict[int, Tensor]:
    """Layer -> scores [B, C] of the local head behind it, of an evaluated micro-batch."""
    found = [name for name in batch.extras if name.startswith(EXIT)]
    return {int(name.removeprefix(EXIT)): batch.extras[name] for name in found}


def as_body(module: nn.Module) -> StageBody:
    """Say to the type checker what ``StageModule`` and ``LayerListStage`` both are."""
    return cast(StageBody, module)
