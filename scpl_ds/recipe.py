"""A recipe: everything that defines a run, as data. Load with :func:`load_recipe`.

A recipe is YAML or JSON without inheritance, interpolation or Python. Unknown keys are errors at
every depth, and all problems are reported at once, each with its dotted path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from scpl_ds.ds_checks import check_keys, check_values
from scpl_ds.ds_config import DeepSpeedSection, mend_numbers
from scpl_ds.ds_keys import FILLS, TOP
from scpl_ds.ds_limits import unsupported
from scpl_ds.errors import RecipeError
from scpl_ds.problems import Problem, problems_of, recipe_error, show, unknown_key
from scpl_ds.recipe_checks import across
from scpl_ds.recipe_fields import Section
from scpl_ds.recipe_files import apply_overrides, read_mapping
from scpl_ds.recipe_fingerprint import fingerprint_of
from scpl_ds.recipe_hub import problems_of_name
from scpl_ds.recipe_scpl import ScplSection
from scpl_ds.recipe_sections import DataChoice, ModelSection, TrackerChoice, TrainSection

__all__ = [
    "DataChoice",
    "ModelSection",
    "Recipe",
    "ScplSection",
    "TrackerChoice",
    "TrainSection",
    "check_world",
    "load_recipe",
    "recipe_from_ds_config",
    "recipe_from_mapping",
    "recipe_schema",
]

_TRAIN_HINTS = [key for fill in FILLS.values() for key in fill.train_keys]

_OTHER_NAMES = {
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "batch_size": "train.per_device_train_batch_size",
    "report_to": "trackers",
    "temperature": "scpl.objective.temperature",
    "pooling": "scpl.objective.pooling",
    "projection": "scpl.objective.projection",
    "detach_features": "scpl.head.detach_features",
    "max_length": "data.max_length",
    "text_column": "data.text_column",
    "label_column": "data.label_column",
}
"""What people write at a wrong place -> where it belongs."""


def _as_section(value: Any) -> DeepSpeedSection:
    if isinstance(value, DeepSpeedSection):
        return value
    raise ValueError("make recipes with load_recipe or recipe_from_mapping")


class Recipe(Section):
    """One run. Make one with :func:`load_recipe` or :func:`recipe_from_mapping`."""

    model: ModelSection
    """Which Hugging Face model is cut into stages."""
    scpl: ScplSection
    """Stages, what each trains on, and where each runs."""
    deepspeed: Annotated[
        DeepSpeedSection,
        PlainValidator(_as_section),
        PlainSerializer(lambda section: section.raw),
        WithJsonSchema({"type": ["string", "object"]}),
    ]
    """DeepSpeed's own keys, unchanged: the mapping itself, or the path of a ``ds_config.json``
    relative to the recipe. It is the vocabulary for batch size, optimizer, clipping, precision and
    ZeRO stage whatever ``scpl.sharding`` is."""
    data: DataChoice
    """Which texts and labels: ``{name: ..., <its options>}``."""
    train: TrainSection = TrainSection()
    """The loop, in the names of Hugging Face's ``TrainingArguments``."""
    trackers: tuple[TrackerChoice, ...] = Field(
        default_factory=lambda: (TrackerChoice.model_validate("console"),)
    )
    """Where metrics go besides ``metrics.jsonl``, which is always written: a list, or one name.
    Default: the console."""

    @property
    def output_dir(self) -> Path:
        """The run folder."""
        return _output_dir(self.train)

    @property
    def name(self) -> str:
        """Name of the run: ``train.run_name``, or the last part of the run folder."""
        return _named_by(self.train)[1]

    @property
    def export_dir(self) -> Path:
        """Where the trained model is written."""
        return self.train.export_dir or self.output_dir / "export"

    @property
    def eval_batch_size(self) -> int:
        """Samples of one evaluation micro-batch."""
        return self.train.per_device_eval_batch_size or self.deepspeed.micro_batch_size

    def to_mapping(self) -> dict[str, Any]:
        """Plain data that :func:`recipe_from_mapping` turns into an equal recipe."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_yaml(self) -> str:
        """The recipe as YAML, defaults written out, a ``deepspeed`` file put in its place."""
        return yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True, width=100)

    def fingerprint(self) -> str:
        """sha256 over what determines the trained numbers.

        Left out: how many ranks share the stages and how messages flow (the numbers are the same to
        the bit), trackers, folders, logging, evaluation and checkpoint frequency.
        """
        mapping = self.to_mapping()
        mapping["scpl"]["head"] = {"detach_features": self.scpl.detach_features}
        return fingerprint_of(mapping, self.deepspeed.filled)


def _output_dir(train: TrainSection) -> Path:
    return train.output_dir or Path("runs/recipe")


def _named_by(train: TrainSection) -> tuple[str, str]:
    """By which key a run is named, and how."""
    if train.run_name:
        return "train.run_name", train.run_name
    return "train.output_dir", _output_dir(train).name


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe file.

    Args:
        path: YAML or JSON.
        overrides: ``a.b.c=value`` with the value as YAML: ``scpl.stages=3``,
            ``train.save_steps=100``, ``trackers.wandb.mode=offline`` (a list item by number
            or name).

    Raises:
        RecipeError: Everything that is wrong, at once.
    """
    path = Path(path)
    raw = read_mapping(path)
    problems = _inline_deepspeed(raw, path.parent)
    problems += apply_overrides(raw, overrides)
    problems += _inline_deepspeed(raw, Path())  # deepspeed=other.json on the command line
    return _build(raw, problems, str(path), f"runs/{path.stem}")


def recipe_from_mapping(
    mapping: Mapping[str, Any], *, where: str = "the recipe", base_dir: str | Path = "."
) -> Recipe:
    """A recipe from plain data, as strictly as from a file.

    Args:
        mapping: What a recipe file would hold.
        where: What to call it in messages.
        base_dir: What a ``deepspeed`` path is relative to.

    Raises:
        RecipeError: Everything that is wrong, at once.
    """
    raw = dict(mapping)
    return _build(raw, _inline_deepspeed(raw, Path(base_dir)), where, "runs/recipe")


def recipe_from_ds_config(
    config: Mapping[str, Any] | str | Path, *, stages: int | None = None
) -> tuple[ScplSection, DeepSpeedSection]:
    """Split a DeepSpeed config that has one extra block, ``"scpl"``.

    Args:
        config: The mapping, or the path of a ``ds_config.json``.
        stages: Goes before ``scpl.stages``.

    Raises:
        RecipeError: Everything that is wrong, at once; also when there is no ``scpl`` block.
    """
    where = "the config" if isinstance(config, Mapping) else str(config)
    raw = dict(config) if isinstance(config, Mapping) else read_mapping(Path(config))
    scpl = raw.pop("scpl", None)
    if stages is not None and isinstance(scpl, Mapping):
        scpl = {**scpl, "stages": stages}
    sections, problems = _sections({"scpl": scpl, "deepspeed": raw}, ("scpl",))
    if problems:
        raise recipe_error(problems, where)
    return sections["scpl"], sections["deepspeed"]


def check_world(recipe: Recipe | ScplSection, world_size: int) -> tuple[int, int]:
    """Pipeline ranks P and data-parallel ranks D of a run on ``world_size`` ranks, P x D = world.

    ``pipeline_ranks: auto`` takes the largest P up to ``stages`` that divides the world: one stage
    per rank where that fits, several stages on a rank where ranks are few, the rest D.

    Raises:
        RecipeError: ``pipeline_ranks`` does not divide the world size.
    """
    scpl = recipe.scpl if isinstance(recipe, Recipe) else recipe
    divisors = [p for p in range(1, min(scpl.stages, world_size) + 1) if world_size % p == 0]
    if scpl.pipeline_ranks == "auto":
        return divisors[-1], world_size // divisors[-1]
    wanted = scpl.pipeline_ranks
    if world_size % wanted == 0:
        return wanted, world_size // wanted
    dp_size = max(1, world_size // wanted)
    dp = f"{dp_size} dp rank{'s' if dp_size > 1 else ''}"
    ranks = wanted * dp_size
    share = " (several stages share a rank)" if divisors[-1] < scpl.stages else ""
    problem = Problem(
        "scpl.pipeline_ranks",
        f"{wanted} pipeline ranks x {dp} need {ranks} ranks, but WORLD_SIZE is {world_size}. "
        f"Set scpl.pipeline_ranks: {divisors[-1]}{share}, or launch {ranks} ranks.",
    )
    raise recipe_error([problem], "the recipe")


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors (``recipes/recipe.schema.json``)."""
    from scpl_ds.recipe_docs import build_schema

    return build_schema()


def _build(raw: dict[str, Any], problems: list[Problem], where: str, run_dir: str) -> Recipe:
    required = ("model", "scpl", "deepspeed", "data")
    sections, found = _sections(raw, required)
    train: TrainSection = sections.get("train") or TrainSection()
    if train.output_dir is None:
        train = train.model_copy(update={"output_dir": Path(run_dir)})
    problems = problems + found + across(sections) + problems_of_name(train, *_named_by(train))
    if problems:
        raise recipe_error(problems, where)
    return Recipe(**{**sections, "train": train})


def _sections(
    raw: Mapping[str, Any], required: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """Every section that is good, and the problems of all the others."""
    sections: dict[str, Any] = {}
    problems: list[Problem] = []
    known = list(Recipe.model_fields)
    for key in raw:
        if key not in known:
            problems.append(Problem(str(key), unknown_key(str(key), known, _homes().get(str(key)))))
    for name in known:
        value = raw.get(name)
        if value is None:
            if name in required:
                problems.append(Problem(name, "is required"))
            continue
        if name == "deepspeed":
            continue  # last: it is compared with train and scpl
        if name == "trackers" and isinstance(value, str):
            value = [value]
        try:
            sections[name] = _VALIDATE[name](value)
        except pydantic.ValidationError as error:
            model = Recipe.model_fields[name].annotation
            model = model if isinstance(model, type) else TrackerChoice
            problems += [p.under(name) for p in problems_of(error, model, _homes())]
    if "scpl" in sections and "model" in sections:
        sections["scpl"] = sections["scpl"].for_task(sections["model"].task)
    if raw.get("deepspeed") is not None:
        section, found = _deepspeed(raw["deepspeed"], sections)
        sections["deepspeed"] = section
        problems += found
    return sections, problems


_VALIDATE: dict[str, Callable[[Any], Any]] = {
    "model": ModelSection.model_validate,
    "scpl": ScplSection.model_validate,
    "data": DataChoice.model_validate,
    "train": TrainSection.model_validate,
    "trackers": pydantic.TypeAdapter(tuple[TrackerChoice, ...]).validate_python,
}


def _deepspeed(
    value: Any, sections: Mapping[str, Any]
) -> tuple[DeepSpeedSection | None, list[Problem]]:
    if isinstance(value, _Unreadable):
        return None, []
    if not isinstance(value, Mapping):
        return None, [
            Problem("deepspeed", f"must be a mapping or the path of a file, got {show(value)}")
        ]
    raw = mend_numbers(value)
    problems = check_keys(raw)
    if problems:
        return None, problems
    train: TrainSection | None = sections.get("train")
    scpl: ScplSection | None = sections.get("scpl")
    hints = {k: getattr(train, k) for k in _TRAIN_HINTS} if train else {}
    section = DeepSpeedSection(raw, {k: v for k, v in hints.items() if v is not None})
    problems = check_values(section)
    problems += _unsupported(section, scpl)
    if train and section.scheduler:
        auto = section.scheduler.params.get("warmup_num_steps") == "auto"
        same = (section.scheduler.type, train.lr_scheduler_type) == (
            "WarmupLR", "constant_with_warmup",
        )  # fmt: skip
        for key in ("lr_scheduler_type", "warmup_steps", "warmup_ratio"):
            agrees = auto if key.startswith("warmup") else same
            if getattr(train, key) is not None and not agrees:
                problems.append(
                    Problem(f"train.{key}", "deepspeed.scheduler is set too; keep one of the two")
                )
    if not problems:
        section.warn_of_defaults()
    return section, problems


def _unsupported(section: DeepSpeedSection, scpl: ScplSection | None) -> list[Problem]:
    """What the backend cannot do, for every ZeRO stage that some pipeline stage has."""
    if scpl is None:
        return unsupported(section, "deepspeed")
    stages = sorted(set(scpl.zero_stages or [section.zero_stage]))
    found = [unsupported(section.with_zero_stage(z), scpl.sharding) for z in stages]
    problems = list(dict.fromkeys(problem for each in found for problem in each))
    if scpl.clip_scope == "global" and section.gradient_clipping == 0:
        message = "global has nothing to clip: deepspeed.gradient_clipping is 0"
        problems.append(Problem("scpl.clip_scope", message))
    return problems


class _Unreadable(dict[str, Any]):
    """Stands for a ``deepspeed`` file that was already complained about."""


def _inline_deepspeed(raw: dict[str, Any], base: Path) -> list[Problem]:
    """Replace a path in ``raw["deepspeed"]`` by what the file holds."""
    value = raw.get("deepspeed")
    if not isinstance(value, str):
        return []
    try:
        raw["deepspeed"] = read_mapping(base / os.path.expanduser(value))
    except RecipeError as error:
        raw["deepspeed"] = _Unreadable()
        return [Problem("deepspeed", str(error))]
    return []


@cache
def _homes() -> dict[str, str]:
    """Key -> its only dotted home, for keys written into the wrong section."""
    homes: dict[str, list[str]] = {}
    for section in ("model", "scpl", "train"):
        model = Recipe.model_fields[section].annotation
        assert isinstance(model, type) and issubclass(model, pydantic.BaseModel)
        for key in model.model_fields:
            homes.setdefault(key, []).append(f"{section}.{key}")
    for key in TOP:
        homes.setdefault(key, []).append(f"deepspeed.{key}")
    return _OTHER_NAMES | {key: places[0] for key, places in homes.items()}
