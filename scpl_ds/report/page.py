"""The page: one run with all its parts, or several beside each other."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scpl_ds import __version__
from scpl_ds.memory_sizes import show_size
from scpl_ds.recipe_files import write_output
from scpl_ds.recipe_words import method_in_words
from scpl_ds.report.bars import table
from scpl_ds.report.charts import draw, key, show
from scpl_ds.report.curves import shared_charts
from scpl_ds.report.differences import Difference, differences, in_words
from scpl_ds.report.markup import Html, el, join
from scpl_ds.report.reading import RunFiles, number
from scpl_ds.report.sections import all_of
from scpl_ds.trackers._base import redact

NAME = "report.html"
_LONGEST_LABEL = 48


class Fact(NamedTuple):
    """One number of the headline."""

    name: str
    value: str
    beside: str = ""


def write(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page of one or several runs; returns where.

    Raises:
        RecipeError: A folder is no run's, or the page cannot be written there.
    """
    runs = [RunFiles.open(folder) for folder in folders]
    target = out or runs[0].path / NAME
    page = one(runs[0]) if len(runs) == 1 else several(runs)
    write_output(target, page, key="--out")
    return target


def one(run: RunFiles) -> str:
    """The page of one run."""
    parts = [(anchor, title, content) for anchor, title, content in all_of(run) if content]
    links = (el("a", title, href=f"#{anchor}") for anchor, title, _ in parts)
    return _document(
        _name(run),
        _headline(run),
        el("nav", *links, aria_label="parts"),
        *(_section(*part) for part in parts),
    )


def several(runs: Sequence[RunFiles]) -> str:
    """Numbers and curves of all runs beside each other, then each run in full."""
    names, left = _names(runs), (0, 1, 2, 3)
    facts, apart = [_facts(run) for run in runs], differences(runs)
    own_words = in_words(apart) or [""] * len(runs)
    columns = list(dict.fromkeys(fact.name for each in facts for fact in each))
    rows = []
    for number_, (name, run, each) in enumerate(zip(names, runs, facts, strict=True)):
        own = {fact.name: fact for fact in each}
        cells = [own[c].value if c in own else "" for c in columns]
        method = el("span", _method(run), class_="said")
        differs = el("span", own_words[number_], class_="said")
        rows.append([key(name, number_), run.status[0], method, differs, *cells])
    labels = [
        f"{name} ({words})" if words and len(words) <= _LONGEST_LABEL else name
        for name, words in zip(names, own_words, strict=True)
    ]
    drawn = [draw(chart) for chart in shared_charts(list(zip(labels, runs, strict=True)))]
    head = ["run", "", "method", "what differs", *columns]
    return _document(
        f"{len(runs)} runs",
        el("header", el("h1", f"{len(runs)} runs beside each other")),
        _section("numbers", "Numbers", table(head, rows, left=left)),
        _section("differences", "Settings that differ", _settings(names, apart)),
        _section("curves", "Curves", el("div", *drawn, class_="charts")),
        *(
            el("details", el("summary", label), _headline(run),
               *(_section("", title, content) for _, title, content in all_of(run) if content),
               class_="run")
            for label, run in zip(labels, runs, strict=True)
        ),
    )  # fmt: skip


def _settings(names: Sequence[str], apart: Sequence[Difference]) -> Html:
    """A row for each setting in which the recipes are not all alike."""
    if not apart:
        return el("p", "None: the recipes are the same, but for names and folders.", class_="note")
    header = ["key", *(key(name, number_) for number_, name in enumerate(names))]
    rows = [
        [el("code", each.key), *(el("span", value, class_="said") for value in each.values)]
        for each in apart
    ]
    return table(header, rows, left=range(len(names) + 1))


def _section(anchor: str, title: str, content: Html | None) -> Html:
    return el("section", el("h2", title), content, id=anchor or None)


def _names(runs: Sequence[RunFiles]) -> list[str]:
    names = [_name(run) for run in runs]
    return [n if names.count(n) == 1 else str(r.path) for n, r in zip(names, runs, strict=True)]


def _name(run: RunFiles) -> str:
    train = run.recipe.get("train")
    own = train.get("run_name") if isinstance(train, dict) else None
    return redact(str(own or run.path.resolve().name))


def _method(run: RunFiles) -> str:
    """``scpl: supcon``."""
    scpl = run.recipe.get("scpl")
    return method_in_words(scpl if isinstance(scpl, dict) else {})


def _headline(run: RunFiles) -> Html:
    status, why = run.status
    model = run.recipe.get("model")
    model = model if isinstance(model, dict) else {}
    total, batch = number(run.about.get("total_steps")), run.about.get("batch")
    words = [
        str(model.get("name_or_path", "unknown model")),
        str(model.get("task", "")),
        _method(run),
    ]
    stages = run.about.get("partition")
    if isinstance(stages, list) and stages:
        words.append(
            f"{len(stages)} stages on {run.about.get('pipeline_ranks')} pipeline x "
            f"{run.about.get('data_parallel')} data-parallel ranks"
        )
    words.append(f"step {run.steps}" + ("" if total is None else f" of {total:g}"))
    if isinstance(batch, dict):
        words.append(
            f"batch {batch.get('global')} = {batch.get('micro')} x {batch.get('accumulation')} "
            f"accumulated x {run.about.get('data_parallel')}"
        )
    facts = (
        el("div", el("dt", f.name), el("dd", el("b", f.value), el("span", f.beside)))
        for f in _facts(run)
    )
    return el(
        "header",
        el("h1", _name(run), " ", el("span", status, class_=f"status {status}")),
        el("p", join(*(el("span", word) for word in words if word)), class_="what"),
        el("p", why, class_="missing") if why else None,
        el("dl", *facts, class_="facts"),
    )


def _facts(run: RunFiles) -> list[Fact]:
    """The numbers of the headline; one that is not known says so."""
    result, facts = run.result, []
    name = "Perplexity" if run.perplexed else "Accuracy"
    score, majority = run.score, run.majority
    if score is None:
        facts.append(Fact(name, "not evaluated", "train.eval_strategy"))
    elif run.perplexed:
        first = next((v for _, v in run.metrics.get("val/perplexity", []) if v is not None), None)
        facts.append(Fact(name, show(score), "" if first is None else f"first {show(first)}"))
    else:
        beside = "" if majority is None else f"majority class {majority:.1%}"
        facts.append(Fact(name, f"{score:.1%}", beside))
    loss, scored = run.last("head/loss"), run.last("val/loss")
    beside = "" if scored is None else f"validation {show(scored)}"
    facts.append(Fact("Task loss", "unknown" if loss is None else show(loss), beside))
    rate = number(result.get("tokens_per_s"))
    seen = "whole run" if rate is not None else "last logging step"
    rate = rate if rate is not None else run.last("perf/tokens_per_s")
    facts.append(Fact("Tokens/s", "unknown" if rate is None else show(rate), seen if rate else ""))
    whole, training = run.seconds, number(result.get("train_seconds"))
    beside = "" if training is None else f"training {_duration(training)}"
    facts.append(Fact("Time", "unknown" if whole is None else _duration(whole), beside))
    bubble, guess = number(result.get("bubble_fraction")), run.predicted.get("bubble_fraction")
    bubble = bubble if bubble is not None else run.last("perf/bubble_fraction")
    guess = "" if number(guess) is None else f"predicted {guess:.1%}"
    facts.append(Fact("Bubble", "unknown" if bubble is None else f"{bubble:.1%}", guess))
    peaks, guesses = run.measured_memory, [each["peak"] for each in run.predicted_memory]
    beside = f"predicted {show_size(int(max(guesses)))}" if guesses else ""
    known = show_size(int(max(peaks))) if peaks else "not known"
    return [*facts, Fact("Peak memory of a rank", known, beside)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _document(title: str, *body: object) -> str:
    """The whole file. Its policy lets it load nothing, and run no script but its own."""
    style, script = (_packaged(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    made = f"Made by scpl-ds {__version__} report, {time.strftime('%Y-%m-%d %H:%M:%S')}."
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title}, scpl-ds"),
        el("style", Html(style)),
    )
    content = el("body", el("main", *body), el("footer", made), el("script", Html(script)))
    return f"<!doctype html>\n{el('html', head, content, lang='en')}\n"


def _packaged(name: str) -> str:
    return importlib.resources.files("scpl_ds.report").joinpath(name).read_text(encoding="utf-8")
