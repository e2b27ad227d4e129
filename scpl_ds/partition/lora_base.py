"""``model.lora.base_dtype``: in which type the frozen weights beside adapters are held.

What is trained stays in fp32, as peft keeps adapters; the products of the two meet in autocast.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

DTYPES = {"bfloat16": torch.bfloat16}
"""``model.lora.base_dtype`` -> torch's name, of what is held in an ordinary type."""


def hold(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make what is frozen ``dtype`` and what is trained fp32, in place, tensor by tensor.

    A norm with a bias that is trained stays whole in fp32, and so does what the architecture never
    has in half precision. Nothing is left in the file that was in another type there.
    """
    whole = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        trained = any(p.requires_grad for p in own) and not isinstance(module, nn.Linear | Conv1D)
        precise = trained or not whole.isdisjoint(path.split("."))
        for parameter in own:
            wanted = torch.float32 if precise or parameter.requires_grad else dtype
            parameter.data = parameter.data.to(wanted)
    model.base_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def take_as_given(model: PreTrainedModel, computed_in: str) -> None:
    """Hold the bf16 base of a ``PeftModel`` as its user loaded it, where bf16 is computed in."""
    if getattr(model, "peft_config", None) is None or computed_in != "bf16":
        return
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    if torch.bfloat16 in frozen:
        hold(model, torch.bfloat16)


def base_dtype_of(model: nn.Module) -> torch.dtype | None:
    """In which type a model's frozen weights were asked to be held; None: as the backend holds
    all."""
    return getattr(model, "base_dtype", None)
