"""Every rival trains what plain backpropagation over the whole model trains."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from scpl_ds.baselines import RIVALS, Job, Rival, make_rival
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import PartitionError, RecipeError
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.plan import make_plan
from scpl_ds.partition.stage_module import StageModule, stage_from_model
from scpl_ds.timeline import KINDS
from tests.support import runs
from tests.support.distributed import distributed
from tests.support.reference import Batch

BATCH = 4
DEEPSPEED = ("deepspeed-1f1b", "deepspeed-1f1b-zero1")
CPU, HALF = torch.device("cpu"), torch.bfloat16
EQUAL = {"rtol": 1e-5, "atol": 1e-7}


def body(start: int, end: int) -> StageModule:
    whole = runs.model(dropout=0.0)
    return stage_from_model(whole, analyze(whole), start, end)


def job(micro_batches: int, **options: object) -> Job:
    anatomy = analyze(runs.model())

    def cut(stages: int) -> tuple[tuple[int, int], ...]:
        plan = make_plan(anatomy, stages, "uniform")
        return tuple(plan.span(k) for k in range(stages))

    # An attention key's bias has no gradient but rounding, which a small eps would blow up.
    given = {
        "micro_batch_size": BATCH,
        "adam": {"eps": 1e-4, "weight_decay": 0.01},
        "lr_at": lambda n: 2e-3 / (n + 1),
    }
    return Job(
        make_body=body,
        cut=cut,
        hidden_size=anatomy.hidden_size,
        num_micro_batches=micro_batches,
        sequence_length=13,
        lr=2e-3,
        device=CPU,
        **{**given, **options},  # pyright: ignore[reportArgumentType]
    )


def steps(micro_batches: int) -> Iterator[Batch]:
    """Whole steps, each with padding and a length of its own."""
    return runs.batches(micro_batches * BATCH)


@functools.cache
def plainly_trained(micro_batches: int, count: int = 2) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Tensors after ``count`` steps of one process, and the loss of each step."""
    given, model = job(micro_batches), runs.model(dropout=0.0).train()
    optimizer = given.optimizer(model.named_parameters())
    losses = []
    for step, batch in zip(range(count), steps(micro_batches), strict=False):
        assert given.lr_at is not None
        for group in optimizer.param_groups:
            group["lr"] = given.lr_at(step)
        losses.append(torch.zeros(()))
        for piece in range(micro_batches):
            rows = slice(piece * BATCH, (piece + 1) * BATCH)
            loss = model(**{k: v[rows] for k, v in batch.items()}).loss / micro_batches
            loss.backward()
            losses[-1] += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), losses


def take_steps(rival: Rival, count: int = 2) -> list[Tensor | None]:
    data = steps(rival.job.num_micro_batches)
    return [rival.train_batch(batch) for _, batch in zip(range(count), data, strict=False)]


def assert_trains_as_one_process(name: str, micro_batches: int, mesh: Mesh) -> Rival:
    rival = make_rival(name, job(micro_batches), mesh)
    losses = take_steps(rival)
    rival.finish()
    wanted, wanted_losses = plainly_trained(micro_batches)
    runs.assert_equal(rival.parameters(), wanted, **EQUAL)
    owned = gather_objects(mesh, set(rival.parameters()))
    assert set().union(*owned) == set(wanted)
    assert all((loss is None) == (losses[0] is None) for loss in losses)
    known = [loss for loss in gather_objects(mesh, losses) if loss[0] is not None]
    if name in ("ddp", "zero", "zero3") or mesh.dp_size > 1:  # each of its own samples
        known = [[torch.stack(each).mean() for each in zip(*known, strict=True)]]
    for found in known:
        torch.testing.assert_close(found, wanted_losses, rtol=1e-5, atol=1e-6)
    assert known
    return rival


@pytest.fixture(params=(2, 4), ids="M{}".format)
def micro_batches(request: pytest.FixtureRequest) -> int:
    plainly_trained(request.param)  # once, before the fork
    return request.param


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "torch-dualpipev"])
@distributed(2)
def test_a_rival_on_two_ranks_trains_what_one_process_trains(name, micro_batches):
    assert_trains_as_one_process(name, micro_batches, Mesh(2, 1, CPU, timeout_s=25))


@distributed(2)
def test_dualpipev_trains_what_one_process_trains():
    assert_trains_as_one_process("torch-dualpipev", 4, Mesh(2, 1, CPU, timeout_s=25))


@pytest.mark.parametrize("name", ["torch-1f1b", "torch-zbv", *DEEPSPEED])
@distributed(4)
def test_a_rival_on_two_by_two_ranks_trains_what_one_process_trains(name):
    assert_trains_as_one_process(name, 2, Mesh(2, 2, CPU, timeout_s=25))


@pytest.mark.parametrize("name", ["torch-1f1b", "deepspeed-1f1b", "zero", "zero3"])
@distributed(4)
def test_a_rival_on_four_ranks_trains_what_one_process_trains(name):
    assert_trains_as_one_process(name, 4, Mesh(4, 1, CPU, timeout_s=25))


@distributed(2)
def test_rivals_and_an_engine_of_ours_take_turns_in_one_process():
    """DeepSpeed keeps its world, and the groups of the engine made last, in module globals."""
    ours = runs.engine(2, sharding="deepspeed", zero=1, pipeline_ranks=1)
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    data = runs.batches()
    ours.train_batch(data)
    names = (*DEEPSPEED, "torch-gpipe", "zero")
    rivals = [make_rival(name, job(2), mesh) for name in names]
    for batch, _ in zip(steps(2), range(2), strict=False):
        for rival in rivals:
            rival.train_batch(batch)
        ours.train_batch(data)
    ours.drain()
    for rival in rivals:
        runs.assert_equal(rival.parameters(), plainly_trained(2)[0], **EQUAL)
    for part in gather_objects(mesh, runs.weights_of_engine(ours)):
        runs.assert_equal(part, runs.weights_of_engine(ours))


SENT = {  # boundaries that each rank sends over, forward and backward
    "naive": (1, 1), "torch-gpipe": (1, 1), "deepspeed-1f1b": (1, 1), "torch-looped-bfs": (3, 3),
    "torch-zbv": (2, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    "name, autocast",
    [*((name, None) for name in SENT), ("torch-zbv", HALF), ("deepspeed-1f1b", HALF)],
)
@distributed(2)
def test_bytes_sent_are_those_of_the_hidden_states_that_cross_ranks(name, autocast):
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    rival = make_rival(name, job(2, autocast=autocast), mesh)
    (batch,) = [batch for _, batch in zip(range(1), steps(2), strict=False)]
    rival.train_batch(batch)
    size = 4 if autocast is None else 2
    assert rival.bytes_sent == SENT[name][mesh.rank] * batch["input_ids"].numel() * 32 * size


@pytest.mark.parametrize("name", ["torch-zbv", "deepspeed-1f1b", "ddp", "zero"])
@distributed(2)
def test_bf16_computes_nearly_the_same_in_half_precision(name):
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    rival = make_rival(name, job(4, autocast=HALF), mesh)
    take_steps(rival)
    wanted = plainly_trained(4)[0]
    moved = {k: v - runs.model(dropout=0.0).state_dict()[k] for k, v in wanted.items()}
    for key, tensor in rival.parameters().items():
        assert tensor.dtype == wanted[key].dtype
        if tensor.is_floating_point():
            assert (tensor - wanted[key]).norm() <= 0.3 * moved[key].norm() + 1e-3, key
    found = torch.cat([t.flatten() for t in rival.parameters().values()])
    assert not torch.equal(found, torch.cat([wanted[k].flatten() for k in rival.parameters()]))


@pytest.mark.parametrize("name", ["single", "torch-1f1b", "torch-zbv", "deepspeed-1f1b", "zero"])
@distributed(2)
def test_the_timeline_has_every_forward_and_leaves_little_unexplained(name):
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    rival = make_rival(name, job(4, keep_spans=True), mesh)
    take_steps(rival, 1)
    rival.timeline.restart()
    began = time.monotonic()
    take_steps(rival, 1)
    passed = time.monotonic() - began
    forwards = [s for s in rival.timeline.spans() if s.kind == "forward"]
    if name == "single" and mesh.rank:
        assert not forwards
        return
    there = {"torch-zbv": (mesh.rank, 3 - mesh.rank), "single": (0,), "zero": (0,)}
    stages, pieces = there.get(name, (mesh.rank,)), 2 if name == "zero" else 4
    wanted = sorted((stage, piece) for stage in stages for piece in range(pieces))
    assert sorted((s.stage, s.micro_batch) for s in forwards) == wanted
    totals = rival.timeline.totals()
    assert min(totals[kind] for kind in ("forward", "backward", "step")) > 0
    explained = sum(totals[k] for k in KINDS)
    assert 0.5 * passed < explained <= totals["total"]


@distributed(2)
def test_a_mask_that_hides_nothing_changes_nothing():
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    (batch,) = [batch for _, batch in zip(range(1), steps(2), strict=False)]
    full = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    rivals = [make_rival("torch-gpipe", job(2), mesh) for _ in range(2)]
    rivals[0].train_batch(full)
    rivals[1].train_batch({k: v for k, v in full.items() if k != "attention_mask"})
    runs.assert_equal(rivals[0].parameters(), rivals[1].parameters())


REFUSED = [
    ("torch-1f1b", 1, 4, r"1F1B does not run 1 micro-batches over 2 stages on 2 ranks: .*\(1\)"),
    ("torch-interleaved-1f1b", 5, 4, r"does not run 5 micro-batches over 4 .*rounds \(2\)"),
    ("torch-interleaved-zero-bubble", 5, 4, r"does not run 5 micro-batches over 4 .*rounds"),
    ("torch-dualpipev", 3, 4, r"DualPipeV does not run 3 micro-batches over 4 stages on 2 ranks"),
    ("zero", 1, 3, r"zero: 2 ranks cannot share the 3 samples of a step .*multiple of 2"),
    ("torch-gipe", 2, 4, r"no rival is called 'torch-gipe'; did you mean 'torch-gpipe'"),
]


@distributed(2)
def test_what_a_rival_cannot_run_is_refused_by_name():
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    for name, micro_batches, rows, message in REFUSED:
        with pytest.raises(RecipeError, match=message):
            make_rival(name, job(micro_batches, micro_batch_size=rows), mesh)


@distributed(2)
def test_lanes_that_cannot_share_a_micro_batch_are_refused():
    with pytest.raises(RecipeError, match="2 data-parallel ranks cannot share a micro-batch of 3"):
        make_rival("torch-gpipe", job(2, micro_batch_size=3), Mesh(1, 2, CPU, timeout_s=25))


@distributed(2)
def test_more_stages_than_layers_are_refused():
    mesh = Mesh(2, 1, CPU, timeout_s=25)
    short = analyze(runs.model(layers=3))

    def cut(stages: int) -> list[tuple[int, int]]:
        plan = make_plan(short, stages, "uniform")
        return [plan.span(k) for k in range(stages)]

    with pytest.raises(PartitionError, match="3 layers, fewer than"):
        make_rival("torch-looped-bfs", dataclasses.replace(job(4), cut=cut), mesh)


@distributed(1)
def test_a_batch_of_another_size_than_a_step_is_refused():
    rival = make_rival("single", job(2), Mesh(1, 1, CPU, timeout_s=25))
    with pytest.raises(RecipeError, match="2 micro-batches x 4 = 8 samples, but 4 were given"):
        rival.train_batch(next(runs.batches(4)))
