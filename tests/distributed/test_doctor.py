"""`scpl-ds doctor` on several ranks: sums, messages, clocks, and who is told."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from scpl_ds.distributed import reach
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.doctor import examine
from tests.support.distributed import distributed


def mesh() -> Mesh:
    return Mesh(1, dist.get_world_size(), "cpu", timeout_s=30)


@pytest.mark.parametrize("ranks", [2, 5])
@distributed(lambda ranks: ranks)
def test_every_neighbour_is_measured_once_and_all_ranks_are_told(ranks: int) -> None:
    here = mesh()
    links = reach.neighbours(here)
    assert [(link.source, link.target) for link in links] == [(r, r + 1) for r in range(ranks - 1)]
    assert all(link.latency_us > 0 and link.mib_per_s > 0 for link in links)
    assert gather_objects(here, links) == [links] * ranks
    assert reach.all_reduce(here).milliseconds > 0


@distributed(3)
def test_a_clock_that_is_ahead_is_measured() -> None:
    here = mesh()
    ahead = [0.0, 100.0, -5.0][here.rank]
    found = reach.clock_differences(here, lambda: time.time() + ahead)
    # As good as an answer takes; a loaded machine may take its time.
    assert found == pytest.approx([0.0, 100.0, -5.0], abs=2.0)


@distributed(2)
def test_the_report_of_two_ranks_has_their_links_and_every_backend(tmp_path: Path) -> None:
    report = examine(tmp_path / "runs", timeout_s=60)
    found = json.loads(json.dumps(report.as_json()))
    by_check = {one["check"]: one for one in found["findings"]}
    assert report.complete and report.exit_code == int(found["problems"] > 0)
    assert found["ranks"] == 2 and len(found["links"]) == 1 and len(found["clock_ahead_s"]) == 2
    for check in ("packages", "run folder", "ranks", "versions", "clock", "sharding"):
        assert by_check[check]["level"] != "problem", by_check[check]
    assert "deepspeed, none, ddp, fsdp" in by_check["sharding"]["found"]
    assert by_check["python"]["ranks"] == [0, 1]
    assert not (tmp_path / "runs").exists() and not list(tmp_path.glob(".scpl*"))
