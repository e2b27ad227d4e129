"""Before the first step: local heads that begin from what the model, as it came, makes of data.

The first micro-batches go through all stages without training. Each stage keeps its features at
positions that are taught, the last stage what its language-model head reads there, and sends it
to the others: the only numbers that ever go back, and never a gradient.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from scpl_ds.distributed.collectives import add_up_stage, broadcast_rows, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import OtherRankFailed
from scpl_ds.objectives._base import IGNORED_LABEL, StageView
from scpl_ds.objectives._tokens import next_tokens
from scpl_ds.recipe_scpl import ScplSection
from scpl_ds.stage import HEADS, Stage

log = logging.getLogger(__name__)
_MICRO_BATCHES = 64
"""Most that are read for it, however few of their positions are taught."""


class Calibration(NamedTuple):
    """What is to be done, the same on every rank."""

    stages: frozenset[int]
    positions: int
    """Over all data-parallel ranks."""

    @classmethod
    def of(cls, scpl: ScplSection) -> Calibration | None:
        """What a recipe asks for; None: nothing."""
        positions = 0 if scpl.method == "bp" else scpl.objective.calibration()
        stages = frozenset(k for k in range(scpl.stages) if scpl.has_objective(k))
        return cls(stages, positions) if stages and positions else None

    def without(self, names: Collection[str], bounds: Sequence[int]) -> Calibration:
        """What is left where a checkpoint has tensors of these names."""
        heads = {k: f"{HEADS}.layer_{bounds[k + 1] - 1}." for k in self.stages}
        there = {k for k, head in heads.items() if any(name.startswith(head) for name in names)}
        return self._replace(stages=self.stages - there)


class Streamer(Protocol):
    """What of an engine is needed here."""

    stages: list[Stage]
    mesh: Mesh

    def is_first_stage(self) -> bool: ...
    def is_last_stage(self) -> bool: ...
    def collate(self, item: Any, /) -> dict[str, Tensor]: ...
    def evaluate(self, data_iter: Any, num_micro_batches: int) -> Iterator[Any]: ...


class _Features:
    """What a stage's objective sees at positions that are taught."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def add(self, hidden_states: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
        """One micro-batch: [B, T, D], its mask [B, T], next tokens [B, T]."""
        view = StageView.of(hidden_states, attention_mask, labels)
        taught = next_tokens("calibration", view) != IGNORED_LABEL
        self.rows.append(hidden_states[taught].float().cpu())


class _HeadInputs(_Features):
    """What the language-model head reads there, times what makes its product with the head's matrix
    nearest to the model's scores: some models scale or bound them."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self._stage = stage
        self._read: list[Tensor] = []
        self._products = [0.0, 0.0]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While the model's forward runs."""
        model: Any = self._stage.module.body
        head: nn.Module = model.model.get_output_embeddings()
        handle = head.register_forward_hook(
            lambda _, inputs, output: self._read.extend((inputs[0], cast(Any, output)))
        )
        try:
            yield
        finally:
            handle.remove()

    def add(self, hidden_states: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
        inputs, output = self._read
        self._read.clear()
        del hidden_states  # of the last layer: before the model's last norm
        super().add(inputs, attention_mask, labels)
        logits = self._stage.logits
        assert logits is not None
        raw, said = output[:, 0].double(), logits[:, 0].double()  # [B, V]: of one position each
        self._products[0] += float((raw * said).sum())
        self._products[1] += float((raw * raw).sum())

    def targets(self) -> Tensor:
        said, raw = self._products
        return torch.cat(self.rows) * (said / raw if raw else 1.0)


def calibrate(
    engine: Streamer,
    data_iter: Iterator[Any] | None,
    stages: Collection[int],
    positions: int,
) -> Iterator[Any] | None:
    """Fit the local heads of ``stages``, on at least so many positions where there are any; a
    collective of all ranks.

    Args:
        engine: Whose stages.
        data_iter: The training data; read on first-stage ranks.
        stages: Indices; the same on every rank.
        positions: Over all data-parallel ranks.

    Returns:
        ``data_iter``, with what was read put back.
    """
    mesh, wanted = engine.mesh, -(-positions // engine.mesh.dp_size)
    peeked: list[Any] = []
    error: Exception | None = None
    if data_iter is not None:
        try:
            _peek(engine, data_iter, peeked, wanted=wanted)
        except Exception as found:  # whatever data sets raise
            error = found
    failed = [rank for rank, bad in enumerate(gather_objects(mesh, error is not None)) if bad]
    if error is not None:
        raise error
    if failed:
        raise OtherRankFailed(f"rank {failed[0]} found the problem.")
    # All lanes read equally many: stages that are sharded meet in every forward.
    count = max(gather_objects(mesh, len(peeked)))
    if data_iter is not None:
        peeked += itertools.islice(data_iter, count - len(peeked))
    counts = [n for n in gather_objects(mesh, len(peeked)) if n]
    count = min(counts, default=0)
    if count:
        _fit(engine, iter(peeked[:count]), count, stages)
    return None if data_iter is None else itertools.chain(peeked, data_iter)


def _peek(engine: Streamer, data: Iterator[Any], peeked: list[Any], *, wanted: int) -> None:
    found = 0
    while found < wanted and len(peeked) < _MICRO_BATCHES:
        item = next(data, None)
        if item is None:
            return
        peeked.append(item)
        found += _taught(engine.collate(item))


def _taught(inputs: Mapping[str, Tensor]) -> int:
    """How many positions of a micro-batch have a next token to be taught."""
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    if labels is None or labels.ndim != 2:
        return 0
    hidden = labels[..., None].float()
    return int(
        (next_tokens("calibration", StageView.of(hidden, mask, labels)) != IGNORED_LABEL).sum()
    )


def _fit(engine: Streamer, items: Iterator[Any], count: int, stages: Collection[int]) -> None:
    mesh = engine.mesh
    own = [
        stage
        for stage in engine.stages
        if stage.index in stages and stage.module.objective is not None
    ]
    seen = {stage.index: _Features() for stage in own}
    head = _HeadInputs(engine.stages[-1]) if engine.is_last_stage() else None
    with contextlib.ExitStack() as stack:
        for stage in own:
            stage.probe = seen[stage.index]
            stage.module.looks = True
        if head is not None:
            engine.stages[-1].probe = head
            stack.enter_context(head.listening())
        try:
            for _ in engine.evaluate(items if engine.is_first_stage() else None, count):
                pass
        finally:
            for stage in engine.stages:
                stage.probe, stage.module.looks = None, False
    targets = broadcast_rows(mesh, None if head is None else head.targets())
    for stage in own:
        objective, rows = stage.module.objective, torch.cat(seen[stage.index].rows)
        assert objective is not None
        found = objective.calibrate(rows, targets, lambda sums: add_up_stage(mesh, sums))
        stage.backend.load_parameters({f"objective.{n}": value for n, value in found.items()})
    if mesh.rank == 0:
        log.info(
            "local heads of stages %s begin from what the model makes of %d micro-batches",
            ", ".join(map(str, sorted(stages))), count * mesh.dp_size,
        )  # fmt: skip
