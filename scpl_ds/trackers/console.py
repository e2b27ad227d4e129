"""The terminal: a progress bar with the time left, and one line per logging step."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from scpl_ds.trackers._base import Rows, Tracker, TrackerOptions

_STAGE = re.compile(r"stage(\d+)/(\w+)")
_FEW_ANCHORS = 0.5


class ConsoleOptions(TrackerOptions):
    """Options of ``{name: console}``."""

    progress: bool = True
    """Show a progress bar when standard output is a terminal."""


class ConsoleTracker(Tracker):
    """One line per logging step on standard output, above a live progress bar.

    Where standard output is not a terminal (a file, a pipe, a batch job) there is no bar and no
    colour, only the lines. Metrics the line has no place for are in ``metrics.jsonl``.

    Args:
        options: See ``ConsoleOptions``.
        run_dir: The run folder.
        resume: The run continues what is in ``run_dir``.
        console: Where to write; a new rich ``Console`` on standard output by default.
    """

    Options: ClassVar[type[BaseModel]] = ConsoleOptions

    def __init__(
        self, options: ConsoleOptions, *, run_dir: Any, resume: bool, console: Console | None = None
    ) -> None:
        super().__init__(options, run_dir=run_dir, resume=resume)
        self.options = options
        self._console = console or Console()
        self._progress: Progress | None = None
        self._total: int | None = None
        self._step = 0

    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        del config
        self._total = total_steps
        self._step = resumed_step or 0
        if resumed_step:
            self._print(f"going on from step {resumed_step}")
        if not (self.options.progress and self._console.is_terminal):
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._progress.add_task("training", total=total_steps, completed=self._step)
        self._progress.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tick(step)
        self._print(format_line(metrics, step, self._total))

    def tick(self, step: int) -> None:
        self._step = max(step, self._step)
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._step)

    def table(self, name: str, rows: Rows, step: int) -> None:
        if name == "partition":
            return  # drawn in the log already
        for row in rows:
            written = "  ".join(f"{column} {_shown(value)}" for column, value in row.items())
            self._print(f"step {step:>4}  {name}  {written}")

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        del summary
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if exit_code:
            self._print(f"stopped at step {self._step} (exit code {exit_code})")

    def _print(self, line: str) -> None:
        # soft_wrap: a line must stay one line in a log file, where rich assumes 80 columns.
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)


def format_line(metrics: Mapping[str, float], step: int, total_steps: int | None = None) -> str:
    """One logging step as one line; what was not measured is not shown.

    Example:
        >>> metrics = {"stage0/loss": 2.914, "head/loss": 0.42, "perf/tokens_per_s": 12400}
        >>> format_line(metrics, 40, 200)
        'step   40/200  loss s0 2.91  head 0.42  12.4k tok/s'
    """
    width = max(4, len(str(total_steps or 0)))
    parts = [f"step {step:>{width}}" + (f"/{total_steps}" if total_steps else "")]

    def show(name: str, text: Callable[[float], str]) -> None:
        if name in metrics:
            parts.append(text(float(metrics[name])))

    show("val/accuracy", lambda v: f"val_acc {100 * v:5.1f}%")
    show("val/perplexity", lambda v: f"val_ppl {v:.4g}")
    show("val/loss", lambda v: f"val_loss {v:.3g}")
    losses = [f"s{k} {v:.2f}" for k, v in _per_stage(metrics, "loss")]
    if "head/loss" in metrics:
        losses.append(f"head {float(metrics['head/loss']):.2f}")
    if losses:
        parts.append("loss " + "  ".join(losses))
    few = [
        f"s{k} {100 * v:.0f}%"
        for k, v in _per_stage(metrics, "valid_anchor_fraction")
        if v < _FEW_ANCHORS
    ]
    if few:
        parts.append("rows with a positive only " + "  ".join(few))
    if "perf/tokens_per_s" in metrics:
        show("perf/tokens_per_s", lambda v: f"{_short(v)} tok/s")
    else:
        show("perf/samples_per_s", lambda v: f"{_short(v)} samples/s")
    show("perf/peak_memory_gib", lambda v: f"{v:.1f} GiB")
    show("perf/bubble_fraction", lambda v: f"bubble {100 * v:.0f}%")
    return "  ".join(parts)


def _per_stage(metrics: Mapping[str, float], what: str) -> list[tuple[int, float]]:
    """``(stage, value)`` of ``stage{k}/what``, by stage."""
    found = [(_STAGE.fullmatch(name), float(value)) for name, value in metrics.items()]
    return sorted((int(m[1]), value) for m, value in found if m and m[2] == what)


def _shown(value: str | int | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else repr(value)


def _short(value: float) -> str:
    """12400 -> '12.4k'."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
