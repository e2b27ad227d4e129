"""Waiting for work whose length nobody knows: tokenising, reading weights, exporting, scoring."""

from __future__ import annotations

import datetime
import logging
import threading
from typing import Any

import torch
import torch.distributed as dist

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import BoundaryError

log = logging.getLogger(__name__)
_WITHOUT_LIMIT = datetime.timedelta(days=365)


def wait_for_all(mesh: Mesh) -> None:
    """Wait until every rank is here, however long that takes; a rank that died ends the wait.

    A collective would give up after ``scpl.timeout_s``, whatever the others still have to do. Here
    each rank reports to rank 0 and waits for its answer, on connections that close with the process
    at their other end. A wait longer than the timeout is told, once.

    Raises:
        BoundaryError: A rank is no longer running.
    """
    word = torch.zeros(1)
    if mesh.rank > 0:
        _wait(mesh, 0, dist.isend(word, 0, group=mesh.control_group))
        _wait(mesh, 0, dist.irecv(word, 0, group=mesh.control_group))
        return
    for peer in range(1, mesh.world_size):
        _wait(mesh, peer, dist.irecv(word, peer, group=mesh.control_group))
    for peer in range(1, mesh.world_size):
        _wait(mesh, peer, dist.isend(word, peer, group=mesh.control_group))


def _wait(mesh: Mesh, peer: int, work: Any) -> None:
    late = threading.Timer(
        mesh.timeout_s,
        log.warning,
        (
            "rank %d is still waiting for rank %d, for more than %g s. It is at work or stuck; its "
            "own log says which.",
            mesh.rank, peer, mesh.timeout_s,
        ),
    )  # fmt: skip
    late.daemon = True
    late.start()
    try:
        work.wait(_WITHOUT_LIMIT)
    except RuntimeError as error:
        raise BoundaryError(
            f"rank {mesh.rank} waited for rank {peer}, which is no longer running; its own log "
            f"says why. [{str(error).strip().splitlines()[0]}]"
        ) from error
    finally:
        late.cancel()
