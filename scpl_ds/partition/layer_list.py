"""DeepSpeed's way of giving a pipeline: a list of layers, each taking what the one before
returned."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from scpl_ds.errors import PartitionError
from scpl_ds.partition.plan import PartitionPlan, explicit_bounds, min_max_cut
from scpl_ds.partition.stage_module import StageOutput


class LayerSpec:
    """A layer that is built later, and only by the stage that owns it (as in
    ``deepspeed.pipe``)."""

    def __init__(
        self, typename: Callable[..., Any], *module_args: Any, **module_kwargs: Any
    ) -> None:
        self.typename, self.module_args, self.module_kwargs = typename, module_args, module_kwargs

    def build(self) -> Any:
        return self.typename(*self.module_args, **self.module_kwargs)


class TiedLayerSpec(LayerSpec):
    """One module in several places of the list: all of the same ``key``, within one stage only.

    As in DeepSpeed the first of them is built, and the others are that one, called by their own
    ``forward_fn(module, value)``. ``tied_weight_attr`` is taken for its sake and not needed: it
    says what several stages would have to agree on.
    """

    def __init__(
        self,
        key: str,
        typename: Callable[..., Any],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | Sequence[str] = ("weight",),
        **module_kwargs: Any,
    ) -> None:
        super().__init__(typename, *module_args, **module_kwargs)
        self.key, self.forward_fn = key, forward_fn
        names = [tied_weight_attr] if isinstance(tied_weight_attr, str) else list(tied_weight_attr)
        self.tied_weight_attr = names


@runtime_checkable
class BuildsLayer(Protocol):
    """What a ``LayerSpec`` can do; DeepSpeed's own specs can too."""

    def build(self) -> Any: ...


@runtime_checkable
class TiesLayer(BuildsLayer, Protocol):
    """What a ``TiedLayerSpec`` has, DeepSpeed's own included."""

    key: str
    forward_fn: Callable[[Any, Any], Any] | None
    tied_weight_attr: Sequence[str]


Layer = nn.Module | BuildsLayer | Callable[[Any], Any]


class LayerListStage(nn.Module):
    """Layers ``[start, end)`` of a list; the counterpart of ``StageModule`` for models given as
    one.

    Tensors are named ``layers.<index in the whole list>.*``. Labels and the first layer's input are
    the batch's ``labels`` and ``inputs``; between layers goes one tensor.

    Args:
        layers: The whole list; only this stage's part is built.
        start: First layer.
        end: One past the last.
        loss_fn: ``loss_fn(outputs, labels)``, called on the last stage.
        hidden_size: Width of what the stage returns, where it is known.
        seed: Of new weights.
        checkpoint_interval: In training keep only what enters every n-th layer and run those n
            layers again in backward; 0 keeps everything. The last layer of the list is left out:
            the local objective needs what enters it.

    Raises:
        PartitionError: ``checkpoint_interval`` with a layer that keeps running statistics.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        start: int,
        end: int,
        *,
        loss_fn: Callable[[Any, Tensor], Tensor] | None,
        hidden_size: int | None,
        seed: int,
        checkpoint_interval: int = 0,
    ) -> None:
        super().__init__()
        self.start, self.end, self.num_layers = start, end, len(layers)
        self.is_first, self.is_last = start == 0, end == len(layers)
        self.hidden_size = hidden_size
        self.kept = None
        self.layers = nn.ModuleDict()
        self._loss_fn = loss_fn
        self._calls: list[Callable[[Any], Any]] = []
        tied: dict[str, Any] = {}
        for index in range(start, end):
            # Seeded by the layer's own number: a layer starts the same in whatever stage it is
            # built.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((seed * 1_000_003 + index) % 2**63)
                built, call = _build(layers[index], tied)
            self._calls.append(call)
            # A tied module is named after the first of its layers.
            if isinstance(built, nn.Module) and built not in self.layers.values():
                self.layers[str(index)] = built
        self._interval = checkpoint_interval
        if checkpoint_interval:
            _refuse_running_statistics(self.layers)

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules this stage owns, in order, a tied one once: what is sharded or compiled one
        by one. Functions of the list are not among them."""
        return list(self.layers.values())

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden_states: Tensor | None,
        *,
        detach_features: bool = False,
    ) -> StageOutput:
        """Run this stage's layers; the last one's output is the logits on the last stage.

        With ``detach_features`` the last layer of the list is the task head: it reads the output of
        the layer before it cut from autograd.
        """
        value: Any = inputs["inputs"] if hidden_states is None else hidden_states
        if not self.is_last:
            value = self._run(self._calls, value)
            self._check(value)
            return StageOutput(value, None, None)
        *body, last = self._calls
        features = self._run(body, value)
        logits = last(features.detach() if detach_features else features)
        labels = inputs.get("labels")
        loss = None if labels is None or self._loss_fn is None else self._loss_fn(logits, labels)
        return StageOutput(features, loss, logits)

    def _run(self, calls: Sequence[Callable[[Any], Any]], value: Any) -> Any:
        recompute = self._interval > 0 and self.training and torch.is_grad_enabled()
        step = self._interval if recompute else max(1, len(calls))
        for at in range(0, len(calls), step):
            part = functools.partial(_chain, calls[at : at + step])
            value = checkpoint(part, value, use_reentrant=False) if recompute else part(value)
        return value

    def _check(self, value: Any) -> None:
        if not torch.is_tensor(value) or not value.is_floating_point():
            kind = value.dtype if torch.is_tensor(value) else type(value).__name__
            raise PartitionError(
                f"layer {self.end - 1}, the last of its stage, returned a {kind}; one "
                "floating-point "
                "tensor can cross a boundary. Cut elsewhere, or keep side values in the batch."
            )


def _chain(calls: Iterable[Callable[[Any], Any]], value: Any) -> Any:
    for call in calls:
        value = call(value)
    return value


def _refuse_running_statistics(layers: nn.ModuleDict) -> None:
    for name, module in layers.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise PartitionError(
                f"activation checkpointing: layer {name} ({type(module).__name__}) keeps running "
                "statistics, and would count every batch twice. Use activation_checkpoint_interval "
                "0, or a norm without them (LayerNorm, GroupNorm)."
            )


def _build(layer: Layer, tied: dict[str, Any]) -> tuple[Any, Callable[[Any], Any]]:
    """A layer and how it is called; ``tied`` holds the tied ones that were built before, by key."""
    if isinstance(layer, TiesLayer):
        if layer.key not in tied:
            tied[layer.key] = layer.build()
        built, forward_fn = tied[layer.key], layer.forward_fn
        return built, built if forward_fn is None else functools.partial(forward_fn, built)
    built = layer.build() if isinstance(layer, BuildsLayer) else layer
    return built, built


def check_layers(layers: Sequence[Layer], bounds: Sequence[int]) -> None:
    """Refuse what decoupled stages cannot do with a list of layers.

    Raises:
        PartitionError: Tied layers in different stages; an entry that is no layer.
    """
    owner: dict[str, tuple[int, int]] = {}
    for stage, (start, end) in enumerate(itertools.pairwise(bounds)):
        for index in range(start, end):
            layer = layers[index]
            if not callable(layer) and not isinstance(layer, BuildsLayer):
                raise PartitionError(
                    f"layers[{index}] is a {type(layer).__name__}; a layer is an nn.Module, a "
                    "LayerSpec or a function."
                )
            if not isinstance(layer, TiesLayer):
                continue
            first, at = owner.setdefault(layer.key, (stage, index))
            if first != stage:
                raise PartitionError(
                    f"TiedLayerSpec('{layer.key}') ties layers {at} and {index}, which are in "
                    f"stages {first} and {stage}: no gradient crosses stages, so they cannot share "
                    "a weight. Cut so that both are in one stage, or use two LayerSpecs (untied)."
                )


def count_parameters(layers: Sequence[Layer]) -> list[int]:
    """Trainable parameters of each layer; a ``LayerSpec`` is built on the meta device to count."""
    counts = []
    for layer in layers:
        built: Any = layer
        if isinstance(layer, BuildsLayer):
            with torch.device("meta"):
                built = layer.build()
        module = built if isinstance(built, nn.Module) else nn.Identity()
        counts.append(sum(p.numel() for p in module.parameters() if p.requires_grad))
    return counts


def plan_layers(
    layers: Sequence[Layer], num_stages: int, method: str | Sequence[Sequence[int]]
) -> PartitionPlan:
    """Cut a list of layers: ``uniform``, ``parameters``, ``type:<regex>`` or explicit ranges.

    ``type:`` balances the layers whose class name matches, as DeepSpeed does. ``flops`` needs a
    Hugging Face model and means ``parameters`` here. All but ranges give every stage a layer with
    something to train: a ReLU stays with its Linear.

    Raises:
        PartitionError: More stages than layers (with something to train), no layer matches, or the
            ranges do not fit.
    """
    if not 1 <= num_stages <= len(layers):
        raise PartitionError(
            f"{len(layers)} layers cannot be cut into {num_stages} stages; use 1 to {len(layers)}."
        )
    if not isinstance(method, str):
        return PartitionPlan(explicit_bounds(len(layers), num_stages, method), "explicit")
    parameters = count_parameters(layers)
    learning = sum(map(bool, parameters))
    if num_stages > learning:
        raise PartitionError(
            f"{learning} of {len(layers)} layers have something to train, so they cannot be cut "
            f"into {num_stages} stages that learn on their own. Use at most {learning} stages."
            if learning
            else f"none of the {len(layers)} layers has anything to train (no parameters, or all "
            "frozen)."
        )
    if method == "uniform":
        costs = [1] * len(layers)
    elif method.startswith("type:"):
        pattern = re.compile(method.removeprefix("type:"), re.IGNORECASE)
        names = [_type_name(layer) for layer in layers]
        costs = [int(bool(pattern.search(name))) for name in names]
        if not any(costs):
            raise PartitionError(
                f"partition '{method}': no layer's class matches; the classes are "
                f"{', '.join(sorted(set(names)))}."
            )
    else:
        costs = parameters
    sums = [0, *itertools.accumulate(costs)]
    trained = [0, *itertools.accumulate(parameters)]

    def cost(_: int, start: int, end: int) -> float:
        learns = trained[end] > trained[start]
        return sums[end] - sums[start] if learns else math.inf

    return PartitionPlan(min_max_cut(len(layers), num_stages, cost), method)


def _type_name(layer: Layer) -> str:
    typename = getattr(layer, "typename", None) or type(layer)
    return getattr(typename, "__name__", str(typename))


def boundary_width(
    layers: Sequence[Layer], end: int, example: Mapping[str, Tensor] | Tensor | None
) -> int | None:
    """Last dimension of what layer ``end - 1`` returns, found without computing anything.

    None when there is no example input to trace with. Modules of the list are copied (shapes only)
    and run as in evaluation, so that no BatchNorm counts the trace as a batch.
    """
    if example is None:
        return None
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        source = example["inputs"] if isinstance(example, Mapping) else example
        value: Any = mode.from_tensor(source)
        tied: dict[str, Any] = {}
        for layer in layers[:end]:
            if isinstance(layer, nn.Module):
                layer = copy.deepcopy(layer, {id(t): _fake(t) for t in _tensors(layer)})
            built, call = _build(layer, tied)
            if isinstance(built, nn.Module):
                built.eval()
            value = call(value)
    return int(value.shape[-1])


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _fake(tensor: Tensor) -> Tensor:
    """The same shape without the memory, inside a ``FakeTensorMode``."""
    fake = torch.empty_like(tensor)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
