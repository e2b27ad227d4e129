"""TensorBoard: event files in the run folder, one curve per metric."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, PositiveFloat

from scpl_ds.trackers._base import Rows, Tracker, TrackerOptions

FOLDER = "tensorboard"


class TensorBoardOptions(TrackerOptions):
    """Options of ``{name: tensorboard}``."""

    log_dir: Path | None = None
    """Where the event files go; unset: ``tensorboard`` in the run folder."""
    flush_s: PositiveFloat = 10.0
    """Seconds after which rows are on the disk at the latest: a killed run loses no more."""


class TensorBoardTracker(Tracker):
    """Scalars, tables and the recipe as TensorBoard reads them: ``tensorboard --logdir runs``.

    A resumed run adds a file, and tells TensorBoard to hide what the earlier ones have after the
    checkpoint it goes on from.

    Raises:
        ModuleNotFoundError: From ``start``, when tensorboard is not installed.
    """

    Options: ClassVar[type[BaseModel]] = TensorBoardOptions

    def __init__(self, options: TensorBoardOptions, *, run_dir: Path, resume: bool) -> None:
        super().__init__(options, run_dir=run_dir, resume=resume)
        self.options = options
        self._writer: Any = None

    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        del total_steps
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the tensorboard tracker needs tensorboard: pip install 'scpl-ds[tensorboard]'"
            ) from error
        folder = self.options.log_dir or self.run_dir / FOLDER
        if not self.resume and self.options.log_dir is None:
            for old in folder.glob("events.out.tfevents.*"):  # of a run that this one replaces
                old.unlink()
        self._writer = SummaryWriter(
            str(folder),
            purge_step=None if resumed_step is None else resumed_step + 1,
            flush_secs=math.ceil(self.options.flush_s),
        )
        if resumed_step is None:
            self._text("config", _block(config), 0)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, rows: Rows, step: int) -> None:
        self._text(name, _markdown(rows), step)

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        if self._writer is not None:
            self._text("summary", _block({**summary, "exit_code": exit_code}), 0)
            self._writer.close()
            self._writer = None

    def _text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)


def _markdown(rows: Rows) -> str:
    """As a table, which TensorBoard shows; a text's own marks and lines would break it."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _block(value: Any) -> str:
    """As a code block of the Markdown that TensorBoard shows."""
    lines = json.dumps(value, indent=2, ensure_ascii=False, default=str).split("\n")
    return "\n".join("    " + line for line in lines)
