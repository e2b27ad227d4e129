"""The embedding and the LM head, for stages that hold neither."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scpl_ds.partition.anatomy import Anatomy

Matrices = Callable[[Collection[str]], Mapping[str, Tensor]]
"""Names of ``objectives._base.Matrix`` -> those that the model has, each [V, E]."""

_GETTERS = {
    "input_embeddings": "get_input_embeddings",
    "output_embeddings": "get_output_embeddings",
}


def matrices_of(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Copies of a model's matrices, detached; one of them where the two are tied."""
    copies: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name in names:
        getter: Any = getattr(model, _GETTERS[name], None)
        module = None if getter is None else getter()
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            if id(weight) not in copies:
                copies[id(weight)] = weight.detach().clone()
            found[name] = copies[id(weight)]
    return found


def matrices_of_stages(
    make_stage: Callable[[int, int], nn.Module], anatomy: Anatomy, names: Collection[str]
) -> dict[str, Tensor]:
    """The same of a checkpoint, of which only the layer beside each matrix is read too.

    Args:
        make_stage: Layers ``[start, end)`` as they are before training.
        anatomy: Of the model.
        names: Which.
    """
    found: dict[str, Tensor] = {}
    last = anatomy.num_layers
    spans = {"input_embeddings": (0, 1), "output_embeddings": (last - 1, last)}
    for name in names:
        stage: Any = make_stage(*spans[name])
        found |= matrices_of(stage.model, [name])
    if len(found) == 2 and _tied(anatomy):
        found["output_embeddings"] = found["input_embeddings"]
    return found


def shapes_of(config: Any, names: Collection[str]) -> dict[str, Tensor]:
    """Matrices without values, for a plan or an estimate of memory: on ``meta``, or fake where
    tensors are."""
    text = config.get_text_config()
    tokens = getattr(text, "vocab_size", None)
    width = getattr(text, "embedding_size", None) or getattr(text, "hidden_size", None)
    if not isinstance(tokens, int) or not isinstance(width, int):
        return {}
    return {name: torch.empty(tokens, width, device="meta") for name in names}


def _tied(anatomy: Anatomy) -> bool:
    return any(
        {anatomy.section(target), anatomy.section(source)} == {"prologue", "epilogue"}
        for target, source in anatomy.crossing_ties(0, 1).items()
    )
