"""One stage of a Hugging Face model: the model itself, with stand-ins for other stages' modules.

Nothing is renumbered and HF's own forward runs. A stand-in has no parameters and sits at the same
place under the same name; the one just before this stage's first layer returns the hidden states
that were received, so whatever HF computes around the layers (masks, rotary tables, scaling) is
computed by HF, and what it computed from a stand-in before that point is overwritten.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import one_line, use_cache_off, without_reentrant_checkpoints
from scpl_ds.partition._trace import Anatomy
from scpl_ds.partition.lora import kept_names
from scpl_ds.partition.lora_base import base_dtype_of

log = logging.getLogger(__name__)


class StageOutput(NamedTuple):
    """What a stage gives: B samples, T positions, D hidden size."""

    hidden_states: Tensor
    """Output of the stage's last layer, [B, T, D], attached to autograd."""
    loss: Tensor | None
    """HF's own loss; last stage only, and only with ``labels`` among the inputs."""
    logits: Tensor | None
    """Last stage only."""


class Relay:
    """Where the stand-ins of one stage find the hidden states that were received."""

    received: Tensor | None = None

    def take(self) -> Tensor:
        assert self.received is not None, "a stand-in ran outside StageModule.forward"
        return self.received


class StandIn(nn.Module):
    """Takes the place of a module that another stage owns. No parameters, no buffers."""

    def __init__(self, old: nn.Module, function: Callable[..., Any], arity: int = 0) -> None:
        super().__init__()
        # Models choose masks by plain attributes of a layer (attention_type, layer_idx).
        for name, value in vars(old).items():
            if not (name.startswith("_") or name in self.__dict__ or isinstance(value, Tensor)):
                self.__dict__[name] = value
        self._function = function
        self._arity = arity
        self._children_then = frozenset(old._modules)
        self._is_hf_initialized = True  # nothing here for from_pretrained to initialise

    def __getattr__(self, name: str) -> Any:
        # get_input_embeddings() and the like walk down by name: bert.embeddings.word_embeddings
        if name in self.__dict__.get("_children_then", ()) and name not in self._modules:
            return self
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self._function(*args, **kwargs)
        return (output,) + (None,) * (self._arity - 1) if self._arity else output

    def extra_repr(self) -> str:
        return "owned by another stage"


class _Received:
    """In place of the layer before this stage: returns what the stage before computed."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.relay.take()


class _Blank:
    """In place of a prologue module: zeros in the shape that it would have returned.

    Only shape, dtype and device are used, for masks and rotary tables. Zeros, not the received
    hidden
    states: some models scale their embeddings in place (CTRL).
    """

    def __init__(self, relay: Relay, kind: str) -> None:
        self.relay, self.kind = relay, kind

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.relay.take()
        shape = {"row": hidden[:1].shape, "flat": hidden.shape[1:]}.get(self.kind, hidden.shape)
        return hidden.new_zeros(shape)


def _first_argument(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def prune(model: PreTrainedModel, anatomy: Anatomy, start: int, end: int, relay: Relay) -> None:
    """Turn ``model`` (on any device, also meta) in place into the stage of layers ``[start, end)``.

    The partner of a tie that crosses stages is kept as a bare parameter inside its stand-in,
    because the checkpoint may hold the matrix only under that name; :func:`drop_partners` removes
    it.
    """
    check_span(anatomy, start, end)
    layers = model.get_submodule(anatomy.layers)
    assert isinstance(layers, nn.ModuleList)
    crossing = anatomy.crossing_ties(start, end)
    partners = _partners(anatomy, start, end)
    kept = {name: model.get_parameter(name) for name in partners}
    for index in range(anatomy.num_layers):
        if start <= index < end:
            continue
        function = _Received(relay) if index == start - 1 else _first_argument
        layers[index] = StandIn(layers[index], function, anatomy.layer_arity)
    if start > 0:
        for unit, kind in anatomy.prologue.items():
            _replace(model, unit, _Blank(relay, kind))
    if end < anatomy.num_layers:
        for unit in anatomy.epilogue:
            _replace(model, unit, _first_argument)
    for name, parameter in kept.items():
        _graft(model, name, parameter)
    model.all_tied_weights_keys = {
        target: source
        for target, source in anatomy.tied.items()
        if (target in partners or anatomy.owns(target, start, end))
        and (source in partners or anatomy.owns(source, start, end))
    }
    if any(
        {anatomy.section(t), anatomy.section(s)} == {"prologue", "epilogue"}
        for t, s in crossing.items()
    ):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    model.config.return_dict = True
    for module in model.modules():  # a parent's _init_weights may reach into what is gone
        if any(isinstance(child, StandIn) for child in module.children()):
            module._is_hf_initialized = True  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]


def drop_partners(model: PreTrainedModel, anatomy: Anatomy, start: int, end: int) -> None:
    """Remove what :func:`prune` kept for loading: a crossing tie then is two copies."""
    partners = _partners(anatomy, start, end)
    for name in partners:
        module, _, parameter = name.rpartition(".")
        del model.get_submodule(module)._parameters[parameter]
    model.all_tied_weights_keys = {
        t: s
        for t, s in model.all_tied_weights_keys.items()
        if t not in partners and s not in partners
    }


def warn_untied(anatomy: Anatomy, start: int, end: int) -> None:
    """One loud line on the stage that holds the tied end of a tie that crosses stages."""
    ties = anatomy.crossing_ties(start, end).items()
    broken = [
        f"{target} from {source}" for target, source in ties if anatomy.owns(target, start, end)
    ]
    if broken:
        log.warning(
            "UNTIED in '%s': %s. The stages train their own copies, equal at the start; the export "
            "holds both and has tie_word_embeddings=False. One stage keeps the tie.",
            anatomy.model_type,
            ", ".join(broken),
        )


def _partners(anatomy: Anatomy, start: int, end: int) -> set[str]:
    return {
        name
        for target, source in anatomy.crossing_ties(start, end).items()
        for name, other in ((target, source), (source, target))
        if anatomy.owns(other, start, end) and not anatomy.owns(name, start, end)
    }


def check_span(anatomy: Anatomy, start: int, end: int) -> None:
    """Raises PartitionError unless ``[start, end)`` is a non-empty range of the model's layers."""
    if not 0 <= start < end <= anatomy.num_layers:
        raise PartitionError(
            f"a stage of layers [{start}, {end}) was asked of '{anatomy.model_type}', which has "
            f"layers 0 to {anatomy.num_layers - 1}. Use 0 <= start < end <= {anatomy.num_layers}."
        )


def _replace(model: nn.Module, unit: str, function: Callable[..., Any]) -> None:
    model.set_submodule(unit, StandIn(model.get_submodule(unit), function))


def _graft(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a bare parameter back under its old name, inside the stand-in of its module."""
    parts = name.split(".")
    module = model
    for part in parts[:-1]:
        if part not in module._modules:
            module._modules[part] = nn.Module()
        module = module._modules[part]  # type: ignore[assignment]
        assert module is not None
    module.register_parameter(parts[-1], parameter)


class StageModule(nn.Module):
    """Layers ``[start, end)`` of a Hugging Face model; the first and last stage have its ends too.

    Every tensor inside ``.model`` has Hugging Face's own name. Made by
    :func:`~scpl_ds.partition.loading.load_stage` or
    :func:`~scpl_ds.partition.loading.stage_from_model`.
    """

    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, start: int, end: int, relay: Relay
    ) -> None:
        super().__init__()
        self.model = model
        self.start, self.end, self.num_layers = start, end, anatomy.num_layers
        self.is_first, self.is_last = start == 0, end == anatomy.num_layers
        self.hidden_size = anatomy.hidden_size
        self.kept = kept_names(model)
        """Names of what a checkpoint holds; None: of everything."""
        self.base_dtype = base_dtype_of(model)
        """How frozen weights beside adapters are held; None: as the backend holds all."""
        self.untied = tuple(
            f"{target} from {source}"
            for target, source in anatomy.crossing_ties(start, end).items()
            if self.kept is None or self.kept & {target, source}
        )
        """Weights that are one in the whole model, with an end on this stage and one on another;
        beside adapters most are frozen, and stay one."""
        self._relay = relay
        self._layers, self._last_layer = anatomy.layers, f"{anatomy.layers}.{end - 1}"
        self._use_cache_off = use_cache_off(model)
        base = inspect.signature(model.base_model.forward).parameters
        task_only = set(inspect.signature(model.forward).parameters) - set(base)
        self._task_only = frozenset(task_only | {"labels"})

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers this stage owns, in order: what is sharded, compiled or checkpointed one by
        one. Embeddings and the head are not among them."""
        layers = self.model.get_submodule(self._layers)
        return [layers.get_submodule(str(index)) for index in range(self.start, self.end)]

    def forward(
        self,
        inputs: dict[str, Tensor],
        hidden_states: Tensor | None,
        *,
        detach_features: bool = False,
    ) -> StageOutput:
        """Run HF's own forward through this stage.

        Shapes: B samples, T positions, D hidden size.

        Args:
            inputs: What a tokenizer and collator give: ``input_ids`` [B, T], ``attention_mask``
                [B, T], ``labels`` ... The same for every stage; ``labels`` are used by the last
                one.
            hidden_states: [B, T, D] from the stage before; None on the first stage.
            detach_features: Last stage: the epilogue sees the last layer's output cut from
                autograd, so the task loss trains the epilogue only.

        Returns:
            The output of layer ``end - 1``, never detached and before the epilogue; on the last
            stage also HF's logits and, when ``labels`` are given, HF's loss.

        Raises:
            ValueError: ``hidden_states`` given to the first stage, or not given to another one.
        """
        if (hidden_states is None) != self.is_first:
            raise ValueError(
                f"the stage of layers [{self.start}, {self.end}) "
                + ("takes no hidden_states" if self.is_first else "needs hidden_states")
                + f", got {'none' if hidden_states is None else list(hidden_states.shape)}."
            )
        captured: list[tuple[Tensor, int]] = []

        def capture(module: nn.Module, args: Any, output: Any) -> Any:
            several = isinstance(output, (tuple, list))
            hidden = output[0] if several else output
            captured.append((hidden, _version(hidden)))
            if not detach_features:
                return None
            return (hidden.detach(), *output[1:]) if several else hidden.detach()

        # Registered for this call only, so that it runs after the hooks a sharding backend has put
        # on the layer: those must see the output that autograd knows.
        handle = self.model.get_submodule(self._last_layer).register_forward_hook(capture)
        self._relay.received = hidden_states
        try:
            if self.is_last:
                output = self.model(**inputs, **self._use_cache_off)
                loss, logits = getattr(output, "loss", None), output.logits
                return StageOutput(self._unchanged(*captured[0]), loss, logits)
            base_inputs = {k: v for k, v in inputs.items() if k not in self._task_only}
            self.model.base_model(**base_inputs, **self._use_cache_off)
            return StageOutput(self._unchanged(*captured[0]), None, None)
        finally:
            self._relay.received = None
            handle.remove()

    def _unchanged(self, hidden: Tensor, version: int) -> Tensor:
        if _version(hidden) != version:
            raise PartitionError(
                f"the model changes the output of layer {self.end - 1} in place after the layer, "
                "so it cannot be sent on. Cut elsewhere, or choose another model."
            )
        return hidden

    def hf_state_dict(self) -> dict[str, Tensor]:
        """This stage's parameters and persistent buffers under Hugging Face's names.

        A tie inside the stage appears under both its names, as in HF's own ``state_dict``. Tensors
        are detached and share memory with the stage.
        """
        return dict(self.model.state_dict())


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; inference tensors do not."""
    return 0 if tensor.is_inference() else tensor._version


def stage_from_model(model: PreTrainedModel, anatomy: Anatomy, start: int, end: int) -> StageModule:
    """A stage that shares its tensors with ``model``: training the one trains the other.

    Nothing is copied, and ``model`` stays whole and can be cut again for the other stages. Only a
    tie that crosses stages is broken: the stage with the tied end (the output matrix) gets a copy
    of its own, which ``model`` does not see, and one warning says so.

    Raises:
        PartitionError: ``[start, end)`` is not a range of the model's layers.
    """
    stage = _share(model, anatomy, start, end)
    if stage.untied:
        warn_untied(anatomy, start, end)
    return stage


def _share(model: PreTrainedModel, anatomy: Anatomy, start: int, end: int) -> StageModule:
    check_span(anatomy, start, end)
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # state that a forward left behind may hang on autograd
        memo |= {id(v): v.detach() for v in vars(module).values() if isinstance(v, Tensor)}
    twin = copy.deepcopy(model, memo)
    relay = Relay()
    prune(twin, anatomy, start, end, relay)
    crossing = anatomy.crossing_ties(start, end)
    drop_partners(twin, anatomy, start, end)
    without_reentrant_checkpoints(twin)
    twin.disable_input_require_grads()  # made for reentrant checkpoints; here work for nothing
    for target in crossing:
        if anatomy.owns(target, start, end):
            module, _, name = target.rpartition(".")
            old = twin.get_parameter(target)
            new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            setattr(twin.get_submodule(module), name, new)
    return StageModule(twin, anatomy, start, end, relay)


def dry_run(model: PreTrainedModel, anatomy: Anatomy, inputs: dict[str, Tensor]) -> None:
    """Run ``model`` as two stages; meant for a model of fake tensors, where it costs no arithmetic.

    Raises:
        PartitionError: A stage fails, for example because the model reads another stage's weights.
    """
    middle = max(1, anatomy.num_layers // 2)
    spans = [(0, middle), (middle, anatomy.num_layers)] if anatomy.num_layers > 1 else [(0, 1)]
    hidden: Tensor | None = None
    for start, end in spans:
        try:
            with torch.no_grad():
                hidden = _share(model, anatomy, start, end)(inputs, hidden).hidden_states
        except Exception as error:
            raise PartitionError(
                f"'{anatomy.model_type}' fails as a stage of layers [{start}, {end}): "
                f"{one_line(error)}. It uses modules of another stage in a way that cannot be "
                "replaced. Choose another model."
            ) from error
