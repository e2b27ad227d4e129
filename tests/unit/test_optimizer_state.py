"""Optimizer state by parameter name, out of torch's optimizers and back into them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from scpl_ds.optim import OptimizerState
from scpl_ds.sharding._base import load_plain_optimizer_state, plain_optimizer_state

LR = 0.01


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(3, 3), "head": nn.Linear(3, 2)})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for seed in range(count):
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        model["head"](model["body"](inputs)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(count: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    step(model, optimizer, count)
    return model, optimizer


def without_head(state: OptimizerState) -> OptimizerState:
    return dataclasses.replace(
        state,
        moments={
            key: {name: t for name, t in by_name.items() if not name.startswith("head")}
            for key, by_name in state.moments.items()
        },
    )


def test_what_is_put_back_is_what_was_taken_out():
    model, optimizer = trained(3)
    state = plain_optimizer_state(model, optimizer)
    again = torch.optim.AdamW(model.parameters(), lr=LR)
    load_plain_optimizer_state(model, again, state)
    found = plain_optimizer_state(model, again)
    assert found.step == state.step == 3
    for key, by_name in state.moments.items():
        assert by_name.keys() == found.moments[key].keys()
        assert all(torch.equal(found.moments[key][name], t) for name, t in by_name.items())


def test_a_head_that_starts_afresh_takes_its_first_step_as_a_new_one_does():
    """It had the old step count and moments of zero: its first update at step 50 was 0.71 lr."""
    model, optimizer = trained(50)
    state = without_head(plain_optimizer_state(model, optimizer))
    fresh = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    load_plain_optimizer_state(model, fresh, state)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, fresh)
    moved = (before["head.weight"] - model["head"].weight).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, LR), rtol=1e-3, atol=0)  # eps, fp32
    assert fresh.state[model["body"].weight]["step"] == 51
