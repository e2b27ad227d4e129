"""LoRA: adapters of ``peft`` inside the stages of a model, together one adapter of the whole.

A stage's tensors have the names that ``peft`` gives them in the whole model, and each adapter is
drawn from the seed and its own name, so that neither depends on the cut. Everything else stays what
it is in the base checkpoint, except the head of a classifier, or another that this has not
(``modules_to_save`` in peft's words).
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scpl_ds import registry
from scpl_ds.errors import CheckpointError, RecipeError
from scpl_ds.partition._hf import auto_class, base_prefix, one_line, quiet_transformers, skeleton
from scpl_ds.partition._trace import Anatomy
from scpl_ds.partition.lora_base import hold, pack
from scpl_ds.recipe_sections import LoraSection

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter."""
_NAME = "default"
_TASK_TYPES = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Which modules of a whole model get an adapter, and of what kind."""

    config: Any
    """peft's ``LoraConfig`` of the whole model."""
    targets: frozenset[str]
    """Hugging Face names of the modules, all inside of layers."""
    seed: int
    base_dtype: str | None = None
    """``model.lora.base_dtype``."""

    def in_layers(self, anatomy: Anatomy, start: int, end: int) -> tuple[tuple[str, ...], ...]:
        """Which there are in each of the layers ``[start, end)``, by their names inside of it."""
        found: dict[int | str, list[str]] = {}
        for name in sorted(self.targets):
            layer = anatomy.section(name)
            found.setdefault(layer, []).append(name.removeprefix(f"{anatomy.layers}.{layer}."))
        return tuple(tuple(found.get(layer, ())) for layer in range(start, end))


def plan_adapters(
    config: PretrainedConfig, task: str, anatomy: Anatomy, lora: LoraSection, *, seed: int
) -> Adapters:
    """Find the modules that ``model.lora`` means; reads no weights.

    Raises:
        RecipeError: peft is not installed, a name fits no linear module of the layers, or peft
            knows no default for this architecture.
    """
    peft = _peft()
    modules = {name: m for name, m in skeleton(config, task).named_modules() if name}
    linear = {
        name
        for name, module in modules.items()
        if name.startswith(f"{anatomy.layers}.") and isinstance(module, nn.Linear | Conv1D)
    }
    named, targets = _targets(lora.target_modules, config.model_type, modules, linear)
    made = peft.LoraConfig(
        task_type=_TASK_TYPES[task],
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        target_modules=sorted(named),
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in targets),
    )
    return Adapters(made, frozenset(targets), seed, lora.base_dtype)


def adapt(
    model: PreTrainedModel, anatomy: Anatomy, adapters: Adapters, drawn: Collection[str] = ()
) -> None:
    """Put this stage's adapters into its model, in place, and freeze what they stand beside.

    Args:
        model: Pruned to a stage, or whole.
        anatomy: Of the model before.
        adapters: Of the whole model.
        drawn: Tensors that the base checkpoint lacks: their parts of the head are trained.
    """
    peft = _peft()
    head = [
        unit
        for unit in anatomy.epilogue
        if any(name.startswith(f"{unit}.") for name in drawn)
        or (adapters.config.task_type == "SEQ_CLS" and _outside_base(unit, model))
    ]
    mine = copy.deepcopy(adapters.config)
    own = sorted(name for name, _ in model.named_modules() if name in adapters.targets)
    mine.target_modules = set(own)
    model.requires_grad_(False)
    if adapters.base_dtype == "nf4":
        layers = model.get_submodule(anatomy.layers).children()
        pack(model, [layer for layer in layers if next(layer.parameters(), None) is not None])
    if own:
        peft.inject_adapter_in_model(mine, model, _NAME)
        model.train(model.training)  # peft's dropout too
    model.peft_config = {_NAME: mine}  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    for name, parameter in model.named_parameters():
        biased = adapters.config.bias == "all" and "bias" in name
        if biased or any(name.startswith(f"{unit}.") for unit in head):
            parameter.requires_grad_(True)
    if adapters.base_dtype is not None:
        hold(model, adapters.base_dtype)
    with torch.random.fork_rng(devices=[]):
        for name in own:
            layer: Any = model.get_submodule(name)
            torch.default_generator.manual_seed(_seed_of(adapters.seed, name))
            layer.reset_lora_parameters(_NAME, True)


def kept_names(model: nn.Module) -> frozenset[str] | None:
    """What a checkpoint holds of a model with adapters: what is trained. None of any other model,
    of which it holds everything."""
    if getattr(model, "peft_config", None) is None:
        return None
    return frozenset(name for name, p in model.named_parameters() if p.requires_grad)


def without_wrapper(model: Any) -> Any:
    """The Hugging Face model with adapters that is inside a ``PeftModel``; others as they are.

    Raises:
        RecipeError: It is not LoRA as such, has several adapters, or was loaded not to be trained.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        return model
    facts = {name: str(getattr(c.peft_type, "value", c.peft_type)) for name, c in configs.items()}
    if facts != {_NAME: "LORA"} or configs[_NAME].use_dora:
        raise RecipeError(
            f"the model has the PEFT adapters {facts}; stages train one LoRA adapter with the name "
            f"'{_NAME}', without DoRA. Use get_peft_model(model, LoraConfig(...))."
        )
    if not any(p.requires_grad for name, p in model.named_parameters() if is_adapter(name)):
        raise RecipeError(
            "the model has a LoRA adapter of which nothing is trained: no lora_ parameter requires "
            "a gradient. PeftModel.from_pretrained(...) loads it so unless it is given "
            "is_trainable=True."
        )
    return model if isinstance(model, PreTrainedModel) else model.get_base_model()


# -- files ---------------------------------------------------------------------------------


def save_config(
    adapters: Adapters,
    folder: Path,
    anatomy: Anatomy,
    trained: Iterable[str],
    *,
    base: str,
    revision: str | None,
) -> None:
    """Write peft's ``adapter_config.json``.

    Args:
        adapters: Of the whole model.
        folder: That it is written to.
        anatomy: Of the model.
        trained: Names of what all stages train.
        base: Of the model that the adapter belongs to, as ``from_pretrained`` takes it.
        revision: Likewise.
    """
    made = copy.deepcopy(adapters.config)
    trained = list(trained)
    head = [u for u in anatomy.epilogue if any(_of_head(name, u) for name in trained)]
    made.modules_to_save = head or None
    made.base_model_name_or_path, made.revision = base, revision
    made.inference_mode = True
    made.save_pretrained(str(folder))


def is_adapter(name: str) -> bool:
    """Whether a tensor is of an adapter, by its name in a checkpoint."""
    return ".lora_" in name


def export_adapter(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint under the names that ``adapter_model.safetensors`` has."""
    exported = {}
    for name, tensor in tensors.items():
        plain = name.replace(f".modules_to_save.{_NAME}.", ".").replace(f".{_NAME}.", ".")
        plain = plain.removesuffix(f".{_NAME}")  # of an embedding's: they are no modules
        exported[f"base_model.model.{plain}"] = tensor.contiguous()
    return exported


def load_adapted(folder: Path, task: str, config: PretrainedConfig, *, merge: bool = False) -> Any:
    """The base model of an adapter with the adapter in it, or added to its weights.

    In fp32, in which adapter and head were trained, whatever the base checkpoint has.

    Raises:
        CheckpointError: The base model is not where it was.
    """
    peft = _peft()
    about = peft.PeftConfig.from_pretrained(str(folder))
    try:
        with quiet_transformers():  # the adapter has the head that it would miss
            base = auto_class(task).from_pretrained(
                about.base_model_name_or_path,
                config=config,
                revision=about.revision or "main",
                dtype=torch.float32,
            )
    except OSError as error:
        raise CheckpointError(
            f"{folder} is an adapter of '{about.base_model_name_or_path}', which cannot be loaded: "
            f"{one_line(error)}. Put the base model back, or change base_model_name_or_path in "
            f"{ADAPTER_CONFIG}."
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers the old way
        adapted = peft.PeftModel.from_pretrained(base, str(folder))
    return adapted.merge_and_unload() if merge else adapted.get_base_model()


# -- details -------------------------------------------------------------------------------


def _peft() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft
    except ImportError as error:
        raise RecipeError(
            f"model.lora: adapters come from peft, which cannot be imported ({error}). "
            "pip install 'scpl-ds[lora]', or pip install peft."
        ) from error
    return peft


def _is(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _outside_base(unit: str, model: PreTrainedModel) -> bool:
    prefix = base_prefix(model)
    return bool(prefix) and not unit.startswith(prefix)


def _of_head(name: str, unit: str) -> bool:
    return name.startswith(f"{unit}.") and not name.endswith(".bias")


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _targets(
    wanted: str | Collection[str] | None,
    model_type: str,
    modules: Mapping[str, nn.Module],
    linear: set[str],
) -> tuple[set[str], set[str]]:
    """What ``LoraConfig.target_modules`` says, and the modules that it means."""
    whose = ""
    if wanted is None:
        wanted, whose = _default(model_type, linear), f"peft's default for '{model_type}', "
    if isinstance(wanted, str):
        found = linear
        if wanted != "all-linear":  # as peft reads a string: an expression for the whole name
            found = {name for name in linear if re.fullmatch(wanted, name)}
        if not found:
            raise RecipeError(
                f"model.lora.target_modules: {whose}'{wanted}', fits no linear module of "
                f"'{model_type}'. Its linear modules are {_last_parts(linear)}; name some of them, "
                "or all-linear."
            )
        return found, found
    fitting = {name: {m for m in modules if _is(m, name)} for name in wanted}
    for name, some in fitting.items():
        if not some & linear:
            raise RecipeError(_no_target(whose, name, modules, some, linear, model_type))
    every = set().union(*fitting.values())
    targets = every & linear
    return (set(wanted) if every == targets else targets), targets


def _default(model_type: str, linear: Collection[str]) -> str | list[str]:
    """peft's for an architecture: ends of names, or an expression."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if model_type not in KNOWN:
        raise RecipeError(
            f"model.lora.target_modules: peft knows no default for '{model_type}'. Its linear "
            f"modules are {_last_parts(linear)}; name some of them, or all-linear."
        )
    found: Any = KNOWN[model_type]
    return found if isinstance(found, str) else list(found)


def _no_target(
    whose: str,
    name: str,
    modules: Mapping[str, nn.Module],
    fitting: Collection[str],
    linear: Collection[str],
    model_type: str,
) -> str:
    start = f"model.lora.target_modules: {whose}'{name}'{',' if whose else ''} "
    if fitting:
        first = min(fitting)
        why = (
            f"is '{first}' ({type(modules[first]).__name__}): adapters go into linear modules of "
            "the layers, and the head of a classifier is trained whole. "
        )
    else:
        parts = {part.rpartition(".")[2] for part in linear}
        why = f"is no module of '{model_type}'{registry.did_you_mean(name, parts) or '.'} "
    return f"{start}{why}Its linear modules are {_last_parts(linear)}."


def _last_parts(names: Collection[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
