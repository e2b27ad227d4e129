"""Where the numbers of a run go: one small class per place, and a set that outlives any of them."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from scpl_ds import registry
from scpl_ds.errors import RecipeError

log = logging.getLogger(__name__)

_SECRET_KEY = re.compile(
    r"api_?key|passw|secret|credential|private_?key|^(use_)?(hf|hub|auth|access|bearer)?_?token$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,})|(?<=://)[^/@\s]+:[^/@\s]+@"
)


Rows = Sequence[Mapping[str, str | int | float]]
"""Of a table."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A folder that a run has made."""

    path: Path
    kind: Literal["model", "checkpoint"]
    """The export, or what a run goes on from."""
    step: int
    """Optimizer steps that it has seen."""
    metadata: Mapping[str, Any]
    """Plain JSON values: scores, cut."""
    best: bool = False
    """Better than all before it, by ``train.metric_for_best_model``."""


class TrackerOptions(BaseModel):
    """Base of the options of a tracker: an entry of the recipe's ``trackers`` without ``name``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Tracker(abc.ABC):
    """One place where the numbers of a run go. Lives on one rank only.

    A tracker may raise anything anywhere: ``TrackerSet`` reports it once and goes on without it. It
    must not wait: what it talks to may be slow or gone.

    Args:
        options: An instance of this class's ``Options``.
        run_dir: The run folder; exists.
        resume: The run continues what is in ``run_dir``.
    """

    Options: ClassVar[type[BaseModel]] = TrackerOptions

    run_name: str | None = None
    """What the recipe calls the run; set before ``start``."""

    def __init__(self, options: BaseModel, *, run_dir: Path, resume: bool) -> None:
        self.run_dir = Path(run_dir)
        self.resume = resume

    @abc.abstractmethod
    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        """Open. Called once, before the first step.

        Args:
            config: Everything that describes the run; plain JSON values without secrets.
            total_steps: Optimizer steps the whole run will have, if known.
            resumed_step: Optimizer steps done by the checkpoint the run goes on from, if any.
        """

    @abc.abstractmethod
    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one optimizer step; ``step`` never goes down within a run."""

    def tick(self, step: int) -> None:  # noqa: B027 - most trackers have nothing to show in between
        """Optimizer step ``step`` is done; called every step, so it must cost next to nothing."""

    def picture(self, name: str, svg: Path) -> None:  # noqa: B027 - most show numbers only
        """Show an SVG file under ``name``; called between the last ``log`` and ``finish``."""

    def table(self, name: str, rows: Rows, step: int) -> None:  # noqa: B027
        """Show rows under ``name``, columns by their names, the same in every row; ``step`` as in
        ``log``."""

    def artifact(self, made: Artifact) -> None:  # noqa: B027
        """Keep a folder of the run. Its files are whole, but may be gone once this returns; it may
        be called from another thread than the rest, and must not wait for an upload."""

    def run_id(self) -> str | None:
        """What the place knows the run by, once started; a checkpoint keeps it."""
        return None

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:  # noqa: B027
        """Close. ``summary``: the final results; a non-zero ``exit_code``: the run failed."""


class TrackerSet:
    """All trackers of a run. Never raises: a tracker that fails is reported once and left out.

    Secrets (keys that read like ``api_key``, ``token``, ``password``; values that read like a
    Hugging Face token or ``https://user:password@``) are replaced before any tracker sees them.
    """

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    @classmethod
    def build(
        cls,
        sections: Sequence[Mapping[str, Any]],
        *,
        run_dir: Path,
        resume: bool,
        run_name: str | None = None,
    ) -> TrackerSet:
        """The trackers of a recipe, ``[{name: ..., options...}]``; ``jsonl`` is always among them.

        Raises:
            RecipeError: A name is unknown, or a tracker refuses its options with this error.
            pydantic.ValidationError: An option is unknown or has a value it cannot have.
        """
        names = [section["name"] for section in sections]
        if "jsonl" not in names:
            sections = [*sections, {"name": "jsonl"}]
        trackers: list[Tracker] = []
        for index, section in enumerate(sections):
            tracker = registry.resolve("tracker", section["name"], where=f"trackers[{index}].name")
            options = {key: value for key, value in section.items() if key != "name"}
            checked = tracker.Options.model_validate(options)
            try:
                made = tracker(checked, run_dir=run_dir, resume=resume)
            except RecipeError:
                raise
            except Exception as error:
                _report(tracker.__name__, "its constructor", error)
                continue
            made.run_name = run_name
            trackers.append(made)
        return cls(trackers)

    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        clean = redact(config)
        self._each(
            "start",
            lambda t: t.start(clean, total_steps=total_steps, resumed_step=resumed_step),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._each("log", lambda t: t.log(metrics, step))

    def tick(self, step: int) -> None:
        self._each("tick", lambda t: t.tick(step))

    def picture(self, name: str, svg: Path) -> None:
        self._each("picture", lambda t: t.picture(name, svg))

    def table(self, name: str, rows: Rows, step: int) -> None:
        self._each("table", lambda t: t.table(name, rows, step))

    def artifact(self, made: Artifact) -> None:
        clean = dataclasses.replace(made, metadata=redact(made.metadata))
        self._each("artifact", lambda t: t.artifact(clean))

    def run_ids(self) -> dict[str, str]:
        """Of those that have one, by the name of their class."""
        found: dict[str, str] = {}

        def ask(tracker: Tracker) -> None:
            if (run_id := tracker.run_id()) is not None:
                found[type(tracker).__name__] = str(run_id)

        self._each("run_id", ask)
        return found

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        """Close all of them; a second call does nothing."""
        clean = redact(summary)
        self._each("finish", lambda t: t.finish(clean, exit_code=exit_code))
        self._trackers = []

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                with contextlib.suppress(ValueError):  # another thread was as quick
                    self._trackers.remove(tracker)
                _report(type(tracker).__name__, what, error)


def _report(tracker: str, what: str, error: Exception) -> None:
    """Said while the error is being handled, for the traceback in the log file."""
    log.warning(
        "tracker %s failed in %s and is left out; the training goes on. %s: %s",
        tracker, what, type(error).__name__, error,
    )  # fmt: skip
    log.debug("traceback of the tracker", exc_info=True)


def redact(value: Any, key: str = "") -> Any:
    """``value`` as plain JSON values, with secrets replaced by ``"<redacted>"``."""
    if key and _SECRET_KEY.search(key) and isinstance(value, str) and value:
        return "<redacted>"
    if isinstance(value, Mapping):
        return {str(k): redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(v, key) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return _SECRET_VALUE.sub("<redacted>", str(value))
