"""A save that fails on one rank fails on all of them, at once, and costs no checkpoint."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch import Tensor

from scpl_ds import checkpoint
from scpl_ds.checkpoint import Reader
from scpl_ds.errors import CheckpointError, SaveError
from tests.support import runs
from tests.support.distributed import distributed


@contextlib.contextmanager
def no_room(rank: int) -> Iterator[None]:
    """On that rank no file can grow beyond 32 KiB: writing larger ones really fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def held(reader: Reader) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, moments too."""
    moments = reader.optimizer_state(reader.names()).moments
    found = {f"{key}/{n}": t for key, by_name in moments.items() for n, t in by_name.items()}
    assert found
    return reader.tensors(reader.names()) | found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
@pytest.mark.parametrize("pipeline_ranks", [1, 2], ids=["2 lanes", "2 stages"])
@pytest.mark.parametrize("full", [0, 1])
@distributed(2)
def test_a_full_disk_on_any_rank_is_an_error_on_all_and_the_run_can_save_again(
    tmp_path: Path, full: int, pipeline_ranks: int, background: bool
) -> None:
    engine = runs.engine(2, pipeline_ranks=pipeline_ranks)
    data = runs.batches()

    def save() -> None:
        engine.train_batch(data)
        engine.save_checkpoint(tmp_path, background=background)
        engine.finish_saving()

    save()
    with no_room(full), pytest.raises(SaveError) as caught:
        save()
    said = str(caught.value)
    assert f"checkpoint-2 was not saved: rank {full} could not write it" in said
    assert "File too large" in said
    assert f"Resume with train.resume_from_checkpoint={tmp_path / 'checkpoint-1'}" in said
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    Reader(checkpoint.resolve(tmp_path)).verify()
    dist.barrier()
    save()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "latest"]
    assert checkpoint.resolve(tmp_path).name == "checkpoint-3"


@distributed(2)
def test_a_client_state_that_is_no_json_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    """Rank 0 failed alone, and the other waited for it until the timeout."""
    engine = runs.engine(2)
    engine.train_batch(runs.batches())
    with pytest.raises(SaveError, match="client_state must be plain JSON"):
        engine.save_checkpoint(tmp_path, client_state={"what": object()})
    assert names(tmp_path) == []


@distributed(2)
def test_a_damaged_file_is_refused_by_all_ranks_before_any_takes_a_tensor(tmp_path: Path) -> None:
    """Each rank compares a share of the files: the one that finds it need not be one that reads
    it."""
    engine = runs.engine(2)
    for _ in range(2):
        engine.train_batch(runs.batches())
        engine.save_checkpoint(tmp_path)
    before = {name: tensor.clone() for name, tensor in runs.weights_of_engine(engine).items()}
    dist.barrier()
    path = tmp_path / "checkpoint-1" / "stage-1.optimizer.safetensors"
    if dist.get_rank() == 0:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"stage-1\.optimizer\.safetensors is damaged") as e:
        engine.load_checkpoint(tmp_path, "checkpoint-1")
    assert f"Latest complete checkpoint: {tmp_path / 'checkpoint-2'}" in str(e.value)
    runs.assert_equal(runs.weights_of_engine(engine), before)


@distributed(2)
def test_a_checkpoint_written_in_the_background_is_that_of_the_moment_it_was_asked_for(
    tmp_path: Path,
) -> None:
    """The run goes on meanwhile: with steps that change every tensor, in place."""
    engine = runs.engine(2, pipeline_ranks=1)
    data, told = runs.batches(), []
    engine.train_batch(data)
    engine.save_checkpoint(tmp_path / "a", background=True, on_saved=told.append)
    engine.save_checkpoint(tmp_path / "b")
    engine.save_checkpoint(tmp_path / "c", background=True)
    for _ in range(3):
        engine.train_batch(data)
    engine.finish_saving()
    assert told == ([tmp_path / "a" / "checkpoint-1"] if dist.get_rank() == 0 else [])
    wanted = Reader(tmp_path / "b" / "checkpoint-1")
    for name in "ac":
        reader = Reader(tmp_path / name / "checkpoint-1")
        reader.verify()
        runs.assert_equal(held(reader), held(wanted))


@distributed(2)
def test_ranks_that_see_different_checkpoints_load_none(tmp_path: Path) -> None:
    """As on two machines with disks of their own, one of which missed the last save."""
    engine = runs.engine(2)
    data = runs.batches()
    own = tmp_path / "own" / str(dist.get_rank())
    for _ in range(2):
        engine.train_batch(data)
        engine.save_checkpoint(tmp_path)
    dist.barrier()
    for name in ("checkpoint-1", "checkpoint-2")[: 2 - dist.get_rank()]:
        shutil.copytree(tmp_path / name, own / name)
    before = {name: tensor.clone() for name, tensor in runs.weights_of_engine(engine).items()}
    with pytest.raises(CheckpointError, match=r"rank 0 on .* found checkpoint-2, rank 1 .*-1"):
        engine.load_checkpoint(own)
    shutil.copytree(tmp_path / f"checkpoint-{dist.get_rank() + 1}", own / "mine")
    with pytest.raises(CheckpointError, match=r"found mine, rank 1 .* another mine"):
        engine.load_checkpoint(own, "mine")
    runs.assert_equal(runs.weights_of_engine(engine), before)


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
@distributed(1)
def test_an_old_checkpoint_that_cannot_be_removed_costs_no_new_one(
    tmp_path: Path, background: bool
) -> None:
    """NFS keeps a file that another process has open: the folder cannot go."""
    engine = runs.engine(1)
    data = runs.batches()

    def cannot(folder: Path) -> None:
        raise OSError(39, "Directory not empty", str(folder))

    engine.train_batch(data)
    engine.save_checkpoint(tmp_path, background=background, on_saved=cannot)
    engine.finish_saving()
    assert names(tmp_path) == ["checkpoint-1", "latest"]
    Reader(checkpoint.resolve(tmp_path)).verify()


def test_a_checkpoint_whose_removal_was_interrupted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(step: int) -> None:
        folder = tmp_path / f"checkpoint-{step}"
        with checkpoint.Writer(folder, is_coordinator=True) as writer:
            writer.finish(step=step, bounds=(0, 1), client_state={}, save_latest=True)

    saved(1)
    saved(2)
    remove = shutil.rmtree

    def interrupted(path: Path, **options: object) -> None:
        if any(path.glob("*")) and not options:
            raise KeyboardInterrupt
        remove(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 1)
    monkeypatch.undo()
    assert checkpoint.completed(tmp_path) == [tmp_path / "checkpoint-2"]
    (tmp_path / "checkpoint-3.partial").mkdir()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["checkpoint-2", "latest"]
