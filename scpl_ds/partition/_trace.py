"""Watching one forward of a model, to tell its parts from the order in which they are called."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import base_prefix, one_line, use_cache_off

_BATCH = 2  # not 1: an output of shape [1, T, D] is told from one of [B, T, D]
_LENGTH = 128


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    batch, heads, length, depth = query
    return 2 * batch * heads * length * key[-2] * (depth + value[-1])


def _grouped_product_flops(
    rows: Sequence[int], experts: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * rows[-2] * experts[-2] * experts[-1]


# What torch's FlopCounterMode counts as 0: attention on CPU, and experts.
_FLOP_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_product_flops,
}


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The parts of one architecture with one config. Pure data.

    A *unit* is a largest module that does not contain the layer stack (``bert.embeddings``,
    ``classifier``, ``model.norm``), by its dotted Hugging Face name.
    """

    layers: str
    """Dotted name of the ``ModuleList`` of layers."""
    num_layers: int
    prologue: dict[str, str]
    """Units with parameters that run before layer 0 -> shape of what they return, compared with the
    hidden states [B, T, D]: ``full`` the same, ``row`` [1, T, D], ``flat`` [T, D], ``other``."""
    epilogue: tuple[str, ...]
    """Units with parameters that run after the last layer, or never (kept on the last stage)."""
    free: tuple[str, ...]
    """Units without parameters (rotary tables, dropout): every stage has its own."""
    layer_arity: int
    """Length of the tuple a layer returns; 0: it returns the tensor itself."""
    forward_keys: tuple[str, ...]
    """Arguments that the base model's forward names."""
    hidden_size: int
    model_type: str
    sequence_length: int
    """T of the example that the FLOPs below were counted on (B = 1)."""
    layer_flops: tuple[int, ...]
    prologue_flops: int
    epilogue_flops: int
    layer_parameters: tuple[int, ...]
    prologue_parameters: int
    epilogue_parameters: int
    """Counts tied matrices too: the last of several stages has its own copy."""
    tied: dict[str, str]
    """Tied parameter -> the one it is tied to."""
    tied_parameters: int
    """Size of the ties between prologue and epilogue: one stage counts them twice above."""

    def section(self, name: str) -> int | str:
        """Where a parameter belongs: a layer's index, ``prologue``, ``epilogue`` or ``free``."""
        if name.startswith(self.layers + "."):
            return int(name[len(self.layers) + 1 :].split(".")[0])
        for section, units in (("prologue", self.prologue), ("epilogue", self.epilogue)):
            if any(name.startswith(unit + ".") for unit in units):
                return section
        return "free"

    def owns(self, name: str, start: int, end: int) -> bool:
        """Whether the stage of layers ``[start, end)`` owns the parameter ``name``."""
        section = self.section(name)
        if isinstance(section, int):
            return start <= section < end
        return {"prologue": start == 0, "epilogue": end == self.num_layers}.get(section, True)

    def crossing_ties(self, start: int, end: int) -> dict[str, str]:
        """Ties of which the two ends are not both in the stage of layers ``[start, end)``, nor can
        both be in another one."""
        if start == 0 and end == self.num_layers:
            return {}
        return {
            target: source
            for target, source in self.tied.items()
            if self.section(target) != self.section(source)
            and not (self.owns(target, start, end) and self.owns(source, start, end))
        }


class TraceError(PartitionError):
    """The model's own forward failed while it was watched, perhaps only for this dtype."""


def trace(model: PreTrainedModel) -> tuple[Anatomy, dict[str, Tensor]]:
    name = model.config.model_type
    layers_name, layers = _find_layers(model)
    units = _find_units(model, layers_name)
    _refuse_loose_parameters(model, layers_name)
    inputs = _example(model)

    calls: list[str | int] = []
    output_shapes: dict[str, tuple[int, ...] | None] = {}
    flops_after: list[int] = []
    flops_before_first = 0
    hidden_shapes: list[tuple[int, ...]] = []
    arity = 0
    counter = FlopCounterMode(display=False, custom_mapping=_FLOP_FORMULAS)

    def unit_hook(unit: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls.append(unit)
            output_shapes[unit] = next((tuple(t.shape) for t in _tensors(output)), None)

        return hook

    def layer_pre_hook(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal flops_before_first
            if not calls or 0 not in calls:
                flops_before_first = counter.get_total_flops()
            calls.append(index)
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor):
                raise PartitionError(
                    f"layer {index} of '{name}' takes no hidden_states tensor first; "
                    "it cannot be fed from another stage. Choose another model."
                )
            hidden_shapes.append(tuple(hidden.shape))
            hidden_shape = hidden_shapes[0]
            if tuple(hidden.shape) != hidden_shape or hidden.shape[:2] != inputs["input_ids"].shape:
                raise PartitionError(
                    f"layer {index} of '{name}' takes hidden states of shape {list(hidden.shape)}; "
                    "stages pass on one [batch, positions, hidden] tensor of one shape. "
                    "Choose another model."
                )
            if hidden.dim() != 3:
                raise PartitionError(
                    f"the layers of '{name}' pass on a tensor of shape {list(hidden.shape)}, not "
                    "[batch, positions, hidden]. Choose another model."
                )
            others = [t for t in (*_tensors(args), *_tensors(kwargs)) if t is not hidden]
            trained = [list(t.shape) for t in others if t.requires_grad]
            if trained:
                raise PartitionError(
                    f"layer {index} of '{name}' takes, beside the hidden states, {len(trained)} "
                    f"input(s) that depend on trained parameters (shapes {trained}), such as a "
                    "shared position bias; its gradient would have to cross stages. Choose another "
                    "model, or a config without it (DeBERTa: relative_attention=False)."
                )

        return hook

    def layer_hook(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal arity
        arity = len(output) if isinstance(output, (tuple, list)) else 0
        flops_after.append(counter.get_total_flops())

    handles = [module.register_forward_hook(unit_hook(unit)) for unit, module in units]
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(layer_pre_hook(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(layer_hook))
    model.eval()
    try:
        with torch.enable_grad(), counter:
            model(**inputs, **use_cache_off(model))
    except PartitionError:
        raise
    except Exception as error:
        raise TraceError(
            f"'{name}' cannot be traced without its weights: {one_line(error)}. Its forward "
            "depends on values or needs other inputs than input_ids and attention_mask. Choose "
            "another model."
        ) from error
    finally:
        for handle in handles:
            handle.remove()

    order = [call for call in calls if isinstance(call, int)]
    if order != list(range(len(layers))):
        raise PartitionError(
            f"'{name}' calls its {len(layers)} layers ({layers_name}) in the order {order[:12]}"
            f"{'...' if len(order) > 12 else ''}; stages need each layer once, in order. "
            "Choose another model."
        )
    if not layers_name.startswith(base_prefix(model)):
        raise PartitionError(
            f"the layers of '{name}' ({layers_name}) are not inside its base model "
            f"({base_prefix(model)[:-1]}). Choose another model."
        )
    prologue, epilogue, free = _sort_units(
        name, units, calls, output_shapes, hidden_shapes[0], len(layers)
    )
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    sizes = {key: p.numel() for key, p in model.named_parameters(remove_duplicate=False)}

    def size(prefixes: Any) -> int:
        return sum(n for key, n in sizes.items() if any(key.startswith(p + ".") for p in prefixes))

    flops_each = [
        b - a for a, b in zip([flops_before_first, *flops_after], flops_after, strict=False)
    ]
    anatomy = Anatomy(
        layers=layers_name,
        num_layers=len(layers),
        prologue=prologue,
        epilogue=epilogue,
        free=free,
        layer_arity=arity,
        forward_keys=tuple(inspect.signature(model.base_model.forward).parameters),
        hidden_size=hidden_shapes[0][-1],
        model_type=name,
        sequence_length=inputs["input_ids"].shape[1],
        layer_flops=tuple(f // _BATCH for f in flops_each),
        prologue_flops=flops_before_first // _BATCH,
        epilogue_flops=(counter.get_total_flops() - flops_after[-1]) // _BATCH,
        layer_parameters=tuple(size([f"{layers_name}.{i}"]) for i in range(len(layers))),
        prologue_parameters=size(prologue),
        epilogue_parameters=size(epilogue),
        tied=tied,
        tied_parameters=0,
    )
    across = [
        t
        for t, s in tied.items()
        if {anatomy.section(t), anatomy.section(s)} == {"prologue", "epilogue"}
    ]
    return dataclasses.replace(
        anatomy, tied_parameters=sum(sizes.get(t, 0) for t in across)
    ), inputs


def _sort_units(
    name: str,
    units: list[tuple[str, nn.Module]],
    calls: list[str | int],
    output_shapes: dict[str, tuple[int, ...] | None],
    hidden_shape: tuple[int, ...],
    num_layers: int,
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    first, last = calls.index(0), calls.index(num_layers - 1)
    prologue: dict[str, str] = {}
    epilogue: list[str] = []
    free: list[str] = []
    for unit, module in units:
        if next(module.parameters(), None) is None:
            free.append(unit)
            continue
        positions = [i for i, call in enumerate(calls) if call == unit]
        where = {"before" if i < first else "after" if i > last else "between" for i in positions}
        if where == {"before"}:
            prologue[unit] = _shape_kind(output_shapes[unit], hidden_shape)
        elif where <= {"after"}:  # or never called: an unused pooler stays on the last stage
            epilogue.append(unit)
        else:
            raise PartitionError(
                f"module '{unit}' of '{name}' has parameters and is used "
                f"{' and '.join(sorted(where))} the layers, so two stages would train it. Choose "
                "another model."
            )
    return prologue, tuple(epilogue), tuple(free)


def _shape_kind(shape: tuple[int, ...] | None, hidden_shape: tuple[int, ...]) -> str:
    if shape == hidden_shape:
        return "full"
    if shape == (1, *hidden_shape[1:]):
        return "row"
    return "flat" if shape == hidden_shape[1:] else "other"


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    name = model.config.model_type
    stacks = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    }
    if not stacks:  # an older model: any list of one class of layers with the length of the config
        depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        stacks = {
            key: module
            for key, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and len(module) == depth
            and len({type(layer) for layer in module}) == 1
        }
    outer = {
        k: m for k, m in stacks.items() if not any(k.startswith(o + ".") for o in stacks if o != k)
    }
    if len(outer) != 1:
        found = ", ".join(f"{key} ({len(module)} layers)" for key, module in outer.items())
        raise PartitionError(
            f"'{name}' has {len(outer)} stacks of layers{f': {found}' if found else ''}; stages "
            "need exactly one list of them. Choose another model."
        )
    return next(iter(outer.items()))


def _find_units(model: nn.Module, layers_name: str) -> list[tuple[str, nn.Module]]:
    units: list[tuple[str, nn.Module]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for child_name, child in module.named_children():
            name = prefix + child_name
            if name == layers_name:
                continue
            if layers_name.startswith(name + "."):
                visit(child, name + ".")
            else:
                units.append((name, child))

    visit(model, "")
    return units


def _refuse_loose_parameters(model: nn.Module, layers_name: str) -> None:
    parts = layers_name.split(".")
    containers = [".".join(parts[:i]) for i in range(len(parts))]
    loose = [
        f"{container}.{name}".lstrip(".")
        for container in containers
        for name, _ in model.get_submodule(container).named_parameters(recurse=False)
    ]
    if loose:
        raise PartitionError(
            f"parameters {loose} belong to no module beside the layers, so it cannot be told which "
            "stage should hold them. Choose another model, or move them into a module of their own."
        )


def _example(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    # RoBERTa starts counting positions at padding_idx + 1
    room = longest - 2 if isinstance(longest, int) and 2 < longest < _LENGTH + 2 else longest
    length = min(_LENGTH, room) if isinstance(room, int) and room > 0 else _LENGTH
    inputs = {"input_ids": torch.ones(_BATCH, length, dtype=torch.long)}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones(_BATCH, length, dtype=torch.long)
    return inputs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
