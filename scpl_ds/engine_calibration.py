"""Before the first step: local heads that begin from what the model, as it came, makes of data.

The first micro-batches go through all stages without training. Each stage keeps its features at
positions that are taught, the last stage what its language-model head reads there, and sends it
to the others: the only numbers that ever go back, and never a gradient.
"""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scpl_ds.distributed.collectives import (
    add_up_stage,
    first_ranks_values,
    gather_objects,
    rows_of_last_rank,
)
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import OtherRankFailed, RecipeError
from scpl_ds.objectives._base import IGNORED_LABEL, StageView
from scpl_ds.objectives._tokens import next_tokens
from scpl_ds.stage import Stage

log = logging.getLogger(__name__)
_MICRO_BATCHES = 64
"""Most that are read for it, however few of their positions are taught."""
_NAME = "its calibration"

Inputs = Mapping[str, Tensor]


class ReadAhead:
    """An iterator's next micro-batches, read before they are trained on, and given when they are
    due. The iterator itself is asked with ``next`` alone: those of DeepSpeed begin anew with
    ``iter``."""

    def __init__(self, collate: Callable[[Any], dict[str, Tensor]]) -> None:
        self._collate = collate
        self._source: Any = None
        self._waiting: collections.deque[dict[str, Tensor]] = collections.deque()

    def next(self, source: Iterator[Any]) -> dict[str, Tensor]:
        """The next inputs of an iterator; those read ahead of it come first.

        Raises:
            StopIteration: It has ended.
        """
        if source is self._source and self._waiting:
            return self._waiting.popleft()
        return self._collate(next(source))

    def read(self, source: Iterator[Any], count: int) -> Iterator[dict[str, Tensor]]:
        """At most ``count`` of the inputs that ``next`` will give, which stay due."""
        if source is not self._source:
            self._source, self._waiting = source, collections.deque()
        for n in range(count):
            if n == len(self._waiting):
                try:
                    self._waiting.append(self._collate(next(source)))
                except StopIteration:
                    return
            yield self._waiting[n]

    def forget(self) -> None:
        """Nothing is due: whoever reads goes back in the data himself."""
        self._source = None
        self._waiting.clear()


class Streamer(Protocol):
    """What of an engine is needed here."""

    stages: list[Stage]
    mesh: Mesh

    def is_first_stage(self) -> bool: ...
    def is_last_stage(self) -> bool: ...
    def evaluate_inputs(
        self, inputs: Iterator[Inputs] | None, num_micro_batches: int
    ) -> Iterator[Any]: ...


class _Watcher:
    """Keeps of one stage, at the first positions that are taught, its features and, on the last
    stage, what the language-model head reads."""

    def __init__(self, stage: Stage, most: int, *, features: bool, head: bool) -> None:
        self._stage, self._most, self._features = stage, most, features
        self._head = _head_of(stage) if head else None
        self._given: list[Any] = []
        self.count = 0
        self.rows: list[Tensor] = []
        self.read: list[Tensor] = []
        self._products = [0.0, 0.0]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While the stages run."""
        handle = None
        if self._head is not None:
            handle = self._head.register_forward_hook(
                lambda _, inputs, output: self._given.append((inputs[0], output))
            )
        self._stage.probe, self._stage.module.looks = self, self._features
        try:
            yield
        finally:
            self._stage.probe, self._stage.module.looks = None, False
            if handle is not None:
                handle.remove()

    def add(self, hidden_states: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
        """One micro-batch: [B, T, D], its mask [B, T], next tokens [B, T]."""
        view = StageView.of(hidden_states, attention_mask, labels)
        places = (next_tokens(_NAME, view) != IGNORED_LABEL).nonzero()[: self._most - self.count]
        b, t = places.unbind(1)
        self.count += len(places)
        if self._features:
            self.rows.append(hidden_states[b, t].float().cpu())
        if self._head is not None:
            inputs, output = self._heard()
            self.read.append(inputs[b, t].float().cpu())
            logits = self._stage.logits
            assert logits is not None
            # Of as many positions as there are texts, all real: padding may hold anything.
            b, t = b[: len(labels)], t[: len(labels)]
            raw, said = output[b, t].double(), logits[b, t].double()  # [n, V]
            whole = raw.isfinite().all(1) & said.isfinite().all(1)
            self._products[0] += float((raw * said)[whole].sum())
            self._products[1] += float((raw * raw)[whole].sum())

    def _heard(self) -> tuple[Tensor, Tensor]:
        if len(self._given) != 1:
            raise RecipeError(
                f"scpl.objective: {_NAME} listens to the language-model head "
                f"({type(self._head).__name__}), which this model called {len(self._given)} times "
                "in one forward, not once. Set calibration: 0 in scpl.objective."
            )
        return self._given.pop()

    def targets(self) -> Tensor:
        """[n, E], at the length at which the head's product is nearest to the model's scores: some
        models scale or bound them."""
        said, raw = self._products
        return torch.cat(self.read) * (said / raw if raw else 1.0)


def _head_of(stage: Stage) -> nn.Module:
    model: Any = getattr(stage.module.body, "model", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise RecipeError(
            f"scpl.objective: {_NAME} needs a model with a language-model head, and "
            f"{type(model).__name__} has none. Use model.task: causal-lm."
        )
    return head


def calibrate(
    engine: Streamer, source: Iterator[Any] | None, ahead: ReadAhead, own: Mapping[int, int]
) -> bool:
    """Fit local heads; a collective of all ranks.

    Args:
        engine: Whose stages.
        source: The training data; read on first-stage ranks.
        ahead: Reads it, and gives what was read to training.
        own: This rank's stages to fit -> positions that their heads want, over all ranks.

    Returns:
        Whether nothing is left to do; False where there were no data.
    """
    mesh = engine.mesh
    everyone: dict[int, int] = {}
    for part in gather_objects(mesh, dict(own)):
        everyone |= part
    if not everyone:
        return True
    wanted = -(-max(everyone.values()) // mesh.dp_size)
    enough = _agree(mesh, lambda: None if source is None else _enough(source, ahead, wanted))
    # All lanes read equally many: stages that are sharded meet in every forward.
    most = max((n for n in enough if n is not None), default=0)
    there = _agree(mesh, lambda: None if source is None else len([*ahead.read(source, most)]))
    count = min((n for n in there if n is not None), default=0)
    if count == 0:
        return False
    if source is not None and engine.is_first_stage():
        inputs = ahead.read(source, count)
        labelled = all(batch.get("labels") is not None for batch in ahead.read(source, count))
    else:
        inputs, labelled = None, True
    if not all(gather_objects(mesh, labelled)):
        return False  # training says it better
    positions = _fit(engine, inputs, count, own, wanted)
    if mesh.rank == 0:
        say = log.info if positions else log.warning
        say(
            "local heads of stages %s begin from %d positions of %d micro-batches%s",
            ", ".join(map(str, sorted(everyone))), positions, count * mesh.dp_size,
            "" if positions else ": none of them is taught, so they begin as the identity",
        )  # fmt: skip
    return True


def _agree(mesh: Mesh, work: Callable[[], int | None]) -> list[int | None]:
    """What the work gives on every rank; where it fails, that rank's error there and a word of it
    everywhere else."""
    found: int | None = None
    error: Exception | None = None
    try:
        found = work()
    except Exception as problem:  # whatever data sets raise
        error = problem
    said = None if error is None else f"{type(error).__name__}: {error}"
    results = gather_objects(mesh, (found, said))
    if error is not None:
        raise error
    for rank, (_, text) in enumerate(results):
        if text is not None:
            raise OtherRankFailed(f"rank {rank} found the problem: {text}")
    return [value for value, _ in results]


def _enough(source: Iterator[Any], ahead: ReadAhead, wanted: int) -> int:
    """How many micro-batches hold so many positions that are taught."""
    count = found = 0
    for inputs in ahead.read(source, _MICRO_BATCHES):
        count += 1
        found += _taught(inputs)
        if found >= wanted:
            break
    return count


def _taught(inputs: Inputs) -> int:
    """How many positions of a micro-batch have a next token to be taught."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if labels is None or labels.ndim != 2:
        return 0
    view = StageView.of(labels[..., None].float(), mask, labels)
    return int((next_tokens(_NAME, view) != IGNORED_LABEL).sum())


def _fit(
    engine: Streamer,
    inputs: Iterator[Inputs] | None,
    count: int,
    own: Mapping[int, int],
    wanted: int,
) -> int:
    """Run the micro-batches and fit; how many positions of all lanes there were."""
    mesh = engine.mesh
    last = engine.stages[-1] if engine.is_last_stage() else None
    watchers = {
        stage.index: _Watcher(stage, wanted, features=stage.index in own, head=stage is last)
        for stage in engine.stages
        if stage.index in own or stage is last
    }
    with contextlib.ExitStack() as stack:
        for watcher in watchers.values():
            stack.enter_context(watcher.listening())
        for _ in engine.evaluate_inputs(inputs, count):
            pass
    targets = rows_of_last_rank(mesh, None if last is None else watchers[last.index].targets())
    positions = sum(gather_objects(mesh, len(targets) if mesh.pp_rank == 0 else 0))
    for stage in engine.stages:
        if positions == 0 or stage.index not in own:
            continue
        objective, rows = stage.module.objective, torch.cat(watchers[stage.index].rows)
        assert objective is not None
        found = objective.calibrate(rows, targets, lambda sums: add_up_stage(mesh, sums))
        found = first_ranks_values(mesh, found)
        stage.backend.load_parameters({f"objective.{n}": value for n, value in found.items()})
    return positions
