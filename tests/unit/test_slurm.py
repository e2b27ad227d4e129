"""What SLURM says of a rank; variables of SLURM 22.05, `srun -N2 -n4` on two nodes."""

from __future__ import annotations

import pytest

from scpl_ds.distributed.slurm import variables_of_step
from scpl_ds.distributed.world import RankEnv
from scpl_ds.errors import RecipeError

STEP = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "3,1",
}  # fmt: skip
LAST = {**STEP, "SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank() -> None:
    found = variables_of_step(LAST)
    assert RankEnv.from_environ(found) == RankEnv(3, 4, 0, 1)
    assert found["MASTER_ADDR"] == "n1"
    second = variables_of_step(
        {**STEP, "SLURM_NODEID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}
    )
    assert RankEnv.from_environ(second) == RankEnv(2, 4, 2, 3)
    assert second["MASTER_PORT"] == found["MASTER_PORT"]


def test_an_address_that_is_given_stays() -> None:
    found = variables_of_step({**LAST, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.1", "29501")


@pytest.mark.parametrize(
    "environ",
    [{}, BATCH_SCRIPT, {**LAST, "SLURM_STEP_NUM_TASKS": "1"}, {**LAST, "RANK": "0"}],
    ids=["no SLURM", "a batch script", "one task", "torchrun under srun"],
)
def test_nothing_is_a_rank_of_srun_but_its_tasks(environ: dict[str, str]) -> None:
    assert variables_of_step(environ) == {}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu3", "gpu3"), ("node[08-11,15],login", "node08"), ("a-[2,5]-ib[1-2]", "a-2-ib1")],
)
def test_the_first_node_of_a_list_is_where_ranks_meet(nodes: str, host: str) -> None:
    step = {**LAST, "SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    assert variables_of_step(step)["MASTER_ADDR"] == host


@pytest.mark.parametrize(
    "broken",
    [{"SLURM_PROCID": ""}, {"SLURM_STEP_TASKS_PER_NODE": "4"}, {"SLURM_STEP_NODELIST": ""}],
)
def test_variables_that_do_not_fit_are_told(broken: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="srun started 4 tasks, but"):
        variables_of_step({**LAST, **broken})
