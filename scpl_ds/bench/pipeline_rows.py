"""From runs to the rows and tables of ``scpl-ds bench pipeline``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scpl_ds.bench.ranks import Report
from scpl_ds.bench.systems import Entry, Task
from scpl_ds.errors import RecipeError
from scpl_ds.schedules import bubble_fraction, gpipe, length, one_f_one_b, simulate
from scpl_ds.timeline import shares

Row = dict[str, Any]
MIB = 2**20
_1F1B = ("deepspeed-1f1b", "deepspeed-1f1b-zero1")
_ALONE = "stage-alone"
_QUIET_CORES, _WIDE = 0.2, 0.5
"""What other processes, and chance, may do to figures that are worth reading."""
_SIMULATED = {"torch-gpipe": gpipe, "torch-1f1b": one_f_one_b}


class Run(NamedTuple):
    """One run of one system."""

    steps: int
    reports: Sequence[Report]
    """Of every rank."""
    other_cpu_cores: float | None


def measured_row(name: str, entry: Entry, task: Task, runs: Sequence[Run]) -> Row:
    """The row of a system that ran; ``ratio_to_...`` come later, from :func:`add_ratios`."""
    rates = [_samples_per_s(entry, task, run) for run in runs]
    median = statistics.median(rates)
    others = [run.other_cpu_cores for run in runs if run.other_cpu_cores is not None]
    sent = [_bytes_a_step(run) for run in runs]
    row = {
        "system": name,
        "kind": entry.kind,
        "micro_batches": task.num_micro_batches,
        "samples_per_s": median,
        "tokens_per_s": median * task.sequence_length,
        "spread": (max(rates) - min(rates)) / median,
        "repeats": rates,
        "steps": runs[0].steps,
        "bubble": _bubble(runs) if entry.kind != "whole" else None,
        "peak_memory_bytes": max(r.peak_memory for run in runs for r in run.reports),
        "bytes_sent": None if None in sent else statistics.median(b for b in sent if b is not None),
        "other_cpu_cores": statistics.median(others) if others else None,
        "measured": True,
    }
    totals = [[run.reports[rank].totals for run in runs] for rank in range(len(runs[0].reports))]
    if entry.kind == "ours" and all(all(of_rank) for of_rank in totals):
        row["shares_by_rank"] = [shares(_sum(of_rank)) for of_rank in totals]
    return row


def error_row(name: str, micro_batches: int, error: str) -> Row:
    """The row of a system that did not get to the end."""
    return {"system": name, "micro_batches": micro_batches, "error": error}


def simulated_row(row: Row, task: Task) -> Row:
    """``row``, or if it is an error of a schedule with a name, what its drawing says: the same
    lengths, messages and optimizer free."""
    schedule = _SIMULATED.get(row["system"])
    refused = row.get("error", "").partition(": ")[2].startswith(RecipeError.__name__)
    if not refused or schedule is None or task.lengths is None:
        return row
    forward, backward = (seconds * task.micro_batch_size for seconds in task.lengths)
    slots = simulate(
        schedule,
        task.stages,
        task.num_micro_batches,
        forward=forward,
        backward=backward,
        gradients_travel_back=True,
    )
    rate = task.rows / length(slots)
    return {
        "system": row["system"],
        "kind": "pipeline",
        "micro_batches": task.num_micro_batches,
        "samples_per_s": rate,
        "tokens_per_s": rate * task.sequence_length,
        "repeats": [],
        "spread": None,
        "bubble": bubble_fraction(slots),
        "peak_memory_bytes": None,
        "bytes_sent": None,
        "measured": False,
        "why_simulated": row["error"],
    }


def add_ratios(rows: Sequence[Row]) -> None:
    """Put ``ratio_to_1f1b`` (the faster of DeepSpeed's two) and ``ratio_to_stage_alone`` into every
    row that has a figure; None where there is nothing to compare with."""
    by_name = {row["system"]: row for row in rows if "error" not in row}
    deepspeed = _best([by_name[name] for name in _1F1B if name in by_name])
    for row in rows:
        if "error" not in row:
            row["ratio_to_1f1b"] = ratio(row, deepspeed)
            row["ratio_to_stage_alone"] = ratio(row, by_name.get(_ALONE))


def ratio(row: Row | None, to: Row | None) -> float | None:
    """Median over the repeats of the ratio of two runs of the same repeat."""
    if row is None or to is None or "error" in row or "error" in to:
        return None
    if row["repeats"] and to["repeats"]:
        pairs = zip(row["repeats"], to["repeats"], strict=True)
        return statistics.median(a / b for a, b in pairs)
    return row["samples_per_s"] / to["samples_per_s"]


def summarise(rows: Sequence[Row]) -> Row:
    """What the streamed engine gains at one number of micro-batches.

    Keys: ``micro_batches``, ``scpl_stream`` (samples/s), and ``to_stage_alone``,
    ``to_deepspeed_1f1b`` (the better of its two settings, ``deepspeed_1f1b``), ``to_best_pipeline``
    (``best_pipeline`` names it), ``to_best_whole`` (``best_whole``: without stages) and
    ``to_authors``, ratios of paired repeats; None where a system
    is missing.
    """
    good = {row["system"]: row for row in rows if "error" not in row}
    ours = good.get("scpl-stream")
    deepspeed = _best([good[name] for name in _1F1B if name in good])
    best = _best([row for row in good.values() if row["kind"] == "pipeline"])
    whole = _best([row for row in good.values() if row["kind"] == "whole"])
    return {
        "micro_batches": rows[0]["micro_batches"],
        "scpl_stream": None if ours is None else ours["samples_per_s"],
        "to_stage_alone": ratio(ours, good.get(_ALONE)),
        "to_deepspeed_1f1b": ratio(ours, deepspeed),
        "deepspeed_1f1b": None if deepspeed is None else deepspeed["system"],
        "to_best_pipeline": ratio(ours, best),
        "best_pipeline": None if best is None else _name(best),
        "to_best_whole": ratio(ours, whole),
        "best_whole": None if whole is None else _name(whole),
        "to_authors": ratio(ours, good.get("authors")),
    }


def _best(rows: Sequence[Row]) -> Row | None:
    return max(rows, key=lambda row: row["samples_per_s"], default=None)


def _samples_per_s(entry: Entry, task: Task, run: Run) -> float:
    began, ended = ([getattr(r, key) for r in run.reports] for key in ("began", "ended"))
    if entry.alone:
        seconds = max(end - begin for begin, end in zip(began, ended, strict=True))
    else:
        seconds = max(ended) - min(began)
    return run.steps * task.rows / seconds


def _bubble(runs: Sequence[Run]) -> float | None:
    """Mean over ranks and runs of the share of time without forward, backward or step; gradient
    traffic among data-parallel ranks is in those."""
    totals = [report.totals for run in runs for report in run.reports]
    if not all(totals):
        return None
    busy = [t["forward"] + t["backward"] + t["step"] for t in totals]
    return statistics.mean(1 - b / t["total"] for b, t in zip(busy, totals, strict=True))


def _bytes_a_step(run: Run) -> float | None:
    sent = [report.bytes_sent for report in run.reports]
    return None if None in sent else sum(b for b in sent if b is not None) / run.steps


def _sum(totals: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(of_run[key] for of_run in totals) for key in totals[0]}


# -- words -----------------------------------------------------------------------------------

_HEAD = (
    "system", "M", "samples/s", "tokens/s", "spread", "bubble", "peak MiB", "sent MiB a step",
    "other cores", "vs DeepSpeed 1F1B", "vs stage alone",
)  # fmt: skip


def render(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; errors in words below it."""
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD))]
    notes: list[str] = []
    for row in rows:
        name, number = row["system"], row["micro_batches"]
        if "error" in row:
            lines.append(_line([name, number, "failed", *[""] * (len(_HEAD) - 3)]))
            notes.append(f"- {name}, M={number}: {_first_line(row['error'])}")
            continue
        if not row["measured"]:
            notes.append(f"- {name}, M={number}, is simulated: {_first_line(row['why_simulated'])}")
        cells = [
            _name(row),
            number,
            f"{row['samples_per_s']:.1f}",
            f"{row['tokens_per_s']:.0f}",
            _word(row.get("spread"), "{:.0%}"),
            _word(row.get("bubble"), "{:.1%}"),
            _word(row.get("peak_memory_bytes"), "{:.0f}", 1 / MIB),
            _word(row.get("bytes_sent"), "{:.2f}", 1 / MIB),
            _word(row.get("other_cpu_cores"), "{:.2f}"),
            _word(row["ratio_to_1f1b"], "{:.2f}"),
            _word(row["ratio_to_stage_alone"], "{:.3f}"),
        ]
        lines.append(_line(cells))
    others = max((row.get("other_cpu_cores") or 0.0 for row in rows), default=0.0)
    spread = max((row.get("spread") or 0.0 for row in rows), default=0.0)
    if others > _QUIET_CORES or spread > _WIDE:
        notes.append(
            f"- **Do not trust these figures:** other processes used up to {others:.1f} cores, and "
            f"runs of one system differ by up to {spread:.0%}. Measure again on a quiet machine."
        )
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def render_summary(summary: Sequence[Row]) -> str:
    """What the streamed engine gains, a line a number of micro-batches."""
    head = (
        "M", "scpl-stream samples/s", "/ stage alone", "/ DeepSpeed 1F1B", "/ best backprop "
        "pipeline", "/ best without stages", "/ authors' scheme",
    )  # fmt: skip
    lines = [_line(head), _line(["---"] * len(head))]
    for row in summary:
        cells = [
            row["micro_batches"],
            _word(row["scpl_stream"], "{:.1f}"),
            _word(row["to_stage_alone"], "{:.3f}"),
            _word(row["to_deepspeed_1f1b"], "{:.2f} (" + str(row["deepspeed_1f1b"]) + ")"),
            _word(row["to_best_pipeline"], "{:.2f} (" + str(row["best_pipeline"]) + ")"),
            _word(row["to_best_whole"], "{:.2f} (" + str(row["best_whole"]) + ")"),
            _word(row["to_authors"], "{:.2f}"),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _name(row: Row) -> str:
    return row["system"] if row["measured"] else f"{row['system']} (simulated)"


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _word(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else form.format(value * unit)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "no reason given"
