"""A stage is DeepSpeed's whole world. These fail loudly when a DeepSpeed release changes under
us."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.comm.torch import TorchBackend

from scpl_ds.distributed.mesh import Mesh
from scpl_ds.sharding._deepspeed_world import COLLECTIVES, stage_world
from tests.support import runs
from tests.support.distributed import distributed
from tests.support.trainer import save_whole


def undecorated(name: str) -> inspect.Signature:
    """The signature in DeepSpeed's source, under its staging decorator (which hides it)."""
    method = getattr(TorchBackend, name)
    while "args" in (parameters := inspect.signature(method).parameters):
        inner = [c.cell_contents for c in method.__closure__ if inspect.isfunction(c.cell_contents)]
        method = next(f for f in inner if f.__name__ == name)
    assert parameters
    return inspect.signature(method)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_redirected_methods_take_the_arguments_we_pass(name: str) -> None:
    assert list(undecorated(name).parameters)[1:] == COLLECTIVES[name].split()


def test_every_method_of_deepspeeds_backend_that_takes_a_group_is_redirected() -> None:
    ours = {"get_rank", "get_world_size", "get_global_rank", "new_group", "destroy_process_group"}
    ours |= {"get_backend"}  # the name of a group's backend: the world's is the stage's
    takes_group = set()
    for name, method in inspect.getmembers(TorchBackend, inspect.isfunction):
        if name.startswith("_"):
            continue
        try:
            signature = undecorated(name)
        except (StopIteration, TypeError):
            signature = inspect.signature(method)
        if "group" in signature.parameters:
            takes_group.add(name)
    assert takes_group <= ours | set(COLLECTIVES), takes_group - ours - set(COLLECTIVES)


ALONE = """
import os, sys, torch
import scpl_ds
from transformers import TrainingArguments
from tests.support.trainer import model_in
before = dict(os.environ)
config = {
    "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "scpl": {"stages": 2},
}
engine, *_ = scpl_ds.initialize(model=model_in(sys.argv[1]), config=config)
batch = {"input_ids": torch.arange(1, 33).reshape(4, 8), "labels": torch.tensor([0, 1, 0, 1])}
for _ in range(3):
    engine.train_batch(iter([batch]))
theirs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
print("left:", {name: os.environ[name] for name in theirs if name in os.environ})
print("ranks:", TrainingArguments(sys.argv[1], use_cpu=True).world_size)
"""


def test_a_process_without_a_launcher_is_left_without_a_launchers_variables(tmp_path: Path) -> None:
    """LOCAL_RANK used to stay, and accelerate to look for the world it would be of."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(save_whole(tmp_path / "model"))],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["left: {}", "ranks: 1"]


@distributed(4)
def test_deepspeeds_collectives_stay_inside_the_stage() -> None:
    import deepspeed.comm as ds

    mesh = Mesh(2, 2, "cpu", timeout_s=20)
    stage_world(mesh)
    stage_world(mesh)  # a second engine of this rank
    assert ds.get_world_size() == 2 and ds.get_rank() == mesh.dp_rank
    assert dist.get_world_size() == 4 and dist.get_rank() == mesh.rank

    summed = torch.tensor([float(mesh.rank)])
    ds.all_reduce(summed)
    assert summed.item() == sum(mesh.stage_ranks)

    told = torch.tensor([float(mesh.rank)])
    ds.broadcast(told, src=1)
    assert told.item() == mesh.stage_ranks[1]

    parts = [torch.zeros(1) for _ in range(2)]
    ds.all_gather(parts, torch.tensor([float(mesh.rank)]))
    assert [p.item() for p in parts] == mesh.stage_ranks

    words = [f"rank {mesh.rank}"]
    ds.broadcast_object_list(words, src=0)
    assert words == [f"rank {mesh.stage_ranks[0]}"]

    if mesh.pp_rank == 0:  # only this stage: nothing waits for the other
        ds.barrier()
        group = ds.new_group([0, 1])
        once = torch.ones(1)
        ds.all_reduce(once, group=group)
        assert once.item() == 2


@distributed(4)
def test_one_stage_may_step_while_the_other_has_not_begun() -> None:
    """Every collective of a ZeRO-1 stage stays in its group: stage 0 runs two steps ahead."""
    engine = runs.engine(2, sharding="deepspeed", zero=1, max_in_flight=2)
    store = dist.distributed_c10d._get_default_store()
    if engine.is_last_stage():
        store.wait(["two steps done on rank 0", "two steps done on rank 1"])
    data = runs.lane(runs.batches(), engine.mesh.dp_rank, 2)
    for _ in range(2):
        engine.train_batch(data)
    if engine.is_first_stage():
        store.set(f"two steps done on rank {dist.get_rank()}", "")
    engine.drain()


@pytest.mark.parametrize("zero", [0, 1])
@distributed(2)
def test_gradient_norms_and_clipping_are_those_of_one_stage(zero: int) -> None:
    """Two stages on two ranks: each reports and clips its own norm, as the plain loop does."""
    engine = runs.engine(2, sharding="deepspeed", zero=zero, clip=0.05)
    plain = runs.plain_loop(engine, clip=0.05)
    data, same = runs.batches(), runs.batches()
    engine.train_batch(data)
    plain.gradients(0, same)
    k = engine.stages[0].index
    norm = torch.nn.utils.get_total_norm(
        [p.grad for p in plain.parameters[k] if p.grad is not None]
    )
    assert float(engine.stages[0].metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.05


@distributed(1)
def test_clipping_is_written_out_for_deepspeed() -> None:
    """DeepSpeed 0.19.8 clips at 1.0 when nothing is said; 0 must mean off. Without ZeRO it is the
    backend that clips, and DeepSpeed must not do so again."""
    for zero, clip, told in ((1, 0.0, 0.0), (1, 0.7, 0.7), (0, 0.7, 0.0)):
        engine = runs.engine(1, sharding="deepspeed", zero=zero, clip=clip)
        assert engine.stages[0].backend.engine.gradient_clipping() == told
