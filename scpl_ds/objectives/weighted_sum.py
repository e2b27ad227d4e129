"""Several objectives for one stage, each with its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from scpl_ds.objectives._base import (
    Answer,
    GatherRows,
    Matrix,
    Objective,
    ObjectiveOptions,
    ObjectiveOutput,
    StageView,
)
from scpl_ds.objectives._calibration import AddUp
from scpl_ds.recipe_scpl import PartChoice


class WeightedSumOptions(ObjectiveOptions):
    """Options of ``scpl.objective: {name: sum, parts: [...]}``, in short a list of objectives."""

    parts: tuple[PartChoice, ...] = Field(min_length=1)
    """Objectives, each ``{name: ..., weight: 1.0, <its options>}``."""

    @model_validator(mode="after")
    def _one_answers_for_the_task(self) -> Self:
        twice = [part.name for part in self.parts if part.trains_last_stage()]
        if len(twice) > 1:
            raise ValueError(f"{' and '.join(twice)} both make the codes of the labels; keep one")
        return self


class WeightedSum(Objective):
    """The weighted sum of other objectives' losses.

    Metrics are theirs, and ``<name>_loss`` of each; those of a second part of one name end in
    ``_2``. The first part that can classify answers, but for one that scores in the place of the
    task head, which goes before.
    """

    Options: ClassVar[type[BaseModel]] = WeightedSumOptions

    def __init__(
        self, options: WeightedSumOptions, *, hidden_size: int | None, num_labels: int | None
    ) -> None:
        super().__init__(options, hidden_size=hidden_size, num_labels=num_labels)
        sizes = {"hidden_size": hidden_size, "num_labels": num_labels}
        self.parts = nn.ModuleList([choice.create(**sizes) for choice in options.parts])
        self._choices = options.parts
        names = [choice.name for choice in options.parts]
        self._names = names
        self._ends = [
            f"_{n}" if (n := names[:i].count(name) + 1) > 1 else "" for i, name in enumerate(names)
        ]
        """Of the metrics' names."""
        self._weights = [choice.weight for choice in options.parts]

    @property
    def _each(self) -> list[Objective]:
        return [part for part in self.parts if isinstance(part, Objective)]

    @classmethod
    def trains_last_stage(cls, options: BaseModel) -> bool:
        parts = options.parts if isinstance(options, WeightedSumOptions) else ()
        return any(part.trains_last_stage() for part in parts)

    @classmethod
    def looks_ahead(cls, options: BaseModel) -> bool:
        parts = options.parts if isinstance(options, WeightedSumOptions) else ()
        return all(part.looks_ahead() for part in parts)

    @classmethod
    def can_answer(cls, options: BaseModel) -> bool:
        parts = options.parts if isinstance(options, WeightedSumOptions) else ()
        return any(part.can_answer() for part in parts)

    @classmethod
    def borrows(cls, options: BaseModel) -> frozenset[Matrix]:
        parts = options.parts if isinstance(options, WeightedSumOptions) else ()
        return frozenset[Matrix]().union(*(part.resolve().borrows(part.options) for part in parts))

    def lend(self, weights: Mapping[Matrix, Tensor]) -> None:
        """Each part gets what it asks for; a matrix that two ask for is the same tensor."""
        for choice, part in zip(self._choices, self._each, strict=True):
            wanted = choice.resolve().borrows(choice.options)
            if wanted:
                part.lend({name: weights[name] for name in wanted if name in weights})

    @classmethod
    def calibrates(cls, options: BaseModel) -> bool:
        parts = options.parts if isinstance(options, WeightedSumOptions) else ()
        return any(part.calibrates() for part in parts)

    def calibration(self) -> int:
        return max(part.calibration() for part in self._each)

    def calibrate(self, rows: Tensor, targets: Tensor, add_up: AddUp) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self._each):
            if part.calibration():
                own = part.calibrate(rows, targets, add_up)
                found |= {f"parts.{index}.{name}": value for name, value in own.items()}
        return found

    def attach(self, body: nn.Module) -> None:
        for part in self._each:
            part.attach(body)

    def see_all_ranks(self, gather: GatherRows | None) -> None:
        super().see_all_ranks(gather)
        for part in self._each:
            part.see_all_ranks(gather)

    def forward(
        self, hidden_states: Tensor, *, attention_mask: Tensor | None, labels: Tensor
    ) -> ObjectiveOutput:
        return self.learn(StageView.of(hidden_states, attention_mask, labels))

    def learn(self, view: StageView) -> ObjectiveOutput:
        loss: Tensor | None = None
        metrics: dict[str, Tensor] = {}
        extras: dict[str, Tensor] = {}
        parts = zip(self._names, self._ends, self._weights, self._each, strict=True)
        for name, end, weight, part in parts:
            output = part.learn(view)
            term = weight * output.loss
            loss = term if loss is None else loss + term
            own = output.metrics | {f"{name}_loss": output.loss.detach()}
            metrics |= {f"{key}{end}": value for key, value in own.items()}
            extras |= output.extras
        assert loss is not None, "Options asks for one part at least"
        return ObjectiveOutput(loss, metrics, extras)

    def answer(self, view: StageView) -> Answer:
        logits, extras = None, {}
        for part in sorted(self._each, key=lambda part: not part.replaces_head):
            answer = part.answer(view)
            logits = answer.logits if logits is None else logits
            extras |= answer.extras
        return Answer(logits, extras)

    def commit_step(self) -> None:
        for part in self._each:
            part.commit_step()

    def discard_step(self) -> None:
        for part in self._each:
            part.discard_step()

    def forget(self) -> None:
        for part in self._each:
            part.forget()

    def flops(self, batch: int, sequence: int) -> int:
        return sum(part.flops(batch, sequence) for part in self._each)
