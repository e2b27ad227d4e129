"""What a rank reads of a checkpoint when it resumes: the tensors of its own stages, and for the
checksums a share of all files."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from scpl_ds import checkpoint
from scpl_ds.checkpoint import Reader
from scpl_ds.distributed.collectives import gather_objects
from tests.support import runs
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks

STAGES = 3


@contextlib.contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, int], list[str]]]:
    """Bytes of tensors taken out of each file, and the files that were summed up."""
    taken: dict[str, int] = collections.Counter()
    summed: list[str] = []
    safe_open, checksum = checkpoint.safe_open, checkpoint.checksum

    class Opened:
        def __init__(self, path: Path, framework: str) -> None:
            self._path, self._file = path, safe_open(path, framework)

        def __enter__(self) -> Any:
            self._open = self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._file.__exit__(*error)

        def metadata(self) -> Any:
            return self._open.metadata()

        def get_tensor(self, name: str) -> Any:
            tensor = self._open.get_tensor(name)
            taken[self._path.name] += tensor.nbytes
            return tensor

    def summing(path: Path) -> str:
        summed.append(path.name)
        return checksum(path)

    with patch.context() as patched:
        patched.setattr(checkpoint, "safe_open", Opened)
        patched.setattr(checkpoint, "checksum", summing)
        yield taken, summed


def bytes_of_tensors(path: Path) -> int:
    """Of a safetensors file: all but its header, whose length comes first."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_rank_takes_its_own_stages_once_and_sums_up_a_share_of_the_files(
    tmp_path: Path, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages on two ranks, or on one beside another data-parallel one."""

    def body() -> None:
        engine = runs.engine(STAGES, pipeline_ranks=2 // lanes, sharding="ddp")
        engine.train_batch(runs.batches())
        folder = engine.save_checkpoint(tmp_path)
        dist.barrier()
        with watched(monkeypatch) as (taken, summed):
            engine.load_checkpoint(tmp_path)
        manifest = Reader(folder).manifest
        own = {f"stage-{stage.index}" for stage in engine.stages}
        wanted = {name for name in manifest["bytes"] if checkpoint.stage_of(name) in own}
        assert taken == {name: bytes_of_tensors(folder / name) for name in wanted}
        assert len(own) < STAGES or lanes == 2
        everybody = gather_objects(engine.mesh, summed)
        assert sorted(itertools.chain(*everybody)) == sorted(manifest["checksums"])
        sizes = [sum(manifest["bytes"][name] for name in files) for files in everybody]
        assert max(sizes) < 0.65 * sum(sizes)

    run_ranks(2, body)
