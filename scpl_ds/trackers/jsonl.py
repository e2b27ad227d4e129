"""``metrics.jsonl`` in the run folder: one JSON object a line, one line a logging step."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TextIO

from pydantic import BaseModel

from scpl_ds.trackers._base import Rows, Tracker, TrackerOptions

FILE_NAME = "metrics.jsonl"
TABLES_FILE = "tables.jsonl"


class JsonlOptions(TrackerOptions):
    """``{name: jsonl}`` has no options."""


class JsonlTracker(Tracker):
    """Appends ``{"step": 40, "time": 1700000000.123, "stage0/loss": 2.91, ...}``.

    Each line is on its way to the disk when ``log`` returns, so a killed run keeps its numbers.
    ``time`` is Unix time in seconds. NaN and infinity are written as ``null``: JSON has no other
    way, and a file that some readers refuse is worse.

    ``step`` never goes down within the file. A resumed run first drops what was written after the
    checkpoint it goes on from (and a line cut short by a kill); a run that is not resumed starts
    the file afresh.
    """

    Options: ClassVar[type[BaseModel]] = JsonlOptions
    _file: TextIO | None = None
    _cut_at_first_log = False

    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        del config, total_steps
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if not self.resume:
            for name in (FILE_NAME, TABLES_FILE):
                (self.run_dir / name).unlink(missing_ok=True)
        elif resumed_step is not None:
            self._drop_after(resumed_step)
        else:
            self._cut_at_first_log = True
        self._file = self._open()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._file is None:
            raise RuntimeError("JsonlTracker.log was called before start or after finish.")
        if self._cut_at_first_log:
            self._file.close()
            self._drop_after(step - 1)
            self._file = self._open()
            self._cut_at_first_log = False
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: _finite(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")

    def table(self, name: str, rows: Rows, step: int) -> None:
        with (self.run_dir / TABLES_FILE).open("a", encoding="utf-8") as file:
            for row in rows:
                line = {"step": step, "name": name, **row}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        del summary, exit_code
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        return (self.run_dir / FILE_NAME).open("a", buffering=1, encoding="utf-8")

    def _drop_after(self, step: int) -> None:
        """Keep the lines of steps up to ``step``; an old file is replaced in one move."""
        for name in (FILE_NAME, TABLES_FILE):
            if (path := self.run_dir / name).exists():
                _keep_until(path, step)


def _keep_until(path: Path, step: int) -> None:
    # Not splitlines(): a text may hold a line separator of Unicode's.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    kept = [line for line in lines if (at := _step_of(line)) is not None and at <= step]
    partial = path.with_suffix(".jsonl.tmp")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _step_of(line: str) -> int | None:
    """The step of a line, None for one that is not ours or was cut short."""
    try:
        row = json.loads(line)
        return int(row["step"])
    except (ValueError, TypeError, KeyError):
        return None
