"""A checkpoint of any shape and backend goes on under any other: the same parameters, moments and
place, and the same next steps where the cut is the same."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scpl_ds
from scpl_ds.checkpoint import HEAD_PREFIX, Reader
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.prepared import saved_position
from scpl_ds.distributed.collectives import gather_objects
from tests.support import runs
from tests.support.distributed import run_ranks

pytestmark = [pytest.mark.forks, pytest.mark.timeout(900)]

PERSISTENT = {"stage3_param_persistence_threshold": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "none-3-stages": {"stages": 3, "sharding": "none"},
    "none-2-ranks": {"stages": 2, "sharding": "none", "pipeline_ranks": 2},
    "ddp": {"stages": 2, "sharding": "ddp", "dp": 2},
    "fsdp": {"stages": 2, "sharding": "fsdp", "zero": {"stage": 3}, "dp": 2},
    "zero1": {"stages": 1, "sharding": "deepspeed", "zero": {"stage": 1}, "dp": 2},
    "zero2": {"stages": 2, "sharding": "deepspeed", "zero": {"stage": 2}, "pipeline_ranks": 2},
    "zero3": {"stages": 3, "sharding": "deepspeed", "zero": {"stage": 3, **PERSISTENT}, "dp": 2},
}
"""Stages, ranks to place them on, data-parallel ranks."""
BEFORE, AFTER = 2, 5
"""Steps until the checkpoint, and from there."""
SAMPLES, GLOBAL_BATCH = 40, 2 * runs.MICRO_BATCH
"""Three steps to an epoch: the checkpoint lies within the first, the last step in the third."""
PLACE = {"epoch": 0, "consumed": 24, "num_samples": SAMPLES, "seed": 5, "grouped_by": 0}
NEAR = {"rtol": 1e-4, "atol": 1e-6}
"""Another backend, or number of ranks, adds gradients up in another order."""


def ranks(shape: str) -> int:
    return SHAPES[shape].get("dp", 1) * SHAPES[shape].get("pipeline_ranks", 1)


def build(shape: str) -> scpl_ds.Engine:
    """Without dropout, and two micro-batches a step however many ranks share them: every shape of
    a cut computes the same step."""
    options = {"pipeline_ranks": 1, "dp": 1, "zero": {"stage": 0}, **SHAPES[shape]}
    accumulation, zero = 2 // options.pop("dp"), options.pop("zero")
    config = runs.config(accumulation=accumulation, eps=1e-4, **options)
    config["zero_optimization"] = dict(zero)
    model = runs.model(dropout=0.0)
    return scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine


def samples() -> list[dict[str, Tensor]]:
    rows = next(runs.batches(rows=SAMPLES))
    return [{name: column[k] for name, column in rows.items()} for k in range(SAMPLES)]


def loader(engine: scpl_ds.Engine) -> BatchLoader:
    return BatchLoader(
        samples(),
        micro_batch_size=runs.MICRO_BATCH,
        dp_rank=engine.mesh.dp_rank,
        dp_size=engine.mesh.dp_size,
        seed=PLACE["seed"],
        shuffle=True,
        collate=torch.utils.data.default_collate,
        drop_last=True,
        global_batch_size=GLOBAL_BATCH,
    )


def train(engine: scpl_ds.Engine, batches: Iterator[Any], steps: int) -> list[dict[str, float]]:
    """Of every step and stage the loss, mean over data-parallel ranks."""
    told = []
    for _ in range(steps):
        engine.train_batch(batches)
        told.append({f"stage-{s.index}": float(s.metrics["loss"]) for s in engine.stages})
    means = []
    for ranks in zip(*gather_objects(engine.mesh, told), strict=True):
        pairs = sorted(pair for own in ranks for pair in own.items())
        by_stage = itertools.groupby(pairs, key=lambda pair: pair[0])
        means.append({name: statistics.fmean(v for _, v in found) for name, found in by_stage})
    return means


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of each shape, once: ``checkpoint-2`` and, of the run that went on, ``checkpoint-7``."""
    root = tmp_path_factory.mktemp("matrix")

    def of(shape: str) -> Path:
        folder = root / shape

        def body() -> None:
            engine = build(shape)
            read = loader(engine)
            batches = iter(read) if engine.is_first_stage() else None
            for steps in (BEFORE, AFTER):
                losses = train(engine, batches, steps)
                state = {"data": saved_position(read, engine.mesh), "losses": losses}
                engine.save_checkpoint(folder, client_state=state)
            check_against_files(engine, Reader(folder / f"checkpoint-{BEFORE + AFTER}"))

        if not folder.exists():
            run_ranks(ranks(shape), body, limit_s=240)
        return folder

    return of


def everything(reader: Reader, names: list[str]) -> dict[str, Tensor]:
    """Parameters, buffers and moments of a checkpoint, read without any engine."""
    state = reader.optimizer_state(names)
    moments = {f"{k}/{n}": t for k, found in state.moments.items() for n, t in found.items()}
    return reader.tensors(names) | moments


def check_against_files(engine: scpl_ds.Engine, reader: Reader) -> None:
    """This rank's stages hold what the files do, to the bit: all but heads that are not there."""
    held = set(reader.names())
    for stage in engine.stages:
        own, state = stage.parameters_by_name(), stage.optimizer_state()
        lost = [name for name in own if name not in held]
        assert all(name.startswith(HEAD_PREFIX) for name in lost), lost
        own |= {f"{k}/{n}": t for k, some in state.moments.items() for n, t in some.items()}
        wanted = everything(reader, [name for name in own if name in held])
        assert any("exp_avg_sq/" in name for name in wanted) and wanted.keys() <= own.keys()
        runs.assert_equal({name: own[name] for name in wanted}, wanted)
        assert state.step == reader.manifest["step"]


def check_went_on(
    engine: scpl_ds.Engine, read: BatchLoader, losses: Any, wanted: Reader, **near: float
) -> None:
    """Every step's losses, and in the end parameters, moments and place, are as in ``wanted``."""
    told = wanted.manifest["client_state"]
    assert len(losses) == AFTER
    for found, expected in zip(losses, told["losses"], strict=True):
        assert found == (pytest.approx(expected, rel=NEAR["rtol"]) if near else expected)
    if engine.is_first_stage():
        assert saved_position(read, engine.mesh) == told["data"]
    for stage in engine.stages:
        own, state = stage.parameters_by_name(), stage.optimizer_state()
        assert state.step == BEFORE + AFTER
        own |= {f"{k}/{n}": t for k, some in state.moments.items() for n, t in some.items()}
        runs.assert_equal(own, everything(wanted, stage.parameters_by_name().keys()), **near)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_checkpoint_of_every_shape_is_loaded_whole_and_goes_on_the_same(
    shape: str, saved: Callable[[str], Path]
) -> None:
    folders = {other: saved(other) for other in SHAPES}

    def body() -> None:
        engine = build(shape)
        for other, folder in folders.items():
            path, state = engine.load_checkpoint(folder, f"checkpoint-{BEFORE}")
            assert (engine.global_steps, state["data"]) == (BEFORE, PLACE), other
            check_against_files(engine, Reader(path))
            if SHAPES[other]["stages"] != SHAPES[shape]["stages"]:
                continue
            read = loader(engine)
            read.restore(state["data"])
            losses = train(engine, iter(read) if engine.is_first_stage() else None, AFTER)
            uninterrupted = Reader(folder / f"checkpoint-{BEFORE + AFTER}")
            exact = other == shape
            check_went_on(engine, read, losses, uninterrupted, **({} if exact else NEAR))

    run_ranks(ranks(shape), body, limit_s=240)


def test_no_rank_writes_the_whole_of_a_stage_that_two_share(saved: Callable[[str], Path]) -> None:
    """Half of the bytes each, all tensors once, and a parameter's moments beside it."""
    for shape in ("ddp", "fsdp", "zero3"):
        reader = Reader(saved(shape) / f"checkpoint-{BEFORE}")
        where, sizes = reader.manifest["tensors"], reader.sizes(reader.names())
        for stage in range(SHAPES[shape]["stages"]):
            parts = [f"stage-{stage}.part-{n}-of-2.safetensors" for n in (1, 2)]
            halves = [sum(sizes[n] for n in sizes if where[n] == part) for part in parts]
            assert max(halves) <= 0.6 * sum(halves), (shape, halves)
        for key, file in reader.manifest["moments"].items():
            assert file == where[key.partition("/")[2]].replace(".safe", ".optimizer.safe")
