"""What ``scpl-ds bench pipeline`` measures: this package's engine in four ways, and its rivals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from scpl_ds.baselines import RIVALS, Job, Rival, make_rival
from scpl_ds.batch import MicroBatch, Tag
from scpl_ds.bench.emulate import EmulatedBody, Lengths, emulated_engine
from scpl_ds.bench.ranks import System
from scpl_ds.build import build_engine
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel, Expected
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.partition.loading import load_stage
from scpl_ds.partition.plan import make_plan
from scpl_ds.partition.random_model import SIZES, write_random_model
from scpl_ds.partition.stage_module import StageModule
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.registry import did_you_mean
from scpl_ds.setup import Model, cut_model, make_engine
from scpl_ds.stage import as_body
from scpl_ds.timeline import Timeline

TASK = "sequence-classification"
LR = 1e-5
SEED = 42
_BATCHES = 8
"""Ready-made micro-batches, taken in turn."""


def cut(model_path: str, stages: int) -> Model:
    """The model that all systems train, cut as a user's recipe would."""
    return cut_model(_recipe(model_path, stages, 1, 1, 1, sharding="none"))


def _recipe(
    model_path: str, stages: int, micro_batch: int, accumulate: int, length: int, **scpl: Any
) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"name_or_path": model_path, "num_labels": 2, "task": TASK},
            "scpl": {"stages": stages, **scpl},
            "deepspeed": {
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulate,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "AdamW", "params": {"lr": LR}},
            },
            "data": {"name": "demo", "max_length": length},
            "train": {"lr_scheduler_type": "constant", "seed": SEED},
        },
        where="the benchmark's recipe",
    )


@dataclasses.dataclass(frozen=True)
class Task:
    """What every system trains in one cell of the table.

    B samples a micro-batch, M micro-batches a step, T positions, D hidden size.
    """

    model: Model
    """Cut into stages. Emulated stages take its width and vocabulary only."""
    stages: int
    num_micro_batches: int
    micro_batch_size: int
    sequence_length: int
    lengths: Lengths | None = None
    """Given, every stage sleeps instead of computing."""
    data_parallel: int = 1
    """Ranks of a stage, which share the samples of a micro-batch."""

    @property
    def lane(self) -> int:
        """Samples of a micro-batch that one rank takes."""
        return self.micro_batch_size // self.data_parallel

    @property
    def rows(self) -> int:
        """Samples of one optimizer step, M x B."""
        return self.num_micro_batches * self.micro_batch_size

    @property
    def hidden_size(self) -> int:
        return self.model.anatomy.hidden_size

    def recipe(self, **scpl: Any) -> Recipe:
        """The recipe that a user would write for it."""
        return _recipe(
            self.model.path,
            self.stages,
            self.lane,
            self.num_micro_batches,
            self.sequence_length,
            **{"sharding": "none" if self.data_parallel == 1 else "ddp", **scpl},
        )

    def in_one_batch(self) -> Task:
        """The same samples a step in one micro-batch, M times as large."""
        return dataclasses.replace(self, num_micro_batches=1, micro_batch_size=self.rows)

    def batches(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """Random text without padding and random labels, ``rows`` samples each, for ever; made
        before this returns."""
        generator = torch.Generator().manual_seed(SEED)
        vocab_size = self.model.config.get_text_config().vocab_size
        made: list[dict[str, Tensor]] = []
        for _ in range(_BATCHES):
            shape = (rows, self.sequence_length)
            ids = torch.randint(1, vocab_size, shape, generator=generator)
            labels = torch.randint(0, 2, (rows,), generator=generator)
            made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            made[-1]["labels"] = labels
        return itertools.cycle(made)


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to build a system, and what it is."""

    build: Callable[[Task, Mesh, torch.device], System]
    kind: str
    """``ours``, ``pipeline`` (a rival that cuts the model into stages) or ``whole`` (no stages)."""
    flushed: bool = True
    """Every step ends before the next begins, so that few steps show how fast it is."""
    alone: bool = False
    """Its ranks do not wait for each other: the slowest one's own time counts."""


class ScplSystem:
    """The engine as a user's script drives it."""

    def __init__(self, engine: Engine, data: Iterator[dict[str, Tensor]]) -> None:
        self._engine = engine
        engine.set_dataiterator(data)

    @property
    def timeline(self) -> Timeline:
        return self._engine.timeline

    @property
    def bytes_sent(self) -> int:
        return self._engine.channel.bytes_sent

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._engine.train_batch()
        self._engine.drain()


class ReadyChannel(BoundaryChannel):
    """A boundary that costs nothing: what is asked for is there, what is sent is forgotten.

    Args:
        inputs: What micro-batches hold, in turn.
        hidden: Hidden states of every micro-batch, [B, T, D].
    """

    def __init__(
        self, *args: Any, inputs: Iterator[dict[str, Tensor]], hidden: Tensor, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._inputs, self._hidden = inputs, hidden

    def send(self, batch: MicroBatch, phase: str) -> None:
        pass

    def receive(self, expected: Expected) -> MicroBatch:
        tag = Tag(expected.step, expected.micro_batch, 0)
        return MicroBatch(next(self._inputs), tag, self._hidden)


def _load(task: Task, start: int, end: int) -> StageModule:
    """Layers ``[start, end)`` with the weights of the folder."""
    path, anatomy, config = task.model.path, task.model.anatomy, task.model.config
    return load_stage(
        path, TASK, anatomy, start, end, config=config, dtype=torch.float32, seed=SEED
    )


def _engine(task: Task, mesh: Mesh, device: torch.device, **scpl: Any) -> Engine:
    recipe = task.recipe(**scpl)
    if task.lengths is not None:
        return emulated_engine(recipe, task.lengths, task.hidden_size, mesh, device)
    return make_engine(recipe, task.model, mesh, device, total_steps=2)


def _stream(task: Task, mesh: Mesh, device: torch.device) -> System:
    return ScplSystem(_engine(task, mesh, device), task.batches(task.lane))


def _step(task: Task, mesh: Mesh, device: torch.device) -> System:
    engine = _engine(task, mesh, device, sync="step")
    return ScplSystem(engine, task.batches(task.lane))


def _authors(task: Task, mesh: Mesh, device: torch.device) -> System:
    return _step(task.in_one_batch(), mesh, device)


def _alone(task: Task, mesh: Mesh, device: torch.device) -> System:
    recipe, data = task.recipe(), task.batches(task.lane)
    shape = (task.lane, task.sequence_length, task.hidden_size)
    channel = functools.partial(ReadyChannel, inputs=data, hidden=torch.randn(shape))
    if task.lengths is not None:
        engine = emulated_engine(
            recipe, task.lengths, task.hidden_size, mesh, device, make_channel=channel
        )
        return ScplSystem(engine, data)
    plan = task.model.plan
    engine = build_engine(
        plan,
        lambda k: as_body(_load(task, *plan.span(k))),
        recipe.scpl,
        recipe.deepspeed,
        mesh,
        device,
        num_labels=2,
        seed=SEED,
        lr_at=lambda step: LR,
        make_channel=channel,
    )
    return ScplSystem(engine, data)


OURS: dict[str, Entry] = {
    "stage-alone": Entry(_alone, "ours", flushed=False, alone=True),
    "scpl-stream": Entry(_stream, "ours", flushed=False),
    "scpl-step": Entry(_step, "ours"),
    "authors": Entry(_authors, "ours"),
}
"""``scpl-stream``: the engine as users get it. ``scpl-step``: flushed every step. ``authors``: the
scheme of minyaho/SCPL, which joins all stages after every batch and has no micro-batches: the
step's rows as one batch. ``stage-alone``: what a rank could do if it never waited for a message."""


class RivalSystem:
    """A rival that is given the whole step's rows on every rank."""

    def __init__(self, rival: Rival, data: Iterator[dict[str, Tensor]]) -> None:
        self._rival, self._data = rival, data

    @property
    def timeline(self) -> Timeline:
        return self._rival.timeline

    @property
    def bytes_sent(self) -> int:
        return self._rival.bytes_sent

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._rival.train_batch(next(self._data))
        self._rival.finish()


def _rival(name: str, task: Task, mesh: Mesh, device: torch.device) -> System:
    """The rival over the same layers with the same weights, cut for as many stages as it wants."""
    lengths = task.lengths

    def body(start: int, end: int) -> StageModule:
        if lengths is not None:
            width = task.hidden_size
            made = EmulatedBody(start, end, task.stages, width, lengths, local_loss=False)
            return cast(StageModule, made)
        return _load(task, start, end)

    def spans(stages: int) -> Sequence[tuple[int, int]]:
        if lengths is not None:
            return [(k, k + 1) for k in range(stages)]
        plan = make_plan(task.model.anatomy, stages)
        return [plan.span(k) for k in range(stages)]

    job = Job(
        make_body=body,
        cut=spans,
        hidden_size=task.hidden_size,
        num_micro_batches=task.num_micro_batches,
        micro_batch_size=task.micro_batch_size,
        sequence_length=task.sequence_length,
        lr=LR,
        device=device,
    )
    return RivalSystem(make_rival(name, job, mesh), task.batches(task.rows))


_WHOLE = frozenset({"single", "ddp", "zero", "zero3"})
EMULATED_RIVALS = ("naive", "torch-gpipe", "torch-1f1b", "deepspeed-1f1b")


def entries() -> dict[str, Entry]:
    """Every system there is, by name."""
    rivals = {
        name: Entry(functools.partial(_rival, name), "whole" if name in _WHOLE else "pipeline")
        for name in RIVALS
    }
    # Neighbours in time are compared best: the one that all are compared with comes first.
    first = {"deepspeed-1f1b": rivals.pop("deepspeed-1f1b")}
    return {**first, **OURS, **rivals}


def choose(
    asked: Sequence[str] | None, known: Mapping[str, Entry], *, emulated: bool
) -> tuple[str, ...]:
    """Names of the systems to measure; None: all that there are.

    Raises:
        RecipeError: A name that there is not, or whose stages cannot be emulated.
    """
    possible = [
        name
        for name, entry in known.items()
        if not emulated or entry.kind == "ours" or name in EMULATED_RIVALS
    ]
    for name in asked or ():
        if name in known and name not in possible:
            raise RecipeError(
                f"--systems {name}: its stages cannot sleep. With --emulate: {', '.join(possible)}."
            )
        if name not in known:
            raise RecipeError(
                f"--systems: unknown system '{name}'{did_you_mean(name, possible) or '.'} "
                f"Known: {', '.join(possible)}."
            )
    return tuple(dict.fromkeys(asked or possible))


def model_folder(model: str, folder: Path) -> str:
    """Where the model lies: ``model`` itself, or what was written into ``folder`` if it is a name
    of ``partition.random_model.SIZES``."""
    if model not in SIZES:
        return model
    write_random_model(model, folder)
    return str(folder)
