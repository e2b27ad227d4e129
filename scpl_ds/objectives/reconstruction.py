"""Keep what the features held: reconstruct the block's input, or its original output."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._base import Objective, ObjectiveOptions, ObjectiveOutput, StageView
from scpl_ds.objectives._heads import pool
from scpl_ds.objectives._options import need_size


class ReconstructionOptions(ObjectiveOptions):
    """Options of ``scpl.objective: {name: reconstruction, ...}``."""

    target: Literal["original", "input"] = "original"
    """``original``: what the block gave before training, for the same input; keeps a frozen copy of
    the block in memory and runs it without gradient. ``input``: what entered the block, through a
    small head; the first stage has none, and does nothing for this term."""


class Reconstruction(Objective):
    """Mean squared error at the real positions, divided by the target's mean square.

    To be used beside another objective:
    ``objective: [{name: supcon}, {name: reconstruction, weight: 0.1}]``. The
    division makes its size the same for models whose features are large and small.

    Source:
        LoPT, arXiv:2605.04913: LayerNorm, Linear(D, D/4), GELU, Linear to the block's input.
        InfoPro, ICLR 2021: what greedy objectives throw away early is missing later.

    Raises:
        RecipeError: ``target: input`` needs a hidden size that is not known.
    """

    Options: ClassVar[type[BaseModel]] = ReconstructionOptions

    def __init__(
        self, options: ReconstructionOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        self.options = options
        self.head: nn.Module = nn.Identity()
        self._inner = 0
        if options.target == "input":
            self._inner = max(1, need_size("reconstruction", hidden_size) // 4)
        # In a list, out of torch's sight: it is no part of what is trained, sharded or saved.
        self._original: list[Any] = []

    @classmethod
    def looks_ahead(cls, options: BaseModel) -> bool:
        del options
        return False

    def attach(self, body: nn.Module) -> None:
        size = self.hidden_size
        if self.options.target == "input" and size is not None and not body.is_first:
            inner = self._inner
            layers = (nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, size))
            self.head = nn.Sequential(nn.LayerNorm(size), *layers)
        if self.options.target == "original":
            frozen = copy.deepcopy(body).eval().requires_grad_(False)
            self._original = [frozen]

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """
        Raises:
            RecipeError: Always: it needs what entered the block, which only ``learn`` is given.
        """
        raise RecipeError("scpl.objective: reconstruction compares with what entered the block.")

    def learn(self, view: StageView) -> ObjectiveOutput:
        """Loss of one micro-batch; metrics: ``reconstruction_loss``."""
        hidden = view.hidden_states
        if self.options.target == "input" and view.block_input is None:
            return ObjectiveOutput(pool(hidden, view.attention_mask, "mean").sum() * 0.0, {})
        target = view.block_input if self.options.target == "input" else self._original_of(view)
        assert target is not None
        guess = self.head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            target, guess = target.detach().float(), guess.float()
            if view.attention_mask is not None and hidden.ndim == 3:
                real = view.attention_mask.bool()[..., None]  # replaced: padding may hold NaN
                target, guess = target.where(real, 0.0), guess.where(real, 0.0)
            loss = (guess - target).square().sum() / target.square().sum().clamp(min=1e-12)
        return ObjectiveOutput(loss, {"reconstruction_loss": loss.detach()})

    def flops(self, batch: int, sequence: int) -> int:
        """Of the head; the frozen copy costs a third of what the block does."""
        return 4 * batch * sequence * (self.hidden_size or 0) * self._inner

    @torch.no_grad()
    def _original_of(self, view: StageView) -> Tensor:
        frozen, hidden = self._original[0], view.hidden_states
        frozen.to(hidden.device)
        if not torch.is_autocast_enabled(hidden.device.type):
            for parameter in frozen.parameters():  # its buffers keep their type, as the block's do
                parameter.data = parameter.data.to(hidden.dtype)
        inputs = {name: value for name, value in view.inputs.items() if name != "labels"}
        return frozen(inputs, view.block_input).hidden_states
