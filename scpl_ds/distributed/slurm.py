"""What ``srun`` says of a rank, in the words of the other launchers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from scpl_ds.errors import RecipeError

_FIRST_PORT, _PORTS = 20000, 10000
"""Below the ports that Linux gives out by itself (from 32768)."""


def variables_of_step(environ: Mapping[str, str]) -> dict[str, str]:
    """``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
    ``MASTER_PORT`` of a task of ``srun``; empty where no step of several tasks is running, or where
    a launcher (``srun torchrun``) has said who this rank is.

    ``MASTER_ADDR`` and ``MASTER_PORT`` that are set stay; else the first host of the step, and a
    port from the numbers of job and step, the same on every rank. ``SLURM_NTASKS`` and
    ``SLURM_PROCID`` are no sign: a batch script has them before it starts any task.

    Raises:
        RecipeError: Variables of the step are missing or are not what SLURM writes.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return {}
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
        return {}
    try:
        node = int(environ["SLURM_NODEID"])
        job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
        tasks = _tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
        found = {
            "RANK": str(int(environ["SLURM_PROCID"])),
            "WORLD_SIZE": str(sum(tasks)),
            "LOCAL_RANK": str(int(environ["SLURM_LOCALID"])),
            "LOCAL_WORLD_SIZE": str(tasks[node]),
            "MASTER_ADDR": _first_host(environ["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": str(_FIRST_PORT + (31 * job + step) % _PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise RecipeError(
            f"srun started {environ['SLURM_STEP_NUM_TASKS']} tasks, but its variables do not say "
            f"which of them this is ({type(error).__name__}: {error}). Start ranks with srun, or "
            "with `srun --ntasks-per-node=1 torchrun ...`."
        ) from None
    return found | {k: environ[k] for k in ("MASTER_ADDR", "MASTER_PORT") if environ.get(k)}


def _tasks_per_node(text: str) -> list[int]:
    """``2(x3),1`` as [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.removesuffix(")") or 1)
    return tasks


def _first_host(nodes: str) -> str:
    """``node[08-11,15]-ib,login`` as ``node08-ib``."""
    first = re.match(r"[^,\[]*(\[[^\]]*\][^,\[]*)*", nodes)
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")
    if not host:
        raise ValueError(f"SLURM_STEP_NODELIST is {nodes!r}")
    return host
