"""What a run folder holds, as far as it can be read; what cannot be read is missing, no error."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from scpl_ds import lock
from scpl_ds.errors import RecipeError
from scpl_ds.trackers._base import redact

Status = Literal["finished", "running", "stopped", "failed", "unfinished"]
Points = list[tuple[float, float | None]]
"""(step, value); None: it was NaN or infinite."""

_RECORD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) ([\w.]+): (.*)")
_STOPPED = re.compile(r"Stopped by .+? after step \d+ of \d+.*")
_LARGEST, _SMALLEST = 1e300, 1e-300
"""Of a number but 0: what the axes of a chart compute with it stays a number."""
_FAILURES = ("traceback of the error", "traceback of the failure")


class Said(NamedTuple):
    """One record of a log file, with its further lines."""

    at: str
    level: str
    logger: str
    words: str
    rank: int


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run folder. Everything in it is data of strangers: numbers are checked, secrets replaced
    as trackers do, and texts are for ``markup`` to escape."""

    path: Path

    @classmethod
    def open(cls, path: Path) -> RunFiles:
        """
        Raises:
            RecipeError: ``path`` is no run folder.
        """
        path = path.expanduser()
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(
                f"{path} is not a run folder (it has no recipe.yaml). `scpl-ds train RECIPE` makes "
                "one; name it as train.output_dir says, runs/<recipe> by default."
            )
        return cls(path)

    # -- files -----------------------------------------------------------------------------

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        try:
            found = yaml.safe_load(_text(self.path / "recipe.yaml"))
        except (yaml.YAMLError, ValueError, RecursionError):
            found = None
        return redact(found) if isinstance(found, dict) else {}

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What was known before the first step; empty in runs of before there was such a file."""
        return _mapping(self.path / "about.json")

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """Empty until the run has come to its end."""
        return _mapping(self.path / "result.json")

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        return list(_lines(self.path / "metrics.jsonl"))

    @functools.cached_property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of ``tables.jsonl`` by the table's name, but for the partition, which is in
        ``about`` too."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in _lines(self.path / "tables.jsonl"):
            if (name := row.get("name")) != "partition":
                found.setdefault(str(redact(name)), []).append(redact(row))
        return found

    @functools.cached_property
    def logs(self) -> list[Said]:
        """What all ranks said, rank by rank, in order."""
        found: list[Said] = []
        for path in (self.path / "logs").glob("rank*.log"):
            number = path.stem.removeprefix("rank")
            if number.isdecimal():
                found += _records(path, int(number))
        return sorted(found, key=lambda said: said.rank)

    # -- numbers ---------------------------------------------------------------------------

    @functools.cached_property
    def metrics(self) -> dict[str, Points]:
        """Every metric over the steps, by name."""
        found: dict[str, Points] = {}
        for row in self.rows:
            for name, value in row.items():
                if name not in ("step", "time") and (value is None or number(value) is not None):
                    found.setdefault(name, []).append((row["step"], number(value)))
        return found

    def last(self, name: str) -> float | None:
        """The last value of a metric that is a number."""
        values = [value for _, value in self.metrics.get(name, []) if value is not None]
        return values[-1] if values else None

    @property
    def steps(self) -> int:
        """Done, as far as is known."""
        done = number(self.result.get("steps"))
        return int(done if done is not None else max((r["step"] for r in self.rows), default=0))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """When, and after which step, it was begun or gone on with."""
        found = self.about.get("starts")
        found = found if isinstance(found, list) else []
        return [s for s in found if isinstance(s, dict) and number(s.get("step")) is not None]

    @property
    def seconds(self) -> float | None:
        """From the first start to the end, or to the last logged step: all that lies between."""
        begin = _unix(self.starts[0].get("at")) if self.starts else None
        times = [t for row in self.rows if (t := number(row.get("time"))) is not None]
        begin = begin if begin is not None else min(times, default=None)
        end = _unix(self.result.get("finished")) or max(times, default=None)
        return None if begin is None or end is None or end < begin else end - begin

    @property
    def predicted(self) -> dict[str, Any]:
        found = self.about.get("predicted")
        return found if isinstance(found, dict) else {}

    @property
    def predicted_memory(self) -> list[dict[str, Any]]:
        """Of each pipeline rank, as ``memory.RankMemory``; empty where it was not predicted."""
        memory = self.predicted.get("memory")
        found = memory.get("ranks") if isinstance(memory, dict) else None
        found = found if isinstance(found, list) else []
        return [r for r in found if isinstance(r, dict) and number(r.get("peak")) is not None]

    @property
    def measured_memory(self) -> list[float]:
        """Bytes at the peak of each rank; empty until the run has ended."""
        found = self.result.get("peak_memory_bytes")
        sizes = [number(size) for size in found] if isinstance(found, list) else []
        return [size for size in sizes if size is not None]

    @property
    def shares(self) -> list[dict[str, Any]]:
        """Where each rank's time went: of the whole run, or else of the last logged step."""
        found = self.result.get("time_shares")
        if isinstance(found, list) and found:
            return [each for each in found if isinstance(each, dict)]
        ranks: dict[int, dict[str, Any]] = {}
        for name in self.metrics:
            if place := re.fullmatch(r"perf/rank(\d{1,9})/(\w+)", name):
                each = ranks.setdefault(int(place[1]), {"rank": int(place[1]), "stages": []})
                each[place[2]] = self.last(name)
        return [ranks[rank] for rank in sorted(ranks)]

    @property
    def perplexed(self) -> bool:
        """Whether it is a language model, scored by perplexity."""
        return any(f"{p}_perplexity" in self.result for p in ("eval", "stage_eval")) or (
            "val/perplexity" in self.metrics
        )

    @property
    def score(self) -> float | None:
        """Of the export, or else of the last evaluation."""
        name = "perplexity" if self.perplexed else "accuracy"
        found = (number(self.result.get(f"{p}_{name}")) for p in ("eval", "stage_eval"))
        known = next((value for value in found if value is not None), None)
        return known if known is not None else self.last(f"val/{name}")

    @property
    def majority(self) -> float | None:
        for where in (self.result, self.about):
            if (value := number(where.get("majority_accuracy"))) is not None:
                return value
        return None

    # -- how it went -----------------------------------------------------------------------

    @functools.cached_property
    def status(self) -> tuple[Status, str]:
        """What became of it, and why as far as the logs say."""
        if self.result:
            return "finished", ""
        if lock.in_use(self.path):
            return "running", "This page shows what was there when it was made."
        begin = str(self.starts[-1].get("at", ""))[:19].replace("T", " ") if self.starts else ""
        now = [said for said in self.logs if said.at >= begin]
        for said in reversed([said for said in now if said.rank == 0]):
            if stopped := _STOPPED.match(said.words):
                return "stopped", stopped[0]
        for said in now:
            if said.level in ("ERROR", "CRITICAL"):
                return "failed", said.words
            if said.words.startswith(_FAILURES):
                return "failed", said.words.strip().splitlines()[-1]
        return "unfinished", (
            "It has no result.json, and its logs name no failure: it was killed, or interrupted."
        )

    @property
    def warnings(self) -> list[tuple[Said, list[int]]]:
        """Warnings and errors, the first of those that are alike, and the ranks that said so."""
        found: dict[str, tuple[Said, list[int]]] = {}
        for said in self.logs:
            if said.level in ("WARNING", "ERROR", "CRITICAL"):
                _, ranks = found.setdefault(said.words, (said, []))
                ranks += [] if said.rank in ranks else [said.rank]
        return sorted(found.values(), key=lambda each: each[0].at)

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        """``name, step, bytes, saved, marks``, oldest step first; of complete ones only."""
        latest = _text(self.path / "latest").split()[:1]
        best = Path(str(self.result.get("best_model_checkpoint", ""))).name
        found = []
        for manifest in self.path.glob("checkpoint-*/manifest.json"):
            name = manifest.parent.name
            step = name.removeprefix("checkpoint-")
            if step.isdecimal():
                files = [f.stat() for f in manifest.parent.rglob("*") if f.is_file()]
                saved = datetime.datetime.fromtimestamp(manifest.stat().st_mtime)
                marks = [*(["latest"] if name in latest else []), *(["best"] * (name == best))]
                found.append(
                    {
                        "name": name,
                        "step": int(step),
                        "bytes": sum(f.st_size for f in files),
                        "saved": f"{saved:%Y-%m-%d %H:%M:%S}",
                        "marks": marks,
                    }
                )
        return sorted(found, key=lambda each: each["step"])


def number(value: Any) -> float | None:
    """``value``, if it is a number that can be computed with; one next to nothing is 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not abs(value) < _LARGEST:  # also NaN, and whole numbers that no float can hold
        return None
    return value if abs(value) >= _SMALLEST else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return redact(found) if isinstance(found, Mapping) else {}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows with a step. Not splitlines(): a text may hold a line separator of Unicode's."""
    for line in _text(path).split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that is at work, or was killed
        if isinstance(row, dict) and (step := number(row.get("step"))) is not None:
            yield {**row, "step": step}


def _records(path: Path, rank: int) -> Iterator[Said]:
    parts: list[str] = []
    head: tuple[str, str, str] | None = None
    for line in _text(path).split("\n"):
        begun = _RECORD.match(line)
        if begun and head is not None:
            yield Said(*head, redact("\n".join(parts)).strip(), rank)
        if begun:
            head, parts = (begun[1], begun[2], begun[3]), [begun[4]]
        else:
            parts.append(line)
    if head is not None:
        yield Said(*head, redact("\n".join(parts)).strip(), rank)


def _unix(moment: Any) -> float | None:
    try:
        return datetime.datetime.strptime(str(moment), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None
