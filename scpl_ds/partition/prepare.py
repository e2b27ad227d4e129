"""How a stage computes, not what: activations recomputed in backward, layers compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

from scpl_ds.errors import PartitionError
from scpl_ds.partition.stage_module import StageModule
from scpl_ds.recipe import TrainSection


def prepare(stage: StageModule, train: TrainSection) -> StageModule:
    """Give a loaded stage what ``train.gradient_checkpointing`` and ``train.torch_compile*`` ask.

    Before it is sharded: FSDP2 puts its own class around a compiled layer.

    Raises:
        PartitionError: The model does not support gradient checkpointing.
    """
    if train.gradient_checkpointing:
        recompute_activations(stage)
    if train.torch_compile:
        compile_blocks(stage.blocks, train.torch_compile_backend, train.torch_compile_mode)
    return stage


def recompute_activations(stage: StageModule) -> StageModule:
    """Keep only what enters each layer, and run the layer once more in backward.

    Equal to the bit, dropout included. Embeddings and head keep their activations. It is Hugging
    Face's checkpointing in the form that is not reentrant: a reentrant checkpoint trains nothing
    unless its input, here what another stage sent, gets a gradient.

    Raises:
        PartitionError: The model does not support it.
    """
    model = stage.model
    try:
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise PartitionError(
            f"gradient checkpointing: '{model.config.model_type}' ({type(model).__name__}) does "
            "not support it in transformers. Switch it off; more stages (scpl.stages) on the same "
            "ranks lower the memory of activations too."
        ) from error
    # transformers also asks for a gradient at the embeddings, for the reentrant form's sake.
    model.disable_input_require_grads()
    return stage


def compile_blocks(
    blocks: Iterable[nn.Module], backend: str | None = None, mode: str | None = None
) -> None:
    """Compile what the blocks compute, one by one, in place; names of tensors stay.

    Blocks of one class share their graphs, so twelve equal layers compile as one. Hooks (ours, a
    sharding backend's) and checkpointing stay outside of what is compiled: none of them can break a
    graph or make it compile again.

    Args:
        blocks: Distinct modules, not compiled before.
        backend: One of ``torch._dynamo.list_backends()``; None is ``inductor``.
        mode: Of ``inductor`` (``reduce-overhead`` ...); None is its default.
    """
    for block in blocks:
        block.__class__ = _compiled(type(block), backend or "inductor", mode)


@functools.cache
def _compiled(cls: type[nn.Module], backend: str, mode: str | None) -> type[nn.Module]:
    """A subclass with a compiled ``forward``.

    An attribute of the instance would not do: a deep copy would go on calling the original.
    """
    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "forward": torch.compile(cls.forward, backend=backend, mode=mode),
    }
    return type(cls.__name__, (cls,), body)
