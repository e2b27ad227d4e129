"""The one kind of thing that flows between stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scpl_ds.errors import DataError


class Tag(NamedTuple):
    """Which micro-batch this is; travels in the header and is checked by the receiver."""

    step: int
    """Optimizer step, 0-based, counted over the whole run (evaluation counts its own from 0)."""
    micro_batch: int
    """Index inside the step, 0-based."""
    batch_id: int
    """Running number of the micro-batch in its loader: two ends that disagree have lost one."""


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """One micro-batch at a stage boundary: what the model computed so far, and what it was given.

    The ids, mask and labels ride along with the hidden states (a percent of the bytes), so that no
    second loader has to agree on an order and every stage can pool and score by itself.

    Shapes: B samples, T positions, D hidden size.
    """

    inputs: dict[str, Tensor]
    """What the Hugging Face model takes: ``input_ids`` [B, T], ``attention_mask``, ``labels``
    ..."""
    tag: Tag
    hidden_states: Tensor | None = None
    """Output of the layer before the boundary, [B, T, D]; None before the first stage."""
    extras: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Whatever an objective sends along (sample ids, a label chain)."""

    @property
    def labels(self) -> Tensor | None:
        return self.inputs.get("labels")

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with every tensor on ``device``."""

        def move(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: v.to(device, non_blocking=True) for k, v in tensors.items()}

        hidden = self.hidden_states
        return dataclasses.replace(
            self,
            inputs=move(self.inputs),
            hidden_states=None if hidden is None else hidden.to(device, non_blocking=True),
            extras=move(self.extras),
        )

    def with_hidden_states(
        self, hidden_states: Tensor, extras: dict[str, Tensor] | None = None
    ) -> MicroBatch:
        """What the next stage receives: the same inputs behind this stage's output, cut from
        autograd. ``extras`` take the place of those that came; None: they stay."""
        extras = self.extras if extras is None else extras
        return dataclasses.replace(self, hidden_states=hidden_states.detach(), extras=extras)


class Evaluated(NamedTuple):
    """One evaluated micro-batch, on the last stage's ranks; elsewhere all are None."""

    loss: Tensor | None
    """Task loss, mean over the micro-batch."""
    logits: Tensor | None
    labels: Tensor | None
    exits: dict[int, Tensor] = {}  # noqa: RUF012 - a default that nobody writes to
    """Layer -> scores [B, C] of the local head behind it, where heads can classify."""


def as_inputs(item: Any) -> dict[str, Tensor]:
    """A batch as the model takes it: a dict of tensors, or DeepSpeed's ``(inputs, labels)`` pair.

    Raises:
        DataError: Anything else, or an entry that is not a tensor.
    """
    if isinstance(item, Mapping):
        inputs = dict(item)
    elif isinstance(item, tuple | list) and len(item) == 2:
        data, labels = item
        inputs = dict(data) if isinstance(data, Mapping) else {"inputs": data}
        inputs["labels"] = labels
    else:
        raise DataError(
            f"A batch must be a dict of tensors or an (inputs, labels) pair, got "
            f"{type(item).__name__}."
        )
    for name, value in inputs.items():
        if not torch.is_tensor(value):
            raise DataError(
                f"'{name}' of a batch is a {type(value).__name__}, not a tensor. Drop the "
                "column or "
                "turn it into a tensor in the collator; engine.set_batch_fn takes a function "
                "for it."
            )
    return inputs


def as_named_inputs(item: Any) -> dict[str, Tensor]:
    """``as_inputs`` for a model that takes its inputs by name, as Hugging Face's do.

    A lone tensor is not taken for ``input_ids``: padding would be read as text in silence.

    Raises:
        DataError: A pair whose first half has no names, or what ``as_inputs`` refuses.
    """
    inputs = as_inputs(item)
    if not isinstance(item, Mapping) and not isinstance(item[0], Mapping):
        raise DataError(
            "A Hugging Face model takes its inputs by name, but the batch is an (inputs, labels) "
            f"pair whose inputs are a tensor of shape {list(inputs['inputs'].shape)}. Give "
            "{'input_ids': ..., 'attention_mask': ..., 'labels': ...}, or a function that makes it "
            "of a batch: engine.set_batch_fn(lambda pair: {...})."
        )
    return inputs


def sizes_of(inputs: Mapping[str, Tensor]) -> tuple[int, int]:
    """Samples of a batch, and tokens: without padding where there is a mask; of packed rows, which
    have none, all; of what has no tokens as many as samples."""
    samples = len(next(iter(inputs.values())))
    if (mask := inputs.get("attention_mask")) is not None:
        return samples, int(mask.sum())
    return samples, inputs["input_ids"].numel() if "input_ids" in inputs else samples
