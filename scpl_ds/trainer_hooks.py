"""What somebody beside the recipe may hear of a run while it goes on, and ask of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from scpl_ds.data.loader import BatchLoader
from scpl_ds.engine import Engine
from scpl_ds.evaluation import See, evaluate

if TYPE_CHECKING:
    from scpl_ds.trainer import Run


@dataclasses.dataclass
class Asked:
    """What is to be done after the step that was just taken; the same on every rank."""

    log: bool = False
    evaluate: bool = False
    save: bool = False
    stop: bool = False


class Hooks:
    """Hears of everything and asks for nothing. Every method is called on every rank."""

    def __init__(self) -> None:
        self.asked = Asked()

    def begin(self, run: Run) -> None:
        """Before the first step, once the trackers are open."""

    def before_step(self, step: int) -> None:
        """Before optimizer step ``step`` (from 1). Must wait for nobody."""

    def after_step(self, step: int) -> None:
        """After this rank's part of ``step``. Must wait for nobody, but at the end of an epoch."""

    def last_step(self, show: Callable[[], None]) -> None:
        """After the last step, which all ranks come to; ``show`` hands out numbers that arrived."""

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of ``step`` have arrived from all ranks; on rank 0."""

    def score(
        self, engine: Engine, loader: BatchLoader, *, see: See | None = None
    ) -> dict[str, float]:
        """The numbers of an evaluation, the same on every rank; ``see`` as in ``evaluate``."""
        return evaluate(engine, loader, see=see).metrics()

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` was evaluated; all ranks are here."""

    def saved(self, step: int) -> None:
        """``step`` was saved; all ranks are here."""

    def end(self) -> None:
        """After the last step."""

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, plain JSON."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What the checkpoint kept that the run goes on from."""
