"""The ``scpl`` section of a recipe: stages, what each trains on, and where each runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from scpl_ds import registry
from scpl_ds.problems import Problem, nested, show
from scpl_ds.recipe_fields import Count, Fraction, Named, Section, not_bool


class ObjectiveChoice(Named):
    """Which loss the stages before the last one train on: a name, a mapping, or a list of them
    whose weighted sum is meant."""

    kind = "objective"

    @classmethod
    def in_full(cls, value: Any) -> Any:
        return (
            {"name": "sum", "parts": value} if isinstance(value, list) else super().in_full(value)
        )

    def trains_last_stage(self) -> bool:
        """Whether the last stage's layers learn from it too, if nothing else is asked for."""
        return self.resolve().trains_last_stage(self.options)

    def looks_ahead(self) -> bool:
        """Whether it means the same behind copies of the next layers."""
        return self.resolve().looks_ahead(self.options)

    def calibrates(self) -> bool:
        """Whether its head is fitted on data before the first step."""
        return self.resolve().calibrates(self.options)

    def build(
        self,
        *,
        hidden_size: int | None,
        num_labels: int | None,
        matrices: Callable[[Collection[str]], Mapping[str, Any]] | None = None,
    ) -> Any:
        """The objective itself, lent what it borrows of the model.

        Args:
            hidden_size: As ``Objective`` takes it.
            num_labels: As ``Objective`` takes it.
            matrices: Names -> those that the model has; None: it has none.
        """
        made = self.create(hidden_size=hidden_size, num_labels=num_labels)
        if names := self.resolve().borrows(self.options):
            made.lend({} if matrices is None else matrices(names))
        return made

    def can_answer(self) -> bool:
        """Whether its heads classify."""
        return self.resolve().can_answer(self.options)


class PartChoice(ObjectiveChoice):
    """One objective of a sum."""

    beside: ClassVar[tuple[str, ...]] = ("weight",)

    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """What its loss is multiplied with."""


class HeadSection(Section):
    """How the last stage trains."""

    detach_features: Literal[False, True, "both"] | None = None
    """``false``: the task loss trains the last stage's layers and the head. ``true`` (the paper):
    the local objective trains the layers, the task loss only the head. ``both``: the layers get
    both losses. Unset: ``false``, and ``true`` for ``associated``."""


def _ranks(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not _is_whole(value) or int(value) < 1):
        raise ValueError(f"must be 'auto' or a whole number of at least 1, got {show(value)}")
    return value


def _is_whole(value: Any) -> bool:
    try:
        return int(value) == float(value)
    except (TypeError, ValueError, OverflowError):
        return False


_METHODS = ("flops", "parameters", "uniform", "time")


def _cuts(value: Any) -> Any:
    if isinstance(value, str):
        if value not in _METHODS:
            near = registry.did_you_mean(value, _METHODS)
            raise ValueError(
                f"unknown method '{value}'{near or '.'} Known: {', '.join(_METHODS)}; or a list of "
                "[start, end] layer ranges"
            )
        return value
    example = "a list of [start, end] layer ranges such as [[0, 3], [3, 6]]"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"must be {', '.join(_METHODS)}, or {example}, got {show(value)}")
    position = 0
    for span in value:
        pair = isinstance(span, list | tuple) and len(span) == 2 and all(map(_is_whole, span))
        if not pair or isinstance(span[0], bool) or isinstance(span[1], bool):
            raise ValueError(f"must be {example}, got {show(span)} in it")
        start, end = int(span[0]), int(span[1])
        if start != position:
            raise ValueError(f"{show(list(span))} must start at layer {position}, without a gap")
        if end <= start:
            raise ValueError(f"{show(list(span))} holds no layer; end must be greater than start")
        position = end
    return value


def _registered(kind: str) -> BeforeValidator:
    """Known by name, or ``package.module:Class``; imported only when it is used."""

    def check(value: Any) -> Any:
        known = registry.names(kind)
        if not isinstance(value, str):
            raise ValueError(f"must be a text, got {show(value)}")
        if value not in known and ":" not in value:
            near = registry.did_you_mean(value, known)
            raise ValueError(
                f"unknown {kind} '{value}'{near or '.'} Known: {', '.join(known)}; or "
                "'package.module:Class' of your own"
            )
        return value

    return BeforeValidator(check)


_OBJECTIVES = {"causal-lm": "logit_lens"}
"""Task -> what its stages train on where nothing is said; ``supcon`` needs one class a sample."""

BACKPROP_SCHEDULES = ("naive", "gpipe", "1f1b", "zero_bubble")


class ScplSection(Section):
    """Stages, what each trains on, and where each runs."""

    stages: Count
    """How many stages the layers are cut into."""
    pipeline_ranks: Annotated[int | Literal["auto"], BeforeValidator(_ranks)] = "auto"
    """Ranks that one copy of the model is spread over; a rank may hold several stages. ``auto``:
    the largest number up to ``stages`` that divides the world size. What is left makes copies."""
    partition: Annotated[
        Literal["flops", "parameters", "uniform", "time"] | tuple[tuple[int, int], ...],
        BeforeValidator(_cuts),
    ] = "flops"
    """Where to cut: equal work (``flops``), equal memory (``parameters``), equal layer counts
    (``uniform``), equal times of the layers, measured by rank 0 before the run (``time``; a resumed
    run of a recipe keeps its cut), or ranges of layers such as ``[[0, 3], [3, 6]]``."""
    objective: ObjectiveChoice = Field(
        default_factory=lambda: ObjectiveChoice.model_validate("supcon")
    )
    """Local loss of the stages: a name, ``{name: ..., <its options>}``, or a list of them with
    weights. Default ``supcon``, and ``logit_lens`` for ``model.task: causal-lm``."""
    head: HeadSection = HeadSection()
    """How the last stage trains."""
    method: Literal["scpl", "bp", "joint"] = "scpl"
    """``scpl``: every stage by its own objective. ``bp``: end-to-end backpropagation through all
    stages, to compare with. ``joint``: backpropagation of the sum of all stages' objectives and the
    task loss, nothing detached (BranchyNet's early exits). ``bp`` and ``joint`` need ``sharding:
    none``."""
    freeze_stages: Annotated[int, Field(ge=0), BeforeValidator(not_bool)] = 0
    """The first so many stages are left as they are, without dropout: what local objectives must be
    better than."""
    polish: Fraction = 0.0
    """The last part of the optimizer steps, 0.1 for a tenth, is trained end to end as ``bp`` is;
    needs ``sharding: none``."""
    head_lr: Annotated[float, Field(gt=0, lt=1e6), BeforeValidator(not_bool)] = 5.0
    """Learning rate of the local objectives' own parameters (projections, classifiers, codes),
    relative to the layers'. They start from nothing, and layers from a pretrained model, whose rate
    is slow for them (docs/quality.md)."""
    local_lr: Annotated[float, Field(gt=0, lt=1e6), BeforeValidator(not_bool)] = 1.0
    """Learning rate of all stages but the last, heads included, relative to the last stage's, whose
    loss is the task's. 0.25 with four times the rate was better than one rate for all
    (docs/quality.md). Without effect where gradients cross stages (``method``)."""
    lookahead: Annotated[int, Field(ge=0), BeforeValidator(not_bool)] = 0
    """Every local loss stands so many layers behind its stage: behind copies of the next layers, as
    they were before training, which are trained with the stage and thrown away. Costs their memory
    and time; where they reach the end of the model, their task loss is added."""
    schedule: Annotated[str, _registered("schedule")] = "stream"
    """Order of work on a rank. ``stream`` never waits for a later stage. With backpropagation
    ``naive``, ``gpipe``, ``1f1b`` or ``zero_bubble``; unset, ``1f1b``."""
    max_in_flight: Count = 2
    """Messages that may wait at a boundary before the sender pauses; each holds one micro-batch of
    hidden states, and so does the one that the receiver takes ahead."""
    transport: Literal["auto", "nccl", "gloo"] = "auto"
    """What carries them: ``gloo`` through host memory, ``nccl`` from GPU to GPU; ``auto`` is gloo
    until nccl has been run between two GPUs."""
    boundary_dtype: Literal["bf16", "fp16", "fp8", "int8"] | None = None
    """Hidden states cross a boundary in this dtype in training (fp8 and int8 with a scale a row).
    No gradient depends on it, but it changes what the next stage learns from."""
    step_in_backward: bool = True
    """With gradient accumulation and several stages on a rank: all micro-batches through one stage,
    then its optimizer step, before the next stage begins, so that only one stage has gradients.
    ``false``: each micro-batch through all of them. The numbers are the same to the bit."""
    sync: Literal["none", "step"] = "none"
    """``step``: no stage begins an optimizer step before all have ended the one before. Costs the
    pipeline a bubble every step."""
    clip_scope: Literal["stage", "global"] = "stage"
    """What ``deepspeed.gradient_clipping`` limits: the norm of each stage's gradients, or of all
    stages' together (needs ``sync: step``, and keeps the gradients of all stages of a rank)."""
    sharding: Annotated[str, _registered("sharding")] = "deepspeed"
    """Backend that spreads one stage over its data-parallel ranks: ``deepspeed``, ``fsdp``,
    ``ddp``, ``none``, or ``package.module:Class``."""
    zero_stages: tuple[Annotated[int, Field(ge=0, le=3)], ...] | None = None
    """ZeRO stage of each pipeline stage, where they differ; goes before
    ``deepspeed.zero_optimization.stage``."""
    timeout_s: Annotated[float, Field(gt=0), BeforeValidator(not_bool)] = 600.0
    """Seconds that a rank waits for its neighbour before it gives up and says for what."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems: list[Problem] = []
        if self.pipeline_ranks != "auto" and self.pipeline_ranks > self.stages:
            problems.append(
                Problem(
                    "pipeline_ranks",
                    f"{self.pipeline_ranks} is more than stages: {self.stages}, and a rank needs "
                    f"at least one stage. Use at most {self.stages}",
                )
            )
        if isinstance(self.partition, tuple) and len(self.partition) != self.stages:
            problems.append(
                Problem(
                    "partition",
                    f"has {len(self.partition)} ranges, but stages is {self.stages}",
                )
            )
        if self.zero_stages is not None and len(self.zero_stages) != self.stages:
            problems.append(
                Problem(
                    "zero_stages",
                    f"has {len(self.zero_stages)} numbers, but stages is {self.stages}",
                )
            )
        if self.clip_scope == "global" and self.sync != "step":
            problems.append(
                Problem(
                    "clip_scope",
                    "global needs scpl.sync: step: the norm over all stages is known only when the "
                    "last one has gone backward",
                )
            )
        problems += self._backprop_problems()
        problems += self._objective_problems()
        if self.freeze_stages >= self.stages:
            message = f"{self.freeze_stages} leaves none of {self.stages} stages to train"
            problems.append(Problem("freeze_stages", message))
        if problems:
            raise nested(problems)
        return self

    def for_task(self, task: str) -> Self:
        """The same, with the task's objective where none was asked for."""
        if "objective" in self.model_fields_set or task not in _OBJECTIVES:
            return self
        asked = {key: getattr(self, key) for key in self.model_fields_set}
        return type(self).model_validate({**asked, "objective": _OBJECTIVES[task]})

    def _objective_problems(self) -> list[Problem]:
        """What the objective cannot do. Codes of labels are made by the first stage, and scored in
        the place of the task head."""
        name, problems = self.objective.name, []
        if self.lookahead and (self.method != "scpl" or not self.objective.looks_ahead()):
            found = f"'{name}' is about the stage itself"
            found = found if self.method == "scpl" else f"method: {self.method} has no need of it"
            problems.append(Problem("lookahead", f"must be 0: {found}"))
        if self.objective.trains_last_stage():
            for key in ("freeze_stages", "polish"):
                if getattr(self, key):
                    problems.append(Problem(key, f"cannot be used with '{name}'; use supcon"))
        return problems

    def _backprop_problems(self) -> list[Problem]:
        """What does not go together with gradients across stages, or without them."""
        known, problems = BACKPROP_SCHEDULES, []
        end_to_end = "method: " + self.method if self.method != "scpl" else f"polish: {self.polish}"
        if self.method == "scpl" and self.schedule in known:
            message = f"{self.schedule} is an order of backpropagation; use stream, or method: bp"
            problems.append(Problem("schedule", message))
        if self.method != "scpl" and self.schedule not in (*known, "stream"):
            message = f"'{self.schedule}' cannot run {end_to_end}; use {', '.join(known)}"
            problems.append(Problem("schedule", message))
        if self.method == "scpl" and not self.polish:
            return problems
        if self.method != "scpl" and self.polish:
            problems.append(Problem("polish", f"there is nothing to polish with {end_to_end}"))
        if self.freeze_stages:
            message = f"is the control of local objectives and cannot be used with {end_to_end}"
            problems.append(Problem("freeze_stages", message))
        if self.method != "scpl" and self.head.detach_features:
            message = f"must be false: with {end_to_end} the task trains all features"
            problems.append(Problem("head.detach_features", message))
        if self.method == "joint" and self.objective.trains_last_stage():
            message = f"'{self.objective.name}' is made for detached stages; use early_exit"
            problems.append(Problem("objective", message))
        for key, wanted in (("sharding", "none"), ("boundary_dtype", None), ("zero_stages", None)):
            if (found := getattr(self, key)) != wanted:
                message = f"{end_to_end} sends gradients between stages and needs {key}: "
                message += f"{show(wanted)}, not {show(found)}"
                if key == "sharding":
                    message += " (and ZeRO stage 0: deepspeed.zero_optimization.stage=0)"
                problems.append(Problem(key, message))
        return problems

    @property
    def detach_features(self) -> Literal[False, True, "both"]:
        """``head.detach_features``, or what the objective wants where nothing is asked for."""
        if self.head.detach_features is not None:
            return self.head.detach_features
        return self.method == "scpl" and self.objective.trains_last_stage()

    @property
    def order(self) -> str:
        """The schedule that is run; ``method`` has its own where nothing is said."""
        return self.schedule if self.method == "scpl" else self.backprop_schedule

    @property
    def backprop_schedule(self) -> str:
        """The order of work where gradients cross stages."""
        return self.schedule if self.schedule in BACKPROP_SCHEDULES else "1f1b"

    def reach(self, stage: int, end: int, num_layers: int) -> int:
        """One past the last layer that a stage's local loss looks through; ``end``, one past its
        own last, without ``lookahead``."""
        looks = self.lookahead if self.has_objective(stage) else 0
        return min(end + looks, num_layers)

    @property
    def calibrates(self) -> bool:
        """Whether local heads are fitted on data before the first step."""
        return self.method != "bp" and self.objective.calibrates()

    def lr_of(self, stage: int) -> float:
        """A stage's learning rate, relative to the run's."""
        return self.local_lr if self.method == "scpl" and stage < self.stages - 1 else 1.0

    def has_objective(self, stage: int) -> bool:
        """Whether a stage of such an index has a local objective."""
        if stage < self.freeze_stages or self.method == "bp":
            return False
        return stage < self.stages - 1 or self.detach_features is not False
