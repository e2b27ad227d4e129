"""What a Hugging Face model is made of, found by watching one forward: no table per architecture.

The model is built under ``FakeTensorMode`` (shapes only: no weights, no arithmetic) and run once.
The order in which its modules are called tells what belongs before the stack of layers and what
after it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import (
    auto_class,
    model_class,
    no_init_weights,
    one_line,
    quiet_transformers,
)
from scpl_ds.partition._trace import Anatomy, TraceError, trace
from scpl_ds.partition.config import check_problem_type
from scpl_ds.partition.stage_module import dry_run

__all__ = ["Anatomy", "analyze", "anatomy_of", "auto_class", "model_class"]


def anatomy_of(
    config: PretrainedConfig, task: str, *, attn_implementation: str | None = None
) -> Anatomy:
    """The anatomy of the model that ``config`` and ``task`` describe, without building its weights.

    The parts are also put together as two stages and run, still without weights, so that a model
    that would fail in training is refused here.

    Raises:
        PartitionError: The model cannot be cut into stages, or cannot use ``attn_implementation``
            here; the message says why and what to do.
    """
    config = copy.deepcopy(config)  # building with a dtype writes into the config it is given
    cls = model_class(config, task)
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0  # classifiers of more than one row ask for one

    if attn_implementation is not None:
        _check_attention(cls, config, attn_implementation)
    kwargs = {"attn_implementation": attn_implementation} if attn_implementation in _TRACED else {}

    def build(dtype: torch.dtype) -> PreTrainedModel:
        try:
            with no_init_weights():
                return cls._from_config(copy.deepcopy(config), dtype=dtype, **kwargs)
        except (ValueError, ImportError) as error:
            raise PartitionError(
                f"'{config.model_type}' cannot be built: {one_line(error)}"
            ) from error

    return _watch(build)


_TRACED = ("eager", "sdpa")
"""Kernels such as FlashAttention want a GPU and values; a model's parts are the same with any."""


def _check_attention(cls: type[PreTrainedModel], config: PretrainedConfig, name: str) -> None:
    """Let transformers say whether the model, and this machine, have it."""
    try:
        if name.startswith("paged|"):
            raise ValueError("'paged|' is for generation and has no backward")
        with torch.device("meta"), no_init_weights(), quiet_transformers():
            cls._from_config(copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation=name)
    except (ValueError, ImportError) as error:
        raise PartitionError(
            f"model.attn_implementation: '{name}' cannot be used with '{config.model_type}' here "
            f"({one_line(error)}). Set it to eager or sdpa, or remove the key."
        ) from error


def analyze(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a model in memory; its weights are neither read, copied nor changed.

    Raises:
        PartitionError: The model cannot be cut into stages, or its loss is not one over classes;
            the message says why and what to do.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        model_class(model.config, "causal-lm")  # says why not
    check_problem_type(model.config)

    def build(dtype: torch.dtype) -> PreTrainedModel:
        memo: dict[int, Any] = {}
        for tensor in _all_tensors(model):
            fake = torch.empty_like(tensor, dtype=dtype if tensor.is_floating_point() else None)
            memo[id(tensor)] = nn.Parameter(fake) if isinstance(tensor, nn.Parameter) else fake
        twin = copy.deepcopy(model, memo)
        if getattr(twin.config, "_attn_implementation", None) not in (*_TRACED, None):
            twin.set_attn_implementation("eager")
        if twin.config.get_text_config().pad_token_id is None:
            twin.config.get_text_config().pad_token_id = 0
        return twin

    return _watch(build)


def _watch(build: Callable[[torch.dtype], PreTrainedModel]) -> Anatomy:
    with FakeTensorMode(allow_non_fake_inputs=True), quiet_transformers(), _quiet_fake_tensors():
        try:
            model = build(torch.float32)
            anatomy, inputs = trace(model)
        except TraceError:  # grouped products of experts have a shape rule for bf16 only
            model = build(torch.bfloat16)
            anatomy, inputs = trace(model)
        dry_run(model, anatomy, inputs)
        return anatomy


@contextlib.contextmanager
def _quiet_fake_tensors() -> Iterator[None]:
    """torch logs a traceback for an operation that has no shape rule; here it is an answer."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _all_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
