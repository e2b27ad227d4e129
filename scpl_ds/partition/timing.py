"""How long the layers of a model take here, one at a time, so that a cut can be made by time.

Nothing is known of ranks: one process measures, and whoever calls it tells the others.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from scpl_ds.errors import PartitionError, ScplError
from scpl_ds.partition._hf import model_class, one_line, quiet_transformers
from scpl_ds.partition._trace import Anatomy
from scpl_ds.partition.layer_list import Layer, LayerListStage
from scpl_ds.partition.plan import LayerTimes, Timing
from scpl_ds.partition.stage_module import StageModule, _share

REPEATS = 7
"""Timed runs of a layer, of which the shortest counts: what else a machine does only adds. Two
more come before them."""
ALIKE = 3
"""Layers that are measured of those that are alike: the first, the middle and the last."""
_NONE = Timing(0.0, 0.0)
_NUMBERED = frozenset({"layer_idx", "layer_id", "layer_index", "training"})
"""Attributes in which layers that are alike differ."""


class Setting(NamedTuple):
    """How a run computes."""

    device: torch.device
    dtype: torch.dtype
    """Of the weights, in forward and backward."""
    autocast: torch.dtype | None
    """What ``torch.autocast`` computes products in; None where it is off."""

    def forward(self) -> contextlib.AbstractContextManager[Any]:
        """Where a forward runs."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, dtype=self.dtype).train()


LocalHead = Callable[[Tensor], Tensor]
"""Hidden states [B, T, D] or [B, D] -> local loss."""


def time_model(
    make_stage: Callable[[int], StageModule],
    kinds: Sequence[Hashable],
    head: LocalHead | None,
    setting: Setting,
    inputs: dict[str, Tensor],
    hidden_size: int,
) -> LayerTimes:
    """Time the layers of a Hugging Face model, as stages of one layer each.

    What enters a layer gets a gradient, as it does from the layer before it in a stage. Prologue
    and epilogue are what the first and the last layer take longer than another one of their kind;
    where there is none, they count as part of the layer.

    Args:
        make_stage: Layer -> the stage of that layer alone, its weights of any value; the one before
            is forgotten first.
        kinds: One a layer; those of equal ones are measured up to ``ALIKE`` times.
        head: The local objective on top of a layer; None where no stage has one.
        setting: Device and types.
        inputs: One micro-batch: ``input_ids`` [B, T], ``labels`` ...
        hidden_size: D.

    Raises:
        PartitionError: A layer does not run on its own.
    """
    inputs = {name: tensor.to(setting.device) for name, tensor in inputs.items()}
    last = len(kinds) - 1
    shape = (*inputs["input_ids"].shape, hidden_size)
    seen: dict[Hashable, list[Timing]] = {}
    ends: dict[int, Timing] = {}
    with _careful(setting):
        hidden = torch.randn(shape, device=setting.device, dtype=setting.dtype)
        grad = torch.randn_like(hidden)
        for index in sorted({*_sample(kinds), 0, last}):
            with _named(index):
                found = _time_stage(make_stage(index), setting, inputs, hidden, grad)
            if index in (0, last):
                ends[index] = found
            else:
                seen.setdefault(kinds[index], []).append(found)
        on_top = _NONE if head is None else _time(head, setting, hidden, None)
    alike = {kind: _median(found) for kind, found in seen.items()}
    for index, found in ends.items():
        alike.setdefault(kinds[index], found)
    if last in ends and kinds[0] == kinds[last] and kinds[0] not in seen:  # two layers, or one
        alike[kinds[0]] = _shorter(ends[0], ends[last])
    return LayerTimes(
        layers=tuple(alike[kind] for kind in kinds),
        prologue=_more(ends[0], alike[kinds[0]]),
        epilogue=_more(ends[last], alike[kinds[last]]) if last > 0 else _NONE,
        heads=(on_top,) * len(kinds),
        setting=_words(setting, shape[:2]),
    )


def time_list(
    layers: Sequence[Layer],
    make_head: Callable[[int], LocalHead] | None,
    setting: Setting,
    example: Tensor,
    *,
    micro_batch: int,
    seed: int,
) -> LayerTimes:
    """Time the layers of a list, each on what the one before it returned.

    Args:
        layers: Modules, functions and specs; modules are copied.
        make_head: Width of a boundary -> the local objective there; None where no stage has one.
        setting: Device and types.
        example: One batch of inputs; repeated or cut to ``micro_batch`` rows.
        micro_batch: B.
        seed: Of new weights.

    Raises:
        PartitionError: A layer does not run on its own, or returns no floating-point tensor.
    """
    rows = -(-micro_batch // max(1, len(example)))
    value = torch.cat([example] * rows)[:micro_batch].to(setting.device)
    shape = tuple(value.shape)
    times: list[Timing] = []
    heads: list[Timing] = []
    with _careful(setting):
        for index in range(len(layers)):
            with _named(index):
                alone = list(layers)
                if isinstance(alone[index], nn.Module):
                    alone[index] = copy.deepcopy(alone[index])
                stage = LayerListStage(
                    alone, index, index + 1, loss_fn=None, hidden_size=None, seed=seed
                )
                setting.place(stage)
                value = value.to(setting.dtype) if value.is_floating_point() else value
                call = functools.partial(_through, stage)
                with torch.no_grad(), setting.forward():
                    output = call(value)
                _require_tensor(index, output)
                times.append(_time(call, setting, value, torch.randn_like(output)))
                inner = make_head is not None and index < len(layers) - 1
                heads.append(
                    _time(make_head(output.shape[-1]), setting, output, None)
                    if inner and make_head is not None
                    else _NONE
                )
                value = output
    if make_head is not None and len(heads) > 1:
        heads[-1] = heads[-2]  # the last stage's objective sits below the task head
    return LayerTimes(tuple(times), _NONE, _NONE, tuple(heads), _words(setting, shape))


def random_stages(
    config: PretrainedConfig,
    task: str,
    anatomy: Anatomy,
    setting: Setting,
    *,
    attn_implementation: str | None = None,
    prepare: Callable[[StageModule], StageModule] | None = None,
) -> tuple[Callable[[int], StageModule], list[Hashable]]:
    """Stages of one layer each with random weights, and the kind of every layer.

    The model itself has no memory; a stage takes that of its layer (and of the embeddings or the
    head). ``prepare`` changes how a stage computes, as in the run.
    """
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"), quiet_transformers():
        cls = model_class(config, task)
        model = cls._from_config(copy.deepcopy(config), dtype=setting.dtype, **kwargs)

    def make(index: int) -> StageModule:
        stage = _share(model, anatomy, index, index + 1)
        stage.to_empty(device=setting.device)
        stage.model.initialize_weights()  # as from_pretrained does with what files do not have
        return stage if prepare is None else prepare(stage)

    return make, _kinds(model, anatomy)


def copied_stages(
    model: PreTrainedModel,
    anatomy: Anatomy,
    *,
    prepare: Callable[[StageModule], StageModule] | None = None,
) -> tuple[Callable[[int], StageModule], list[Hashable]]:
    """Stages of one layer each of a model in memory, copied, and the kind of every layer."""

    def make(index: int) -> StageModule:
        stage = copy.deepcopy(_share(model, anatomy, index, index + 1))
        return stage if prepare is None else prepare(stage)

    return make, _kinds(model, anatomy)


def _kinds(model: PreTrainedModel, anatomy: Anatomy) -> list[Hashable]:
    layers = model.get_submodule(anatomy.layers)
    flops = anatomy.layer_flops
    return [
        (_kind(layers.get_submodule(str(index))), flops[index])
        for index in range(anatomy.num_layers)
    ]


def _kind(layer: nn.Module) -> Hashable:
    """What two layers must share to take as long: classes, shapes, and plain settings such as the
    width of an attention window. Not the class alone: layers of one class may be set apart."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | float | str) and key not in _NUMBERED
            ),
            tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)),
        )
        for name, module in layer.named_modules()
    )


def _sample(kinds: Sequence[Hashable]) -> list[int]:
    """Layers to measure; the first and the last of the model carry its ends."""
    by_kind: dict[Hashable, list[int]] = {}
    for index in range(1, len(kinds) - 1):
        by_kind.setdefault(kinds[index], []).append(index)
    return [
        index
        for inner in by_kind.values()
        for index in {inner[0], inner[len(inner) // 2], inner[-1]}
    ]


def _time_stage(
    stage: StageModule, setting: Setting, inputs: dict[str, Tensor], hidden: Tensor, grad: Tensor
) -> Timing:
    setting.place(stage)

    def run(value: Tensor) -> Tensor:
        output = stage(inputs, None if stage.is_first else value)
        return output.hidden_states if output.loss is None else output.loss

    return _time(run, setting, hidden, None if stage.is_last else grad)


def _through(stage: LayerListStage, value: Tensor) -> Tensor:
    return stage._run(stage._calls, value)


def _time(
    forward: Callable[[Tensor], Tensor], setting: Setting, value: Tensor, grad: Tensor | None
) -> Timing:
    """Shortest forward, and backward from its output; ``grad`` None: it is a loss."""
    found: list[Timing] = []
    for _ in range(2 + REPEATS):
        entering = value.detach()
        if entering.is_floating_point():
            entering.requires_grad_()
        begin = now(setting.device)
        with setting.forward():
            output = forward(entering)
        between = now(setting.device)
        if output.requires_grad:
            output.backward(None if grad is None else grad.to(output.dtype))
        found.append(Timing(between - begin, now(setting.device) - between))
    return functools.reduce(_shorter, found[2:])


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _careful(setting: Setting):
    """The caller's random numbers stay as they were."""
    devices = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield


@contextlib.contextmanager
def _named(index: int):
    try:
        yield
    except ScplError as error:
        raise PartitionError(f"scpl.partition: time: layer {index} alone: {error}") from error
    except Exception as error:
        raise PartitionError(
            f"scpl.partition: time cannot measure layer {index} alone "
            f"({type(error).__name__}: {one_line(error)}). Use flops, parameters or ranges such as "
            "[[0, 3], [3, 6]]."
        ) from error


def _require_tensor(index: int, output: Any) -> None:
    if not torch.is_tensor(output) or not output.is_floating_point():
        raise PartitionError(
            f"layer {index} returns a {type(output).__name__}, and measuring layer by layer needs "
            "one floating-point tensor. Use parameters or ranges."
        )


def _median(found: Sequence[Timing]) -> Timing:
    return Timing(*(statistics.median(column) for column in zip(*found, strict=True)))


def _shorter(a: Timing, b: Timing) -> Timing:
    return Timing(min(a.forward, b.forward), min(a.backward, b.backward))


def _more(whole: Timing, layer: Timing) -> Timing:
    return Timing(
        max(0.0, whole.forward - layer.forward), max(0.0, whole.backward - layer.backward)
    )


def _words(setting: Setting, shape: Sequence[int]) -> str:
    numbers = str(setting.autocast or setting.dtype).removeprefix("torch.")
    return f"{' x '.join(map(str, shape))} on {setting.device.type}, {numbers}"
