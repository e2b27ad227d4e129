"""The parts of the page of one run. A part without its files says what is missing and how to get
it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from scpl_ds.memory_sizes import show_size
from scpl_ds.report.bars import Part, bar, legend, table
from scpl_ds.report.charts import Chart, draw, show
from scpl_ds.report.curves import loss_charts, other_charts, speed_charts
from scpl_ds.report.markup import Html, el, join
from scpl_ds.report.picture import timeline
from scpl_ds.report.reading import RunFiles, number
from scpl_ds.trackers._base import redact

_MOST_ROWS, _MOST_WARNINGS, _MOST_RANKS = 60, 40, 256
_SHARES = (
    ("busy", "forward and backward"), ("optimizer", "optimizer step"),
    ("wait_input", "waiting for input"), ("wait_send", "packing, waiting to send"),
    ("wait_sync", "waiting for all"), ("data", "data"), ("other", "other"),
)  # fmt: skip
_MEMORY = (
    "parameters", "gradients", "optimizer", "activations", "head", "boundary", "buffers", "host",
)  # fmt: skip


def curves(run: RunFiles) -> Html:
    if not run.rows:
        return _missing(
            "There is no metrics.jsonl with a line in it: the run has not come to its first "
            "logging step (train.logging_steps)."
        )
    notes: list[Html] = []
    if not any(name.startswith("val/") for name in run.metrics):
        notes.append(
            _missing(
                "Nothing was evaluated yet. It needs evaluation data (data.eval_file, "
                "data.eval_fraction or data.eval_split) and train.eval_strategy: steps or epoch."
            )
        )
    return join(_grid(loss_charts(run)), *notes, _more("Other metrics", other_charts(run)))


def speed(run: RunFiles) -> Html:
    charts = _grid(speed_charts(run))
    return charts if charts else _missing("No throughput has been logged yet.")


def time_shares(run: RunFiles) -> Html:
    """A stacked bar a rank, and the bubble beside what was predicted."""
    ranks = run.shares
    if not ranks:
        return _missing(
            "Not known yet: each rank's shares come with the first logging step of a run with up "
            "to 16 ranks, and with result.json when it ends."
        )
    lines, rows = [], []
    for each in ranks:
        name = f"rank {_short(each.get('rank', '?'))}"
        stages = each.get("stages")
        held = ", ".join(map(_short, stages)) if isinstance(stages, list) else ""
        found = {what: number(each.get(what)) or 0.0 for what, _ in _SHARES}
        parts = [Part(words, what, found[what], _percent(found[what])) for what, words in _SHARES]
        bubble = _percent(number(each.get("bubble_fraction")))
        lines.append(bar(name, parts, after=f"bubble {bubble}"))
        rows.append([name, held, *(_percent(found[what]) for what, _ in _SHARES), bubble])
    over = (
        "Of the whole run, without evaluating and saving."
        if run.result.get("time_shares")
        else "Of the last logging step: the totals come when the run ends."
    )
    header = ["rank", "stages", *(words for _, words in _SHARES), "bubble"]
    guess, steps = number(run.predicted.get("bubble_fraction")), run.predicted.get("steps")
    predicted = (
        "The bubble was not predicted."
        if guess is None
        else f"Predicted bubble: {_percent(guess)} ({_short(steps)} steps simulated, stages as "
        "long as their FLOPs or measured times)."
    )
    return join(
        el("p", f"{over} Bubble: the three kinds of waiting together. {predicted}"),
        legend((words, what) for what, words in _SHARES),
        el("div", *lines, class_="bars"),
        el("details", el("summary", "Numbers"), table(header, rows, left=(0, 1))),
    )


def memory(run: RunFiles) -> Html:
    """Predicted and measured peak of each rank, on one scale."""
    guesses, found = run.predicted_memory, run.measured_memory
    if not guesses and not found:
        note = run.predicted.get("memory")
        why = note.get("note") if isinstance(note, dict) else None
        return _missing(
            f"Neither predicted nor measured{f' ({_short(why)})' if why else ''}. Each rank's peak "
            "is in result.json when a run ends; `scpl-ds plan RECIPE` predicts it."
        )
    per_stage = max(1, int(number(run.about.get("data_parallel")) or 1))
    most = max([*found, *(each["peak"] for each in guesses)]) or 1
    ranks = max(len(found), len(guesses) * per_stage)
    lines: list[Html] = []
    for rank in range(min(ranks, _MOST_RANKS)):
        guess = guesses[rank // per_stage] if rank // per_stage < len(guesses) else None
        if guess is not None:
            between = number(guess.get("resident")) or 0.0
            parts = [
                Part("between steps", "resident", between / most, show_size(int(between))),
                Part("more in a step", "working", (guess["peak"] - between) / most,
                     show_size(int(guess["peak"] - between))),
            ]  # fmt: skip
            size = show_size(int(guess["peak"]))
            lines.append(bar(f"rank {rank} predicted", parts, after=size))
        if rank < len(found):
            size = show_size(int(found[rank]))
            part = Part("measured", "measured", found[rank] / most, size)
            lines.append(bar(f"rank {rank} measured", [part], after=size))
    notes = []
    before = number(run.about.get("memory_before_model_bytes"))
    if before is not None and run.about.get("device") == "cpu":
        notes.append(
            el("p", f"Neither has the {show_size(int(before))} that Python and libraries took "
               "before the model; the curve of a process over the steps has them.", class_="note")
        )  # fmt: skip
    if ranks > _MOST_RANKS:
        notes.append(el("p", f"{ranks - _MOST_RANKS} more ranks.", class_="note"))
    if not found:
        notes.append(_missing("Measured peaks of each rank come with the end of the run."))
    elif run.about.get("device") == "cpu":
        notes.append(
            el("p", "Measured without a GPU is the resident set, in which the C library keeps "
               "freed blocks: more than what is alive (docs/memory.md).", class_="note")
        )  # fmt: skip
    rows = [
        [f"rank {_short(each.get('rank', '?'))}",
         *(show_size(int(number(each.get(part)) or 0)) for part in (*_MEMORY, "resident", "peak"))]
        for each in guesses
    ]  # fmt: skip
    header = ["pipeline rank", *_MEMORY, "between steps", "peak"]
    looks = [("predicted, between steps", "resident"), ("predicted, more in a step", "working")]
    return join(
        legend([*looks, ("measured", "measured")]),
        el("div", *lines, class_="bars wide"),
        *notes,
        el("details", el("summary", "What was predicted"), table(header, rows)) if rows else None,
    )


def pipeline(run: RunFiles) -> Html:
    """The profile's picture."""
    picture = timeline(run.path / "profile" / "timeline.svg")
    if picture is None:
        return _missing(
            "The run was not profiled, or was interrupted: train.profile=true writes the timeline "
            "of a few steps after the last one."
        )
    return join(
        el("p", "A few steps from the middle of those profiled; the boxes say step and "
           "micro-batch, and how long when pointed at. All of them: open profile/trace.json of "
           "the run in ui.perfetto.dev."),
        el("div", picture, class_="scroll", tabindex="0"),
    )  # fmt: skip


def partition(run: RunFiles) -> Html:
    rows = run.about.get("partition")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    plan = _file(run, "plan.txt")
    whole = el("details", el("summary", "Start banner"), el("pre", plan)) if plan else None
    if not rows:
        return join(_missing("There is no about.json: the run is of an earlier version."), whole)
    total = sum(number(row.get("parameters")) or 0 for row in rows)
    timed = any("seconds" in row for row in rows)
    header = ["stage", "layers", "holds", "parameters", "forward FLOPs", "share", "ranks"]
    cells = [
        [_short(row.get("stage")), _short(row.get("layers")), _short(row.get("holds")),
         show(number(row.get("parameters")) or 0), show(number(row.get("flops")) or 0),
         _percent(number(row.get("flops_share"))), _short(row.get("ranks")),
         *([f"{1e3 * (number(row.get('seconds')) or 0):.3g} ms"] if timed else [])]
        for row in rows
    ]  # fmt: skip
    words = (
        f"{_short(run.about.get('model_type'))}, {len(rows)} stage{'s' * (len(rows) != 1)}, cut by "
        f"{_short(run.about.get('cut_by'))}, {show(total)} parameters."
    )
    columns = [*header, *(["time"] if timed else [])]
    return join(el("p", words), table(columns, cells, left=(0, 1, 2)), whole)


def answers(run: RunFiles) -> Html | None:
    """What the model wrote and answered while it learned, table by table; None where that is
    nothing to expect."""
    if not run.tables:
        if not run.perplexed:
            return None
        return _missing("No samples: train.sample_prompts names prompts to go on with.")
    return join(*(_rows(name, rows) for name, rows in run.tables.items()))


def _rows(name: str, found: Sequence[dict[str, Any]]) -> Html:
    """The last rows of a table of the trackers, the latest first."""
    shown = found[-_MOST_ROWS:]
    keys = dict.fromkeys(key for row in shown for key in row)
    columns = [key for key in keys if key not in ("step", "name")]
    rows = [[show(row["step"]), *(_cell(row.get(c, "")) for c in columns)] for row in shown[::-1]]
    left = len(found) - len(shown)
    return join(
        el("h3", _short(name).capitalize()),
        table(["step", *columns], rows, left=range(len(columns) + 1)),
        el("p", f"{left} earlier ones are in tables.jsonl.", class_="note") if left else None,
    )


def _cell(value: Any) -> str:
    known = number(value)
    return el("q", _short(value, 2000)) if known is None else show(known)


def checkpoints(run: RunFiles) -> Html:
    found = run.checkpoints
    if not found:
        return _missing("None. train.save_strategy: steps or epoch writes them.")
    rows = [
        [c["name"], ", ".join(c["marks"]), c["saved"], show_size(c["bytes"])]
        for c in found
    ]  # fmt: skip
    export = run.result.get("export_dir")
    return join(
        table(["folder", "", "saved", "size"], rows, left=(0, 1, 2)),
        el("p", f"Exported for transformers: {export}", class_="note") if export else None,
    )


def warnings(run: RunFiles) -> Html:
    found = run.warnings
    if not found:
        return el("p", "None in the logs." if run.logs else "There are no logs.", class_="note")
    rows = []
    for said, ranks in found[:_MOST_WARNINGS]:
        who = ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
        words = el("span", _short(said.words, 2000), class_="said")
        rows.append([said.at, said.level.lower(), who, words])
    left = len(found) - _MOST_WARNINGS
    return join(
        table(["first at", "", "ranks", "what"], rows, left=(0, 1, 2, 3)),
        el("p", f"{left} more are in logs/.", class_="note") if left > 0 else None,
    )


def recipe(run: RunFiles) -> Html:
    if not run.recipe:
        return _missing("recipe.yaml cannot be read.")
    words = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
    return el("details", el("summary", "recipe.yaml, every key"), el("pre", words))


def environment(run: RunFiles) -> Html:
    machine, versions = (
        found if isinstance(found := run.about.get(key), dict) else {}
        for key in ("machine", "versions")
    )
    if not machine and not versions:
        return _missing("There is no about.json: the run is of an earlier version.")
    size = number(machine.get("memory_bytes"))
    known = {
        "device": machine.get("device"),
        "ranks": run.about.get("ranks"),
        "processor of rank 0": machine.get("cpu"),
        "cores": machine.get("cores"),
        "memory": None if size is None else show_size(int(size)),
        "Python": machine.get("python"),
        **versions,
        "recipe fingerprint": run.about.get("fingerprint"),
    }
    starts = [f"{_short(s.get('at'))} after step {s['step']:g}" for s in run.starts]
    known["started"] = "; ".join(starts)
    pairs = [(el("dt", key), el("dd", _short(v))) for key, v in known.items() if v is not None]
    return el("dl", *(part for pair in pairs for part in pair))


def _grid(charts: Sequence[Chart]) -> Html:
    drawn = [figure for chart in charts if (figure := draw(chart)) is not None]
    return el("div", *drawn, class_="charts") if drawn else Html("")


def _more(title: str, charts: Sequence[Chart]) -> Html | None:
    drawn = _grid(charts)
    return el("details", el("summary", title), drawn) if drawn else None


def _missing(words: str) -> Html:
    return el("p", words, class_="missing")


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _short(value: Any, most: int = 200) -> str:
    """Whatever was read, as so many characters."""
    words = str(value)
    return words if len(words) <= most else words[: most - 3] + "..."


def _file(run: RunFiles, name: str) -> str:
    try:
        found = (run.path / name).read_text(encoding="utf-8", errors="replace")
        return redact(found.strip())
    except OSError:
        return ""


def all_of(run: RunFiles) -> Iterable[tuple[str, str, Html | None]]:
    """``(anchor, title, content)``, in the order of the page; without content it is left out."""
    yield "curves", "How it learned", curves(run)
    yield "speed", "Throughput, memory and waiting", speed(run)
    yield "time", "Where the time went", time_shares(run)
    yield "timeline", "Pipeline timeline", pipeline(run)
    yield "memory", "Peak memory by rank", memory(run)
    yield "partition", "Stages", partition(run)
    yield "samples", "Samples and predictions", answers(run)
    yield "checkpoints", "Checkpoints", checkpoints(run)
    yield "warnings", "Warnings", warnings(run)
    yield "recipe", "Recipe", recipe(run)
    yield "environment", "Environment", environment(run)
