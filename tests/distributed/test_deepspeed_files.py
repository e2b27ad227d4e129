"""DeepSpeed's own files beside a checkpoint: its ``zero_to_fp32`` makes the stage's weights of
them, training goes on as without, and nothing of ours reads them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

import scpl_ds
from scpl_ds.checkpoint import Reader
from scpl_ds.errors import SaveError
from tests.support import runs
from tests.support.distributed import no_room, run_ranks

pytestmark = [pytest.mark.forks, pytest.mark.timeout(600)]

STAGES, STEPS = 2, 2
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def engine_of(zero: str, **more: Any) -> scpl_ds.Engine:
    options = {"sharding": "deepspeed", "pipeline_ranks": 1, **more}
    config = {**runs.config(STAGES, **options), "zero_optimization": dict(ZERO[zero])}
    return scpl_ds.initialize(model=runs.model(), config=config, seed=runs.SEED).engine


def train(engine: scpl_ds.Engine, batches: Iterator[Any], steps: int) -> None:
    for _ in range(steps):
        engine.train_batch(batches)


def batches_of(engine: scpl_ds.Engine) -> Iterator[Any]:
    return runs.lane(runs.batches(), engine.mesh.dp_rank, engine.mesh.dp_size)


def fp32_of(folder: Path) -> dict[str, Tensor]:
    """As ``python zero_to_fp32.py`` makes it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))


@pytest.mark.parametrize("zero", ZERO)
def test_zero_to_fp32_gives_a_stages_weights_by_their_names_and_training_goes_on_the_same(
    tmp_path: Path, zero: str
) -> None:
    def body() -> None:
        engine, other = engine_of(zero), engine_of(zero)
        batches, others = batches_of(engine), batches_of(other)
        train(engine, batches, STEPS)
        train(other, others, STEPS)
        folder = engine.save_checkpoint(tmp_path, deepspeed_files=True)
        for stage in engine.stages:
            wanted = stage.parameters_by_name()
            found = fp32_of(folder / "deepspeed" / f"stage-{stage.index}")
            assert found.keys() == wanted.keys()
            runs.assert_equal(found, wanted)
        train(engine, batches, STEPS)
        train(other, others, STEPS)
        runs.assert_equal(runs.weights_of_engine(engine), runs.weights_of_engine(other))
        assert engine.stages[0].backend.engine.checkpoint_engine.name == "TorchCheckpointEngine"  # pyright: ignore

    run_ranks(2, body, limit_s=240)


def test_the_manifest_has_deepspeeds_files_and_loading_reads_none_of_them(tmp_path: Path) -> None:
    def body() -> None:
        engine = engine_of("zero2")
        train(engine, batches_of(engine), STEPS)
        folder = engine.save_checkpoint(tmp_path, deepspeed_files=True)
        saved = runs.weights_of_engine(engine)
        told = Reader(folder).manifest
        own = {p for p in (folder / "deepspeed").rglob("*") if p.is_file()}
        assert {p.name for p in own} > {"latest", "zero_to_fp32.py", "mp_rank_00_model_states.pt"}
        assert {str(p.relative_to(folder)) for p in own} == {
            name for name in told["checksums"] if name.startswith("deepspeed/")
        }
        dist.barrier()
        if dist.get_rank() == 0:
            for path in own:
                path.write_bytes(b"\0" * path.stat().st_size)
        dist.barrier()
        train(engine, batches_of(engine), 1)
        engine.load_checkpoint(tmp_path)
        runs.assert_equal(runs.weights_of_engine(engine), saved)

    run_ranks(2, body, limit_s=240)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_deepspeeds_files_is_an_error_on_all_ranks(
    tmp_path: Path, full: int, zero: str
) -> None:
    """Its ranks wait for each other after every file: one that left would leave the others."""

    def body() -> None:
        engine = engine_of(zero)
        batches = batches_of(engine)
        train(engine, batches, 1)
        first = engine.save_checkpoint(tmp_path, deepspeed_files=True)
        ours = max(path.stat().st_size for path in first.glob("*.safetensors"))
        theirs = [path.stat().st_size for path in first.rglob(f"*rank_{full}_*optim_states.pt")]
        assert len(theirs) == STAGES and min(theirs) > ours
        dist.barrier()
        train(engine, batches, 1)
        with no_room(full, ours), pytest.raises(SaveError, match=f"rank {full} could not write"):
            engine.save_checkpoint(tmp_path, deepspeed_files=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "latest"]
        dist.barrier()
        engine.save_checkpoint(tmp_path, deepspeed_files=True)
        assert fp32_of(tmp_path / "checkpoint-2" / "deepspeed" / "stage-0")

    run_ranks(2, body, limit_s=240)


def test_deepspeed_files_of_other_backends_and_in_the_background_are_refused(tmp_path: Path):
    def body() -> None:
        engine = runs.engine(2, sharding="none")
        with pytest.raises(ValueError, match="cannot be written in the background"):
            engine.save_checkpoint(tmp_path, deepspeed_files=True, background=True)
        with pytest.raises(ValueError, match=r"needs scpl\.sharding: deepspeed"):
            engine.save_checkpoint(tmp_path, deepspeed_files=True)

    run_ranks(1, body)
    assert list(tmp_path.iterdir()) == []
