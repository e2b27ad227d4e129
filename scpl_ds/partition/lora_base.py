"""``model.lora.base_dtype``: in which type the frozen weights beside adapters are held.

What is trained stays in fp32, as peft keeps adapters; the products of the two meet in autocast.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scpl_ds.errors import PartitionError, RecipeError

DTYPES = {"bfloat16": torch.bfloat16, "nf4": torch.bfloat16}
"""``model.lora.base_dtype`` -> of what is held in an ordinary type; with ``nf4`` embeddings, norms
and heads are."""


def hold(model: PreTrainedModel, base_dtype: str) -> None:
    """Make what is frozen ``base_dtype`` and what is trained fp32, in place, tensor by tensor.

    A norm with a bias that is trained stays whole in fp32, and so does what the architecture never
    has in half precision. What is trained is copied out of the file, and what was in another type
    there is made anew, so that no page of it stays in memory for their sake.
    """
    whole = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        trained = any(p.requires_grad for p in own) and not isinstance(module, nn.Linear | Conv1D)
        precise = trained or not whole.isdisjoint(path.split("."))
        for parameter in own:
            if precise or parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32, copy=True)
            else:
                parameter.data = parameter.data.to(DTYPES[base_dtype])
    say_held(model, base_dtype)


def take_as_given(model: PreTrainedModel, computed_in: str) -> None:
    """Leave the base of a ``PeftModel`` that was loaded in bf16 as it is, where bf16 is computed
    in, and make what is trained fp32."""
    if getattr(model, "peft_config", None) is None or computed_in != "bf16":
        return
    if all(p.requires_grad or p.dtype != torch.bfloat16 for p in model.parameters()):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    say_held(model, "bfloat16")


def say_held(model: nn.Module, base_dtype: str) -> None:
    """What :func:`base_dtype_of` says from now on."""
    model.base_dtype = base_dtype  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def base_dtype_of(model: Any) -> str | None:
    """``model.lora.base_dtype`` of a model or stage; None: weights are as the backend holds all."""
    return getattr(model, "base_dtype", None)


# -- four bits -----------------------------------------------------------------------------


def pack(model: PreTrainedModel, layers: Collection[nn.Module]) -> None:
    """Put bitsandbytes' ``Linear4bit`` in the place of every ``nn.Linear`` of the layers, in place,
    one by one: no more than one of them is there twice.

    Raises:
        RecipeError: bitsandbytes is not installed.
        PartitionError: The layers have no ``nn.Linear``.
    """
    bnb = _bitsandbytes()
    found = list(_linears(layers))
    if not found:
        raise PartitionError(
            f"model.lora.base_dtype: nf4 packs the nn.Linear modules of the layers, and those of "
            f"'{model.config.model_type}' have none (GPT-2's are Conv1D). Use bfloat16."
        )
    for parent, name, linear in found:
        packed = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None,
            compute_dtype=torch.bfloat16, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", module=packed
        )
        packed.bias = linear.bias
        packed.weight = packed.weight.to("cpu")  # now it is packed, wherever it goes later
        # On some CPUs an evaluation would change the layout for good, and with it what is trained.
        packed.support_avx512bf16_for_cpu = False
        setattr(parent, name, packed)
    model.is_loaded_in_4bit = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def held_bytes(stage: Any, ahead: Any = None) -> int | None:
    """Bytes of what a stage, and the copies it looks through, do not train, by their shapes, where
    ``base_dtype`` holds it; else None."""
    if base_dtype_of(stage) is None:
        return None
    total = sum(p.nbytes for p in stage.parameters() if not p.requires_grad)
    total += 0 if ahead is None else held_bytes(ahead) or 0
    for weight in _to_pack(stage):
        # Half a byte a number, one for 64 of them, 4 bytes for 256 of these, tables of 272 floats.
        blocks = -(-weight.numel() // 64)
        packed = -(-weight.numel() // 2) + blocks + 4 * -(-blocks // 256) + 4 * 272
        total += packed - weight.nbytes
    return total


def unpacked_bytes(stage: Any) -> int:
    """The most that one product makes of a packed weight, which is whole while it lasts."""
    return max((weight.nbytes for weight in _to_pack(stage)), default=0)


def _to_pack(stage: Any) -> list[torch.Tensor]:
    """Weights of a stage without values that would be packed if it had them."""
    if base_dtype_of(stage) != "nf4":
        return []
    found = _linears(stage.blocks)
    return [linear.weight for _, _, linear in found if not linear.weight.requires_grad]


def _linears(layers: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    for layer in layers:
        for parent in list(layer.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    yield parent, name, module


def _bitsandbytes() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RecipeError(
            "model.lora.base_dtype: nf4 comes from bitsandbytes, which cannot be imported "
            f"({error}). pip install 'scpl-ds[qlora]', or use bfloat16."
        ) from error
    return bitsandbytes
