"""What every local objective has in common: options, a forward, its own parameters, its cost."""

from __future__ import annotations

import abc
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class ObjectiveOutput(NamedTuple):
    """What one micro-batch gave: the loss to go backward from, and numbers to log."""

    loss: Tensor
    """Scalar, attached to the graph, float32 (float64 stays float64)."""
    metrics: dict[str, Tensor]
    """Detached 0-dim tensors, still on the device: reading one waits for the device."""


class ObjectiveOptions(BaseModel):
    """Base of the options of an objective: the recipe's ``scpl.objective`` without ``name``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Objective(nn.Module, abc.ABC):
    """The loss one stage is trained by, with the head it needs.

    An objective is pure maths: it knows no process group, no optimizer and no model. Its parameters
    belong to the stage: they are trained with the stage's layers, saved as
    ``scpl_heads.layer_{last layer of the stage}.*`` and left out of the exported model.

    They are drawn from torch's global generator when the objective is built, in the order of the
    modules; whoever builds it seeds.

    Args:
        options: An instance of this class's ``Options``.
        hidden_size: Width D of the stage's hidden states; None when it is not known.
        num_labels: Number of classes of the task; None when the task has none.
    """

    Options: ClassVar[type[BaseModel]] = ObjectiveOptions

    def __init__(
        self, options: BaseModel, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__()
        if not isinstance(options, self.Options):
            raise TypeError(
                f"{type(self).__name__} needs options of type {self.Options.__qualname__}, "
                f"got {type(options).__name__}."
            )
        self.hidden_size = hidden_size
        self.num_labels = num_labels

    @abc.abstractmethod
    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch.

        Args:
            hidden_states: Output of the stage's last layer, not detached, [B, T, D] or [B, D].
            attention_mask: 1 for a real position, 0 for padding, [B, T]; None: no padding.
            labels: As the collator gives them; usually int64, [B].
        """

    @abc.abstractmethod
    def flops(self, batch: int, sequence: int) -> int:
        """Forward FLOPs of this objective for ``batch`` rows of ``sequence`` positions.

        Counted as ``torch.utils.flop_counter`` does (matrix products, two per multiply-add), so
        that it can be added to the FLOPs of the layers when a plan balances the stages.
        """
