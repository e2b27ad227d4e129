"""Names in a recipe -> classes, imported on first use, so that importing ``scpl_ds`` stays cheap.

A new objective, data source, sharding backend, tracker or schedule is one file and one line here,
or no line at all: a recipe may name a class of the user's own as ``"package.module:Class"``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any

from scpl_ds.errors import RecipeError

_TABLES: dict[str, dict[str, str]] = {
    "objective": {
        "supcon": "scpl_ds.objectives.supcon:SupCon",
        "dascpl": "scpl_ds.objectives.dascpl:Dascpl",
        "early_exit": "scpl_ds.objectives.early_exit:EarlyExit",
        "associated": "scpl_ds.objectives.associated:Associated",
        "deinforeg": "scpl_ds.objectives.deinforeg:DeInfoReg",
        "predsim": "scpl_ds.objectives.predsim:PredSim",
        "reconstruction": "scpl_ds.objectives.reconstruction:Reconstruction",
        "token_supcon": "scpl_ds.objectives.token_supcon:TokenSupCon",
        "prototype": "scpl_ds.objectives.prototype:Prototype",
        "logit_lens": "scpl_ds.objectives.logit_lens:LogitLens",
        "sum": "scpl_ds.objectives.weighted_sum:WeightedSum",
    },
    "sharding": {
        "deepspeed": "scpl_ds.sharding.deepspeed:DeepSpeedBackend",
        "none": "scpl_ds.sharding.none:NoneBackend",
        "ddp": "scpl_ds.sharding.ddp:DdpBackend",
        "fsdp": "scpl_ds.sharding.fsdp:FsdpBackend",
    },
    "data": {
        "demo": "scpl_ds.data.demo:DemoSource",
        "hf": "scpl_ds.data.hf:HubSource",
        "csv": "scpl_ds.data.files:FileSource",
        "tsv": "scpl_ds.data.files:FileSource",
        "jsonl": "scpl_ds.data.files:FileSource",
        "parquet": "scpl_ds.data.files:FileSource",
        "text": "scpl_ds.data.plain:PlainTextSource",
    },
    "tracker": {
        "console": "scpl_ds.trackers.console:ConsoleTracker",
        "jsonl": "scpl_ds.trackers.jsonl:JsonlTracker",
        "mlflow": "scpl_ds.trackers.mlflow:MlflowTracker",
        "tensorboard": "scpl_ds.trackers.tensorboard:TensorBoardTracker",
        "wandb": "scpl_ds.trackers.wandb:WandbTracker",
    },
    "schedule": {
        "stream": "scpl_ds.schedules:stream",
        "naive": "scpl_ds.schedules:gpipe",
        "gpipe": "scpl_ds.schedules:gpipe",
        "1f1b": "scpl_ds.schedules:one_f_one_b",
        "zero_bubble": "scpl_ds.schedules:zero_bubble",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """Registered names of one kind (``objective``, ``sharding``, ``data``, ``tracker``,
    ``schedule``)."""
    return tuple(_TABLES[kind])


def register(kind: str, name: str, target: str) -> None:
    """Add ``name`` for ``target`` (``"package.module:attribute"``) to the table of ``kind``."""
    _TABLES[kind][name] = target


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def resolve(kind: str, name: str, *, where: str) -> Any:
    """The class or function that ``name`` stands for.

    Args:
        kind: Which table to look in.
        name: A registered name or ``"package.module:attribute"``.
        where: Dotted recipe key, for the message (``scpl.objective.name``).

    Raises:
        RecipeError: The name is unknown, or its module or attribute cannot be imported.
    """
    target = _TABLES[kind].get(name) or (name if ":" in name else None)
    if target is None:
        raise RecipeError(
            f"{where}: unknown {kind} '{name}'{did_you_mean(name, names(kind)) or '.'} "
            f"Known: {', '.join(names(kind))}; or 'package.module:Class' of your own."
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # anybody's module, and a name may be anything
        raise RecipeError(f"{where}: cannot import '{target}': {error}") from error
