"""``scpl-ds bench quality``: every method on a recipe's data, beside backprop.

Each training is a process of its own, all stages in it: that gives the same numbers as stages on
ranks. The recipe's evaluation data are the test set; what is selected is selected on a part of the
training data that no training sees.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scpl_ds import registry
from scpl_ds.bench.quality_table import ONE_STAGE, best_of, plot, render, selected
from scpl_ds.bench.quality_trial import train_and_score
from scpl_ds.bench.ranks import in_forks
from scpl_ds.errors import RecipeError, ScplError
from scpl_ds.meter_machine import describe_machine
from scpl_ds.recipe import Recipe, load_recipe, recipe_from_mapping
from scpl_ds.recipe_files import read_mapping
from scpl_ds.recipe_fingerprint import what_counts
from scpl_ds.registry import did_you_mean

log = logging.getLogger(__name__)

Row = dict[str, Any]
_OF_A_METHOD = (
    "method", "objective", "head", "freeze_stages", "polish", "lookahead", "schedule",
)  # fmt: skip
"""Keys of the recipe's ``scpl`` section that a method says itself; the recipe's play no part."""
_NO_METHOD = ("sum", "reconstruction")
"""Objectives that are no method by themselves."""


class Trial(NamedTuple):
    """One training."""

    method: str
    stages: int
    seed: int
    learning_rate: float


def main(args: argparse.Namespace, save: Callable[[Any], None]) -> str:
    """The command: the table."""
    before = _read(args.json)
    if args.plot is not None:
        plot((before or {}).get("rows", []), args.plot)  # refused now, not after hours
    figures = run(
        load_recipe(args.recipe, args.overrides),
        methods=args.methods,
        stages=args.stages,
        seeds=args.seeds,
        learning_rates=args.learning_rates,
        validation=args.validation,
        variants={} if args.variants is None else read_mapping(args.variants),
        also=args.also,
        jobs=args.jobs,
        before=before,
        on_figures=save,
    )
    if args.plot is not None:
        plot(figures["rows"], args.plot)
    return render(figures["rows"])


def run(
    recipe: Recipe,
    *,
    methods: Sequence[str],
    stages: Sequence[int],
    seeds: int,
    learning_rates: Sequence[float] | None = None,
    validation: float = 0.1,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    also: Sequence[Path] = (),
    jobs: int | None = None,
    before: Mapping[str, Any] | None = None,
    on_figures: Callable[[Any], None] | None = None,
) -> dict[str, Any]:
    """Train and score the grid; progress goes to the log.

    Args:
        recipe: Model, data, optimizer, length of the training. Its stages, method, objective,
            sharding, trackers and folders play no part.
        methods: Names: ``bp``, ``joint``, ``freeze``, ``default``, ``untrained``, objectives,
            variants.
        stages: Numbers of stages; ``bp`` and ``untrained`` are run once, with one.
        seeds: How many, counted on from ``train.seed``.
        learning_rates: To be tried with the first seed for every method and number of stages; the
            best on the validation data is kept. None: the recipe's own.
        validation: Share of the training data that is held out.
        variants: Name -> keys of the ``scpl`` section.
        also: Plain texts that language models are scored on besides.
        jobs: Trainings at a time.
        before: What an earlier call returned: its trainings are not repeated.
        on_figures: Called with everything so far after each training.

    Returns:
        ``machine``, ``settings``, ``rows`` (a selected row a method, number of stages and seed) and
        ``trials`` (everything else that was tried, and what failed, with ``error``).

    Raises:
        RecipeError: Something that cannot be run as asked, or ``before`` is of other settings.
    """
    variants = variants or {}
    scpl_of = {name: _scpl_of(name, variants) for name in dict.fromkeys(methods)}
    rates = list(learning_rates or [recipe.deepspeed.lr])
    if learning_rates and isinstance(_peak(recipe), int | float):
        raise RecipeError(
            f"--learning-rates: deepspeed.scheduler.params.warmup_max_lr: {_peak(recipe)} is what "
            'every training would have. Write "auto" there, or leave the scheduler out.'
        )
    also = [path.expanduser().absolute() for path in also]
    _refuse_texts(recipe, also)
    first = recipe.train.seed
    settings = {
        "recipe": _without_run(recipe),
        "validation": validation,
        "variants": {name: dict(keys) for name, keys in variants.items() if name in scpl_of},
        "also": [str(path) for path in also],
    }
    done = _earlier(before, settings)
    settings["variants"] = {**_variants(before), **settings["variants"]}
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or (1 if torch.cuda.is_available() else cores)
    figures: dict[str, Any] = {
        "machine": describe_machine() | {"jobs": jobs},
        "settings": settings,
        "rows": [],
        "trials": [],
    }

    def cells() -> Iterable[tuple[str, int]]:
        for name in scpl_of:
            yield from [(name, 1)] if name in ONE_STAGE else [(name, k) for k in stages]

    def work(trials: Sequence[Trial]) -> None:
        wanted = [trial for trial in trials if trial not in done]
        functions = []
        for trial in wanted:
            own = recipe_of(recipe, trial, scpl_of[trial.method])
            untrained = trial.method == "untrained"
            score = functools.partial(
                train_and_score, own, validation, also=also, untrained=untrained
            )
            functions.append(functools.partial(_one, score, max(1, cores // jobs)))
        for number, result in in_forks(functions, jobs=jobs):
            trial = wanted[number]
            row: Row = trial._asdict()
            row |= {"error": str(result)} if isinstance(result, ScplError) else result
            done[trial] = row
            _say(row, len(done))
            figures["rows"], figures["trials"] = selected(list(done.values()))
            if on_figures is not None:
                on_figures(figures)

    def rates_of(name: str) -> list[float]:
        return rates[:1] if name == "untrained" else rates

    work([Trial(name, k, first, rate) for name, k in cells() for rate in rates_of(name)])
    chosen: list[tuple[str, int, float]] = []
    for name, k in cells():
        tried = [row for trial, row in done.items() if trial[:3] == (name, k, first)]
        best = best_of([row for row in tried if "error" not in row])
        if best is not None and name != "untrained":
            chosen.append((name, k, best["learning_rate"]))
    later = range(first + 1, first + seeds)
    work([Trial(name, k, seed, rate) for seed in later for name, k, rate in chosen])
    figures["rows"], figures["trials"] = selected(list(done.values()))
    return figures


def recipe_of(recipe: Recipe, trial: Trial, scpl: Mapping[str, Any]) -> Recipe:
    """The recipe of one training: one line apart from those of the other methods."""
    raw = recipe.to_mapping()
    section = _common_scpl(recipe)
    own = dict(scpl)
    if own.get("freeze_stages") == "all but the last":
        own["freeze_stages"] = trial.stages - 1
    raw["scpl"] = {**section, "stages": trial.stages, "sharding": "none", **own}
    deepspeed = {k: v for k, v in raw["deepspeed"].items() if k != "zero_optimization"}
    train = {**raw["train"], "seed": trial.seed}
    if "optimizer" in deepspeed:
        optimizer = dict(deepspeed["optimizer"])
        optimizer["params"] = {**optimizer.get("params", {}), "lr": trial.learning_rate}
        deepspeed["optimizer"] = optimizer
    else:
        train["learning_rate"] = trial.learning_rate
    raw |= {"deepspeed": deepspeed, "train": train, "trackers": []}
    where = f"bench quality, {trial.method} with {trial.stages} stages"
    return recipe_from_mapping(raw, where=where)


def _peak(recipe: Recipe) -> Any:
    """``warmup_max_lr`` of DeepSpeed's scheduler, which overrules the optimizer's rate."""
    scheduler = recipe.to_mapping()["deepspeed"].get("scheduler") or {}
    return (scheduler.get("params") or {}).get("warmup_max_lr")


def _common_scpl(recipe: Recipe) -> dict[str, Any]:
    """What all methods take of the recipe's ``scpl`` section."""
    section = recipe.to_mapping()["scpl"]
    left_out = [*_OF_A_METHOD, "stages", "sharding", "zero_stages", "boundary_dtype"]
    left_out += ["pipeline_ranks", "clip_scope", "sync"]
    if not isinstance(recipe.scpl.partition, str):  # ranges, of one number of stages
        left_out.append("partition")
    return {key: value for key, value in section.items() if key not in left_out}


def _scpl_of(method: str, variants: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """What a method writes into the ``scpl`` section."""
    named: dict[str, Mapping[str, Any]] = {
        "bp": {"method": "bp"},
        "untrained": {"method": "bp"},
        "joint": {"method": "joint", "objective": "early_exit"},
        "freeze": {"freeze_stages": "all but the last"},
        "default": {},
    }
    named |= {
        name: {"objective": name} for name in registry.names("objective") if name not in _NO_METHOD
    }
    if shadows := sorted(set(named) & set(variants)):
        raise RecipeError(
            f"--variants: {', '.join(shadows)} is a method already; give yours another name."
        )
    named |= variants
    if method not in named:
        raise RecipeError(
            f"--methods: unknown method '{method}'{did_you_mean(method, named) or '.'} Known: "
            f"{', '.join(named)}."
        )
    return named[method]


def _one(score: Callable[[], Row], threads: int) -> Row:
    # Also in the environment, where the world looks: as many threads as cores in each of several
    # trainings made them five times slower than one thread.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    logging.getLogger("scpl_ds").setLevel(logging.WARNING)
    return score()


def _refuse_texts(recipe: Recipe, also: Sequence[Path]) -> None:
    if also and recipe.model.task != "causal-lm":
        raise RecipeError(
            "--also: the perplexity of a text is a language model's; this recipe has model.task: "
            f"{recipe.model.task}. Leave --also out."
        )
    stems = [path.stem for path in also]
    if len(set(stems)) < len(stems):
        raise RecipeError(f"--also: the rows name texts by their files: {stems} are not different.")
    for path in also:
        if not path.is_file():
            raise RecipeError(f"--also: there is no file {path}.")


def _without_run(recipe: Recipe) -> dict[str, Any]:
    """What of the recipe every training has."""
    raw = recipe.to_mapping()
    train = {k: v for k, v in raw["train"].items() if k not in ("output_dir", "run_name")}
    kept = {key: raw[key] for key in ("model", "deepspeed", "data")}
    return {**kept, "train": train, "scpl": _common_scpl(recipe)}


def _read(path: Path | None) -> dict[str, Any] | None:
    """What an earlier call has written to ``--json``."""
    path = None if path is None else path.expanduser()
    if path is None or not path.is_file() or not (text := path.read_text()).strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise RecipeError(
            f"--json {path}: holds no JSON ({error}), so it cannot be gone on with. Name another "
            "file, or remove it."
        ) from error


def _earlier(before: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[Trial, Row]:
    """Trainings that need not be repeated."""
    if before is None:
        return {}
    found, asked = before.get("settings", {}), json.loads(json.dumps(settings))
    changed = [] if found.get("validation") == asked["validation"] else ["validation"]
    if what_counts(found.get("recipe", {})) != what_counts(asked["recipe"]):
        changed.insert(0, "recipe")
    if found.get("also", []) != asked["also"]:
        changed.append("list of further texts (--also)")
    known = _variants(before)
    for name in set(known) & set(asked["variants"]):
        if known[name] != asked["variants"][name]:
            changed.append(f"variant {name}")
    if changed:
        raise RecipeError(
            f"--json: the file holds trainings of another {' and '.join(changed)}, which cannot "
            "stand in one table with these. Name another file."
        )
    rows = [*before.get("rows", []), *before.get("trials", [])]
    log.info("%d trainings are done already", len(rows))
    keys = Trial._fields
    return {Trial(*(row[key] for key in keys)): dict(row) for row in rows if "error" not in row}


def _variants(before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Methods of their own that an earlier call knew, also those that this one does not ask for."""
    return {} if before is None else dict(before.get("settings", {}).get("variants", {}))


def _say(row: Row, done: int) -> None:
    who = f"{row['method']}, {row['stages']} stages, seed {row['seed']}, lr {row['learning_rate']}"
    what = "perplexity" if "test_perplexity" in row else "accuracy"
    found = row.get("error") or (
        f"{what}: validation {row[f'validation_{what}']:.4f}, test {row[f'test_{what}']:.4f}, "
        f"{row['samples_per_s']:.0f} samples/s"
    )
    log.info("%s  %d: %s: %s", time.strftime("%H:%M:%S"), done, who, found)
