"""SCPL as a plain sequential loop: what every engine run is compared with.

Nothing of stage, engine, schedule, sharding, distributed or checkpoint is used: only the slices of
the model (whose chain is bitwise the whole model, tests/parity/test_stage_chain.py), the maths of
the objective (tests/unit/test_supcon.py) and torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from scpl_ds.objectives._base import Objective, StageView

Batch = dict[str, Tensor]


def seed_of(*numbers: int) -> int:
    """Dropout's seed of (seed, step, micro-batch, first layer, dp rank): docs/numerics.md."""
    digest = hashlib.blake2b(struct.pack("<5q", *numbers), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class PlainLoop:
    """K stages one after the other, in one process.

    Args:
        bodies: Per stage ``body(inputs, hidden_states, detach_features=) -> StageOutput``.
        heads: Per stage the local objective, attached to its body, or None.
        lr: Step -> learning rate (AdamW, no weight decay).
        clip: Largest gradient norm of a stage; 0 is off.
        accumulation: Micro-batches of a step.
        seed: Dropout's.
        detach: The task head reads detached features.
        dp_rank: Which data-parallel rank this loop plays.
        cross: What a boundary does to the hidden states; as they are by default.
        head_lr: Learning rate of the objectives' parameters, relative to the bodies'.
    """

    def __init__(
        self,
        bodies: Sequence[nn.Module],
        heads: Sequence[Objective | None],
        *,
        lr: Callable[[int], float],
        clip: float,
        accumulation: int,
        seed: int,
        detach: bool = False,
        dp_rank: int = 0,
        cross: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        head_lr: float = 5.0,
    ) -> None:
        self.cross, self.head_lr = cross, head_lr
        self.bodies, self.heads = list(bodies), list(heads)
        self.lr, self.clip, self.accumulation = lr, clip, accumulation
        self.seed, self.detach, self.dp_rank = seed, detach, dp_rank
        self.parameters = [
            [*body.parameters(), *(head.parameters() if head is not None else [])]
            for body, head in zip(self.bodies, self.heads, strict=True)
        ]
        self.optimizers = [
            torch.optim.AdamW(
                [{"params": list(m.parameters())} for m in (body, head) if m is not None],
                lr=1.0, weight_decay=0.0, fused=True,
            )
            for body, head in zip(self.bodies, self.heads, strict=True)
        ]  # fmt: skip
        for module in (*self.bodies, *(head for head in self.heads if head is not None)):
            module.train()

    def gradients(self, number: int, batches: Iterator[Batch]) -> list[float]:
        """Forward and backward of one step into ``.grad``; returns each stage's mean loss."""
        losses = [0.0] * len(self.bodies)
        for n in range(self.accumulation):
            batch, hidden, extras = next(batches), None, {}
            for k, (body, head) in enumerate(zip(self.bodies, self.heads, strict=True)):
                torch.manual_seed(seed_of(self.seed, number, n, body.start, self.dp_rank))
                output = body(batch, hidden, detach_features=self.detach)
                loss = torch.zeros(())
                if head is not None:
                    local = head.learn(StageView(output.hidden_states, hidden, batch, extras))
                    loss, extras = loss + local.loss, {**extras, **local.extras}
                if output.loss is not None:
                    loss = loss + output.loss
                (loss / self.accumulation).backward()
                losses[k] += loss.item() / self.accumulation
                hidden = self.cross(output.hidden_states.detach())
        return losses

    def update(self, number: int) -> None:
        """Clip and step every stage by itself."""
        for optimizer, parameters in zip(self.optimizers, self.parameters, strict=True):
            if self.clip:
                nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], self.clip)
            for group, factor in zip(optimizer.param_groups, (1.0, self.head_lr), strict=False):
                group["lr"] = factor * self.lr(number)
            optimizer.step()
            optimizer.zero_grad()

    def step(self, number: int, batches: Iterator[Batch]) -> list[float]:
        """One optimizer step; returns each stage's mean loss."""
        losses = self.gradients(number, batches)
        self.update(number)
        return losses


def average_gradients(loops: Sequence[PlainLoop]) -> None:
    """What data parallelism does, between loops that each play one rank."""
    of_loops = [[p for stage in loop.parameters for p in stage] for loop in loops]
    for group in zip(*of_loops, strict=True):
        gradients = [p.grad for p in group if p.grad is not None]
        if len(gradients) < len(group):
            continue
        mean = torch.stack(gradients).sum(0) / len(gradients)
        for parameter in group:
            parameter.grad = mean.clone()
