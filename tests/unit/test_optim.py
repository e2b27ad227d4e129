"""Optimizers are torch's with DeepSpeed's names; LR factors equal DeepSpeed's and transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scpl_ds.ds_config import DeepSpeedSection, SchedulerSpec
from scpl_ds.optim import (
    build_optimizer,
    deepspeed_schedule,
    lr_factor,
    lr_schedule,
    warmup_steps,
)
from scpl_ds.recipe_sections import TrainSection
from scpl_ds.sharding._base import set_lr

LR = 3e-4


def section(type_: str = "AdamW", **params: Any) -> DeepSpeedSection:
    return DeepSpeedSection.from_mapping(
        {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": type_, "params": params}}
    )


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_biases_and_norms_get_no_weight_decay():
    net = model()
    optimizer = build_optimizer(net.named_parameters(), section(weight_decay=0.1, lr=LR))
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(net[0].weight), id(net[2].weight)}
    assert len(plain["params"]) == 4


def test_frozen_parameters_and_empty_groups_are_left_out():
    net = nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    optimizer = build_optimizer(net.named_parameters(), section())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    net.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build_optimizer(net.named_parameters(), section())


@pytest.mark.parametrize(
    ("type_", "params", "cls"),
    [
        ("AdamW", {"betas": [0.8, 0.9], "eps": 1e-6, "torch_adam": True}, torch.optim.AdamW),
        ("adamw", {"amsgrad": True}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False, "weight_decay": 0.1}, torch.optim.Adam),
        ("SGD", {"momentum": 0.9, "nesterov": True}, torch.optim.SGD),
        ("Adagrad", {"lr_decay": 0.1}, torch.optim.Adagrad),
    ],
)
def test_each_optimizer_is_torchs_own_with_the_parameters_given(
    type_: str, params: dict[str, Any], cls: type
):
    optimizer = build_optimizer(model().named_parameters(), section(type_, lr=LR, **params))
    assert type(optimizer) is cls
    group = optimizer.param_groups[0]
    assert group["lr"] == LR
    for key, value in params.items():
        if key in group and key != "weight_decay":
            assert group[key] == (tuple(value) if isinstance(value, list) else value)


def test_weight_decay_is_off_unless_written_unlike_torchs_adamw():
    assert build_optimizer(model().named_parameters(), section()).defaults["lr"] == 5e-5
    groups = build_optimizer(model().named_parameters(), section()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 0.0]


def test_a_learning_rate_can_be_given_instead():
    assert build_optimizer(model().named_parameters(), section(lr=LR)).defaults["lr"] == LR


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "warmup"), [(10, 0), (10, 3), (7, 7), (5, 8)])
def test_factors_equal_transformers(kind: str, total: int, warmup: int):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total + 3):
        ours = lr_factor(step, total, kind=kind, warmup_steps=warmup)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-12), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("total", "warmup", "decay"), [(10, 0, 3), (10, 3, 4), (10, 3, 7)])
def test_a_stable_rate_that_decays_at_the_end_equals_transformers(
    total: int, warmup: int, decay: int
):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "warmup_stable_decay", optimizer, num_warmup_steps=warmup, num_training_steps=total,
        scheduler_specific_kwargs={"num_decay_steps": decay, "decay_type": "linear"},
    )  # fmt: skip
    train = TrainSection(
        lr_scheduler_type="warmup_stable_decay", warmup_steps=warmup, decay_ratio=decay / total
    )
    ours = lr_schedule(section(), train, total)
    for step in range(total + 3):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-12), step
        optimizer.step()
        theirs.step()


DEEPSPEED: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 4}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_min_lr": 1e-5, "warmup_max_lr": 1e-3, "warmup_num_steps": 5}),
    ("WarmupDecayLR", {"total_num_steps": 12, "warmup_num_steps": 4, "warmup_max_lr": LR}),
    ("WarmupDecayLR", {"total_num_steps": 9, "warmup_num_steps": 3, "warmup_type": "linear",
                       "warmup_min_lr": 1e-5, "warmup_max_lr": 2e-3}),
    ("WarmupCosineLR", {"total_num_steps": 12, "warmup_num_steps": 4}),
    ("WarmupCosineLR", {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_min_ratio": 0.1,
                        "cos_min_ratio": 0.2, "warmup_type": "linear"}),
    ("WarmupCosineLR", {"total_num_steps": 3, "warmup_num_steps": 5}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "params"), DEEPSPEED, ids=[f"{k}-{p}" for k, p in DEEPSPEED])
def test_factors_equal_deepspeed_as_its_engine_steps_them(kind: str, params: dict[str, Any]):
    from deepspeed.runtime import lr_schedules

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = getattr(lr_schedules, kind)(optimizer, **params)
    ours = deepspeed_schedule(SchedulerSpec(kind, params), LR, total_steps=99)
    for step in range(16):
        # DeepSpeed's engine: optimizer.step() at the group's lr, then scheduler.step().
        now = optimizer.param_groups[0]["lr"]
        assert ours(step) * LR == pytest.approx(now, rel=1e-12, abs=1e-15), step
        optimizer.step()
        theirs.step()


def test_auto_of_a_deepspeed_scheduler_means_the_run():
    auto = {"warmup_max_lr": "auto", "total_num_steps": "auto", "warmup_num_steps": "auto"}
    written = {"warmup_max_lr": LR, "total_num_steps": 20, "warmup_num_steps": 5}
    ours = deepspeed_schedule(SchedulerSpec("WarmupDecayLR", auto), LR, 20, warmup=5)
    same = deepspeed_schedule(SchedulerSpec("WarmupDecayLR", written), LR, 99)
    assert [ours(s) for s in range(25)] == [same(s) for s in range(25)]


def test_the_deepspeed_scheduler_goes_before_trains():
    config = DeepSpeedSection.from_mapping(
        {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": LR}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}},
        }
    )
    factor = lr_schedule(config, TrainSection(), 100)
    assert (factor(0), factor(99)) == (0.0, 1.0)
    factor = lr_schedule(section(), TrainSection(warmup_ratio=0.25), 8)
    assert [factor(s) for s in (0, 1, 2, 5, 8)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_a_warmup_ratio_is_rounded_up():
    assert warmup_steps(TrainSection(warmup_ratio=0.1), 11) == 2
    assert warmup_steps(TrainSection(warmup_steps=3), 11) == 3
    assert warmup_steps(TrainSection(), 11) == 0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="kind must be one of linear, cosine"):
        lr_factor(0, 10, kind="polynomial")


def test_heads_have_a_learning_rate_of_their_own_where_one_is_asked_for():
    head, layer = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    named = [
        *((f"objective.head.{name}", p) for name, p in head.named_parameters()),
        *((f"body.model.{name}", p) for name, p in layer.named_parameters()),
    ]
    optimizer = build_optimizer(named, section(), head_lr=10.0)
    set_lr(optimizer, 2e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(rates[id(p)] == pytest.approx(2e-2) for p in head.parameters())
    assert all(rates[id(p)] == pytest.approx(2e-3) for p in layer.parameters())
    assert len(build_optimizer(named, section()).param_groups) == 2
