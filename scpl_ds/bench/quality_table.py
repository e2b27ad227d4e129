"""From trainings to the table and the plot of ``scpl-ds bench quality``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scpl_ds.errors import RecipeError

Row = dict[str, Any]
ONE_STAGE = ("bp", "untrained")
"""Methods that are run once, whatever the numbers of stages."""
Cell = tuple[str, int]


def selected(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to report, and all others.

    For every method and number of stages the learning rate with the best validation accuracy of the
    first seed is kept; its rows are reported, one a seed.
    """
    by_cell: dict[Cell, list[Row]] = {}
    for row in rows:
        by_cell.setdefault((row["method"], row["stages"]), []).append(row)
    chosen: list[Row] = []
    others: list[Row] = []
    for cell in by_cell.values():
        good = [row for row in cell if "error" not in row]
        first = min((row["seed"] for row in good), default=0)
        tried = [row for row in good if row["seed"] == first]
        best = best_of(tried)
        for row in cell:
            rate = None if best is None or "error" in row else best["learning_rate"]
            (chosen if row["learning_rate"] == rate else others).append(row)
    return sorted(chosen, key=_order), others


def best_of(rows: Sequence[Row]) -> Row | None:
    """The row with the best validation accuracy, or the lowest perplexity; of equal ones that with
    the middle rate: the centre of a plateau, which a few hundred validation samples often show."""
    best = max((_worth(row, "validation") for row in rows), default=None)
    equal = [row for row in rows if _worth(row, "validation") == best]
    equal.sort(key=lambda row: row["learning_rate"])
    return equal[(len(equal) - 1) // 2] if equal else None


def _worth(row: Row, split: str) -> float:
    """What is to be high: the accuracy, or the perplexity with a minus; what diverged is last."""
    name = f"{split}_perplexity"
    found = -row[name] if name in row else row[f"{split}_accuracy"]
    return found if math.isfinite(found) else -math.inf


def _order(row: Row) -> tuple[str, int, int]:
    return row["method"], row["stages"], row["seed"]


def cells(rows: Sequence[Row]) -> dict[Cell, list[Row]]:
    """Method and number of stages -> rows, one a seed."""
    found: dict[Cell, list[Row]] = {}
    for row in rows:
        found.setdefault((row["method"], row["stages"]), []).append(row)
    return found


def against_bp(rows: Sequence[Row], cell: Sequence[Row]) -> list[float]:
    """Test accuracy minus bp's of the same seed, one a seed that bp has; of language models by
    what share the perplexity is higher."""
    what = _what(rows)
    bp = {row["seed"]: row[f"test_{what}"] for row in rows if row["method"] == "bp"}
    pairs = [(row[f"test_{what}"], bp[row["seed"]]) for row in cell if row["seed"] in bp]
    if what == "perplexity":
        return [own / theirs - 1 for own, theirs in pairs]
    return [own - theirs for own, theirs in pairs]


def _what(rows: Sequence[Row]) -> str:
    return "perplexity" if any("test_perplexity" in row for row in rows) else "accuracy"


def render(rows: Sequence[Row]) -> str:
    """Markdown: test accuracy in percent or perplexity, mean and standard deviation over the seeds;
    against bp in points, or in percent of its perplexity."""
    what = _what(rows)
    speed = "tokens_per_s" if what == "perplexity" else "samples_per_s"
    also = list(dict.fromkeys(name for row in rows for name in row.get("also_perplexity", {})))
    heads = ["method", "stages", f"test {what}", "against bp", "validation", "learning rate"]
    heads += ["seeds", speed.replace("_per_", "/"), *(f"{name}: perplexity" for name in also)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    by_cell = cells(rows)
    sign = 1 if what == "perplexity" else -1
    best_first = sorted(
        by_cell, key=lambda cell: (cell[1], sign * _mean(by_cell[cell], f"test_{what}"))
    )
    for cell in best_first:
        own = by_cell[cell]
        gaps = against_bp(rows, own)
        others = [_spread([row["also_perplexity"][n] for row in own], ".2f", 1) for n in also]
        trained = cell[0] != "untrained"
        parts = [
            *(cell[0], str(cell[1]), spread(own, f"test_{what}")),
            _spread(gaps, "+.2f", 100) if gaps and cell[0] != "bp" else "-",
            spread(own, f"validation_{what}"),
            f"{own[0]['learning_rate']:g}" if trained else "-",
            str(len(own)),
            f"{_mean(own, speed):.0f}" if trained else "-",
            *others,
        ]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def spread(rows: Sequence[Row], key: str) -> str:
    """``85.21 ± 0.31``, accuracies in percent; the sample standard deviation, where there are two
    seeds."""
    return _spread([row[key] for row in rows], ".2f", 100 if key.endswith("accuracy") else 1)


def _spread(values: Sequence[float], form: str, factor: float) -> str:
    parts = [factor * value for value in values]
    deviation = f" ± {statistics.stdev(parts):.2f}" if len(parts) > 1 else ""
    return f"{statistics.fmean(parts):{form}}{deviation}"


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Test accuracy (or perplexity) against the number of stages, and against the seconds of a
    training.

    Raises:
        RecipeError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RecipeError(
            "--plot needs matplotlib, which is not installed: pip install 'scpl-ds[plot]'."
        ) from error
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_stages, by_time = figure.subplots(1, 2, sharey=True)
    by_cell, what = cells(rows), _what(rows)
    factor, unit = (100, ", %") if what == "accuracy" else (1, "")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = {k: by_cell[m, k] for m, k in by_cell if m == method}
        stages = sorted(own)
        means = [factor * _mean(own[k], f"test_{what}") for k in stages]
        seconds = [_mean(own[k], "seconds") for k in stages]
        colour = f"C{number % 10}"
        if method in ONE_STAGE:
            by_stages.axhline(means[0], color=colour, linestyle="--", label=method)
        else:
            by_stages.plot(stages, means, marker="o", color=colour, label=method)
        by_time.plot(seconds, means, marker="o", linestyle="none", color=colour, label=method)
        for k, *point in zip(stages, seconds, means, strict=True):
            by_time.annotate(str(k), point, textcoords="offset points", xytext=(5, 4))
    by_stages.set(xlabel="stages", ylabel=f"test {what}{unit}")
    by_stages.set_xticks(sorted({r["stages"] for r in rows if r["method"] not in ONE_STAGE}))
    by_time.set(xlabel="seconds of training in one process; numbers are stages")
    if rows:
        by_stages.legend(fontsize="small")
    try:
        figure.savefig(path.expanduser())
    except (OSError, ValueError) as error:
        raise RecipeError(f"--plot {path}: cannot be drawn: {error}") from error
