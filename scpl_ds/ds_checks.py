"""What can be wrong with a ``deepspeed`` section, each with a path and a way out.

Two kinds: keys and values DeepSpeed itself would not take (or would ignore), and values that
contradict the ``train`` section. What this package cannot do yet is in ``ds_limits``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scpl_ds import ds_keys
from scpl_ds.ds_keys import FILLS, Keys
from scpl_ds.problems import Problem, dotted, show, unknown_key
from scpl_ds.registry import did_you_mean

if TYPE_CHECKING:
    from scpl_ds.ds_config import DeepSpeedSection

_AT_LEAST = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0,
    "optimizer.params.lr": 0,
    "optimizer.params.weight_decay": 0,
    "optimizer.params.eps": 0,
    "scheduler.params.warmup_num_steps": 0,
    "scheduler.params.total_num_steps": 1,
}

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "bool": ("true or false", (bool,)),
    "str": ("a text", (str,)),
    "list": ("a list", (list, tuple)),
    "dict": ("a mapping", (Mapping,)),
}


def check_keys(config: Mapping[str, Any]) -> list[Problem]:
    """Unknown keys and values of the wrong kind, with paths under ``deepspeed``."""
    problems = _check_section(config, ds_keys.TOP, "")
    problems += _check_typed(
        config, "optimizer", ds_keys.OPTIMIZER_PARAMS, ds_keys.OTHER_OPTIMIZERS
    )
    problems += _check_typed(
        config, "scheduler", ds_keys.SCHEDULER_PARAMS, ds_keys.OTHER_SCHEDULERS
    )
    return [p.under("deepspeed") for p in problems]


def check_values(section: DeepSpeedSection) -> list[Problem]:
    """Numbers out of range, and ``train`` and ``deepspeed`` saying different things."""
    config = section.filled
    problems: list[Problem] = []
    if config.get("train_micro_batch_size_per_gpu") is None:
        problems.append(
            Problem(
                "train_micro_batch_size_per_gpu",
                "is required (or train.per_device_train_batch_size): its rows are what an "
                "objective compares, so it is not derived from train_batch_size",
            )
        )
    for path, least in _AT_LEAST.items():
        value = lookup(config, path)
        if isinstance(value, int | float) and not value >= least:
            problems.append(Problem(path, f"must be at least {least}, got {value}"))
    betas = lookup(config, "optimizer.params.betas")
    if betas is not None and not (len(betas) == 2 and all(_is_beta(b) for b in betas)):
        problems.append(
            Problem("optimizer.params.betas", f"must be two numbers in [0, 1), got {show(betas)}")
        )
    stage = lookup(config, "zero_optimization.stage")
    if stage is not None and stage not in (0, 1, 2, 3):
        problems.append(Problem("zero_optimization.stage", f"must be 0, 1, 2 or 3, got {stage}"))
    spec = section.scheduler
    if spec and spec.type == "WarmupDecayLR" and spec.params.get("warmup_max_lr") is None:
        problems.append(
            Problem(
                "scheduler.params.warmup_max_lr",
                "is required by WarmupDecayLR: DeepSpeed's default is 0.001 whatever the "
                "optimizer's lr is; write 'auto' for the optimizer's lr",
            )
        )
    warmup = lookup(config, "scheduler.params.warmup_type")
    if warmup not in (None, "auto", "log", "linear"):
        problems.append(
            Problem("scheduler.params.warmup_type", f"must be 'log' or 'linear', got {warmup!r}")
        )
    return [p.under("deepspeed") for p in problems] + _conflicts(section)


def _check_section(config: Mapping[str, Any], known: Keys, prefix: str) -> list[Problem]:
    problems: list[Problem] = []
    for key, value in config.items():
        path = dotted(prefix, key)
        if path in ds_keys.REMOVED_PATHS and is_off(value):
            continue
        if key not in known:
            problems.append(Problem(path, _unknown(key, known, prefix)))
            continue
        kind = known[key]
        if value is None:
            continue
        if isinstance(kind, dict):
            if isinstance(value, Mapping):
                problems += _check_section(value, kind, path)
            else:
                problems.append(Problem(path, f"must be a mapping, got {show(value)}"))
        elif wrong := _wrong_kind(path, kind, value):
            problems.append(Problem(path, wrong))
    return problems


def is_off(value: Any) -> bool:
    """Whether the value of a removed key asks for nothing: files carry such blocks for years."""
    if isinstance(value, Mapping):
        return not value or value.get("enabled") is False
    return value in (None, False, -1)


def _unknown(key: str, known: Keys, prefix: str) -> str:
    if dotted(prefix, key) in ds_keys.REMOVED_PATHS:
        return "was removed from DeepSpeed; delete it"
    alias = ds_keys.ALIASES.get(key)
    if alias in known:
        return f"unknown key; did you mean '{alias}'?"
    if (near := did_you_mean(key, known)) != "":
        return f"unknown key{near}"
    home = next((dotted(s, key) for s, inner in ds_keys.TOP.items() if key in _names(inner)), None)
    if home is None and key in ds_keys.TOP:
        home = key
    return unknown_key(key, known, None if home is None else dotted("deepspeed", home))


def _names(kind: str | Keys) -> Sequence[str]:
    return () if isinstance(kind, str) else [k for k in kind if k not in ("enabled", "type")]


def _check_typed(
    config: Mapping[str, Any], name: str, types: Mapping[str, Keys], others: Sequence[str]
) -> list[Problem]:
    """``{type, params}`` blocks: the type decides which parameters exist."""
    block = config.get(name)
    if not isinstance(block, Mapping):
        return []
    wanted = block.get("type")
    if wanted is None:
        return [] if name == "optimizer" else [Problem(f"{name}.type", "is required")]
    by_lower = {t.lower(): t for t in types}
    match = by_lower.get(str(wanted).lower()) if name == "optimizer" else str(wanted)
    if match is None or match not in types:
        usable = ", ".join(_spelled(t) for t in types)
        if any(str(wanted).lower() == other.lower() for other in others):
            return [Problem(f"{name}.type", f"'{wanted}' is not supported; use one of {usable}")]
        if name == "optimizer" and str(wanted).lower() in ds_keys.REMOVED_OPTIMIZERS:
            message = (
                f"'{wanted}', an optimizer of older DeepSpeed releases, is not supported; use one "
                f"of {usable}"
            )
            return [Problem(f"{name}.type", message)]
        near = did_you_mean(str(wanted), [_spelled(t) for t in types])
        return [Problem(f"{name}.type", f"unknown {name} '{wanted}'{near or '.'} Known: {usable}")]
    params = block.get("params")
    if not isinstance(params, Mapping):
        return []
    clip: list[Problem] = []
    if "max_grad_norm" in params:
        same = params["max_grad_norm"] == config.get("gradient_clipping")
        params = {k: v for k, v in params.items() if k != "max_grad_norm"}
        message = "unknown key; set deepspeed.gradient_clipping"
        clip = [] if same else [Problem(f"{name}.params.max_grad_norm", message)]
    return clip + _check_section(params, types[match], f"{name}.params")


def _spelled(kind: str) -> str:
    return {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adagrad": "Adagrad"}.get(kind, kind)


def _wrong_kind(path: str, kind: str, value: Any) -> str | None:
    if kind == "any" or (value == "auto" and _may_be_auto(path)):
        return None
    words, types = _KINDS[kind]
    good = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
    if kind == "int" and isinstance(value, float) and value.is_integer():
        good = True
    if good and isinstance(value, float) and not math.isfinite(value):
        good = False
    return None if good else f"must be {words}, got {show(value)}"


def _may_be_auto(path: str) -> bool:
    return path in FILLS or path in ds_keys.AUTO_DROPPED or path.startswith("scheduler.params.")


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _conflicts(section: DeepSpeedSection) -> list[Problem]:
    problems: list[Problem] = []
    optimizer = section.optimizer.type
    known = ds_keys.OPTIMIZER_PARAMS.get(optimizer, {})
    for path, fill in FILLS.items():
        hinted = hint(path, section.train)
        if hinted is None:
            continue
        given = [k for k in fill.train_keys if section.train.get(k) is not None]
        train_path = f"train.{given[0]}"
        if path.startswith("optimizer.params.") and path.rpartition(".")[2] not in known:
            problems.append(
                Problem(train_path, f"has no effect with the optimizer {_spelled(optimizer)}")
            )
            continue
        written = lookup(section.raw, path)
        if written in (None, "auto"):
            continue
        for index, key in enumerate(fill.train_keys):
            value = section.train.get(key)
            several = len(fill.train_keys) > 1
            if several and len(written) != len(fill.train_keys):
                continue  # reported by check_values
            other = written[index] if several else written
            if value is not None and value != other:
                problems.append(
                    Problem(
                        f"train.{key}",
                        f"is {value}, but deepspeed.{path} is {written}; write it once "
                        "(or 'auto' in the deepspeed section)",
                    )
                )
    return problems


def hint(path: str, train: Mapping[str, Any]) -> Any:
    """What ``train`` says about the DeepSpeed key ``path``; None where it is silent."""
    fill = FILLS[path]
    values = [train.get(key) for key in fill.train_keys]
    if all(value is None for value in values):
        return None
    if len(values) == 1:
        return values[0]
    return [d if v is None else v for v, d in zip(values, fill.default, strict=True)]


def lookup(config: Mapping[str, Any], path: str) -> Any:
    """Value at a dotted path, None where there is nothing."""
    current: Any = config
    for part in path.split("."):
        if not isinstance(current, Mapping):
            return None
        current = current.get(part)
    return current


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path, making sections on the way."""
    *parents, last = path.split(".")
    for part in parents:
        if not isinstance(config.get(part), dict):
            config[part] = {}
        config = config[part]
    config[last] = value


def drop(config: dict[str, Any], path: str) -> None:
    """Remove the key at a dotted path if it is there."""
    parent, _, last = path.rpartition(".")
    section = lookup(config, parent) if parent else config
    if isinstance(section, dict):
        section.pop(last, None)
