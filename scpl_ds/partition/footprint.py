"""Stages without weights: tensors that have a shape, a type and no values, for counting bytes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import PretrainedConfig, PreTrainedModel

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import (
    accepts,
    model_class,
    no_init_weights,
    one_line,
    quiet_transformers,
)
from scpl_ds.partition._trace import Anatomy
from scpl_ds.partition.lora import Adapters, adapt
from scpl_ds.partition.lora_base import DTYPES, say_held
from scpl_ds.partition.prepare import recompute_activations
from scpl_ds.partition.stage_module import StageModule, _share

MakeStage = Callable[[int, int], StageModule]
"""(first layer, one past the last) -> that stage."""


@contextlib.contextmanager
def weightless_stages(
    config: PretrainedConfig,
    task: str,
    anatomy: Anatomy,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    adapters: Adapters | None = None,
) -> Iterator[MakeStage]:
    """Inside the block every tensor is fake, and the function given makes stages of the model.

    A stage runs forward and backward like a real one, without arithmetic and without memory.
    FlashAttention cannot run without a GPU; ``sdpa``, which keeps as much, stands in for it, or
    ``eager``, which keeps more, in a model that has no other.

    Raises:
        PartitionError: The model cannot be made without weights, or does not support
            ``gradient_checkpointing``.
    """
    held = None if adapters is None else DTYPES.get(adapters.base_dtype or "")
    config, cls = copy.deepcopy(config), model_class(config, task)
    kwargs = {}
    if attn_implementation is not None:
        fused = attn_implementation != "eager" and cls._supports_sdpa
        kwargs["attn_implementation"] = "sdpa" if fused else "eager"

    def stage(start: int, end: int) -> StageModule:
        made = _share(model, anatomy, start, end)
        return recompute_activations(made) if gradient_checkpointing else made

    with FakeTensorMode(allow_non_fake_inputs=True), quiet_transformers():
        try:
            with no_init_weights():
                model = cls._from_config(config, dtype=held or dtype, **kwargs)
            if adapters is not None:
                _adapt(model, anatomy, adapters, dtype)
        except Exception as error:
            raise PartitionError(
                f"'{config.model_type}' cannot be made without its weights "
                f"({type(error).__name__}: {one_line(error)}), so that its memory cannot be "
                "predicted. Training may still work."
            ) from error
        yield stage


def _adapt(
    model: PreTrainedModel, anatomy: Anatomy, adapters: Adapters, dtype: torch.dtype
) -> None:
    """Put adapters into a model of fake tensors, which then are fake too."""
    with unset_fake_temporarily():  # peft moves what it makes, which a fake tensor refuses
        adapt(model, anatomy, dataclasses.replace(adapters, base_dtype=None))
    if adapters.base_dtype is not None:
        say_held(model, adapters.base_dtype)
    for module in model.modules():
        for name, made in list(module.named_parameters(recurse=False)):
            if not isinstance(made, FakeTensor) or (made.requires_grad and made.dtype != dtype):
                like = torch.empty(made.shape, dtype=dtype)
                setattr(module, name, nn.Parameter(like, requires_grad=made.requires_grad))


def example_inputs(
    config: PretrainedConfig, task: str, *, micro_batch: int, sequence_length: int
) -> dict[str, Tensor]:
    """A micro-batch as the collator gives it, all positions real."""
    shape = (micro_batch, sequence_length)
    inputs = {"input_ids": torch.ones(shape, dtype=torch.long)}
    if accepts(model_class(config, task).forward, "attention_mask"):
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    whole = task == "causal-lm"
    inputs["labels"] = torch.zeros(shape if whole else shape[:1], dtype=torch.long)
    return inputs


def longest_sequence(config: PretrainedConfig, asked: int) -> int:
    """``asked`` positions, or as many as the model has."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(asked, positions) if isinstance(positions, int) and positions > 0 else asked
