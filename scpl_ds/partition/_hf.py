"""What the other modules of this room ask of transformers itself."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from scpl_ds.errors import PartitionError

log = logging.getLogger(__name__)

_AUTO_CLASSES = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
}


def auto_class(task: str) -> Any:
    """``AutoModelForSequenceClassification`` or ``AutoModelForCausalLM``.

    Raises:
        PartitionError: ``task`` is neither ``sequence-classification`` nor ``causal-lm``.
    """
    if task not in _AUTO_CLASSES:
        raise PartitionError(f"unknown task '{task}'. Known: {', '.join(_AUTO_CLASSES)}.")
    return _AUTO_CLASSES[task]


def model_class(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """The transformers class that ``task`` means for this config.

    Raises:
        PartitionError: There is none, or the model is remote code, quantised or an encoder-decoder.
    """
    name = config.model_type or type(config).__name__
    auto = auto_class(task)
    mapping = auto._model_mapping
    known = type(config) in mapping
    remote = type(config).__module__.startswith("transformers_modules")
    if remote or (getattr(config, "auto_map", None) and not known):
        raise PartitionError(
            f"'{name}' runs code from its own repository (trust_remote_code); stages are made only "
            "of classes that transformers ships or that you registered with AutoModel.register. "
            "Register its classes in your program, or use a model type that transformers has."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise PartitionError(
            f"'{name}' is quantised (config.quantization_config is set); stages train "
            "full-precision weights. Use the original checkpoint, or dequantise it and save it "
            "first."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise PartitionError(
            f"'{name}' is an encoder-decoder; stages need one stack of layers. "
            "Encoder-only and decoder-only models work: `scpl-ds plan` tells for any of them."
        )
    if not known:
        other = [
            task_ for task_ in _AUTO_CLASSES if type(config) in auto_class(task_)._model_mapping
        ]
        hint = f"It has '{other[0]}': set model.task to that" if other else "Choose another model"
        raise PartitionError(
            f"transformers {transformers.__version__} has no '{task}' model for '{name}' "
            f"({auto.__name__}). {hint}."
        )
    found = mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def base_prefix(model: PreTrainedModel) -> str:
    """``'bert.'``: how names in the base model start; empty if the model is its own base."""
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def accepts(function: Callable[..., Any], key: str) -> bool:
    """Whether ``function`` can be called with a keyword argument ``key``."""
    parameters = inspect.signature(function).parameters
    return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def use_cache_off(model: PreTrainedModel) -> dict[str, bool]:
    """``{'use_cache': False}`` if the model knows a cache, else nothing."""
    knows = "use_cache" in inspect.signature(model.base_model.forward).parameters
    return {"use_cache": False} if knows and accepts(model.forward, "use_cache") else {}


def without_reentrant_checkpoints(model: PreTrainedModel) -> None:
    """Give checkpointing that the user has switched on the form that is not reentrant.

    A reentrant checkpoint trains nothing unless its input gets a gradient, and what a stage
    receives gets none. The numbers stay the same.
    """
    replaced = False
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", True):
            keywords = {**function.keywords, "use_reentrant": False}
            module._gradient_checkpointing_func = functools.partial(  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
                function.func, *function.args, **keywords
            )
            replaced = True
    if replaced:
        log.info("gradient checkpointing: use_reentrant=False in the stages, the same numbers.")


def one_line(error: BaseException) -> str:
    """The message of an error on one line, at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def skeleton(config: PretrainedConfig, task: str) -> PreTrainedModel:
    """The whole model without memory for its weights."""
    with torch.device("meta"), no_init_weights():
        return model_class(config, task)(copy.deepcopy(config))


@contextlib.contextmanager
def no_init_weights() -> Iterator[None]:
    """Build a model without drawing its weights."""
    from transformers import initialization

    with initialization.no_init_weights():
        yield


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No reports and no progress bars from transformers inside the block."""
    hf = transformers.utils.logging
    verbosity, bar = hf.get_verbosity(), hf.is_progress_bar_enabled()
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    try:
        yield
    finally:
        hf.set_verbosity(verbosity)
        if bar:
            hf.enable_progress_bar()
