"""Curves over the steps as SVG, with their numbers beside them for the page's script."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence

from scpl_ds.report.markup import Html, el
from scpl_ds.report.reading import Points

MOST_POINTS = 2000
"""Of one curve. Beyond, each bucket of steps is drawn by its lowest and its highest point."""
COLOURS, DASHES = 7, ("", "7 3", "2 3", "9 3 2 3")
_WIDTH, _HEIGHT = 400, 218
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 28
_LOG_FROM = 100
"""How often the lowest value goes into the highest before a curve is drawn on a log scale."""


@dataclasses.dataclass
class Series:
    """One curve. ``style``: which colour and dash; curves of one thing look the same everywhere."""

    name: str
    points: Points
    style: int = 0
    marks: bool = False
    """Draw the points too: there are few of them."""


@dataclasses.dataclass
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float


@dataclasses.dataclass
class Chart:
    """Curves that share an axis; those without points are left out."""

    title: str
    series: Sequence[Series]
    metric: str = ""
    """Its name in ``metrics.jsonl`` and the trackers, where the title does not say it."""
    unit: str = ""
    scale: float = 1.0
    """What values are multiplied by to be shown: 100 for percent."""
    levels: Sequence[Level] = ()
    may_be_log: bool = False
    from_zero: bool = False
    last_step: float = 0.0
    """Where the axis ends at least: charts beside each other have one."""
    resumed: Sequence[float] = ()
    """Steps after which the run was gone on with."""

    @property
    def values(self) -> list[float]:
        found = [v for s in self.series for _, v in s.points if v is not None]
        return [value * self.scale for value in found]


def draw(chart: Chart) -> Html | None:
    """A figure of ``chart``; None where it has nothing to show."""
    series = [s for s in chart.series if s.points]
    if not series:
        return None
    axes = _Axes(chart, series)
    inside = [*axes.grid()]
    for step in chart.resumed:
        x = f"{axes.x(step):.1f}"
        inside.append(
            el("line", el("title", f"gone on with after step {step:g}"), class_="resumed",
               x1=x, x2=x, y1=_TOP, y2=_HEIGHT - _BOTTOM)
        )  # fmt: skip
    for level in chart.levels:
        y = f"{axes.y(level.value * chart.scale):.1f}"
        inside += [
            el("line", class_="level", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y),
            el("text", level.name, class_="end", x=_WIDTH - _RIGHT, y=f"{float(y) - 4:.1f}"),
        ]
    for each in series:
        inside += _curve(each, axes, chart.scale)
    inside.append(el("line", class_="cursor", y1=_TOP, y2=_HEIGHT - _BOTTOM, hidden=True))
    picture = el(
        "svg", el("title", f"{chart.title}. {_in_words(series, chart)}"), *inside,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", data_left=_LEFT,
        data_width=_WIDTH, data_first=axes.first, data_last=axes.last,
        data_inner=_WIDTH - _LEFT - _RIGHT,
    )  # fmt: skip
    scale = " (log scale)" if axes.log else ""
    unit = f", {chart.unit}" if chart.unit else ""
    numbers = json.dumps(
        [{"name": s.name, "style": s.style, "points": thinned(s.points)} for s in series]
    )
    notes = [
        f"{s.name}: {len(s.points)} points, drawn by the extremes of each {bucket(s.points)}"
        for s in series
        if len(s.points) > MOST_POINTS
    ]
    return el(
        "figure",
        el(
            "figcaption",
            el("b", chart.title),
            f"{unit}{scale}",
            el("code", chart.metric) if chart.metric else None,
        ),
        picture,
        _legend(series),
        *(el("p", note, class_="note") for note in notes),
        class_="chart", data_series=numbers, data_scale=f"{chart.scale:g}", data_unit=chart.unit,
    )  # fmt: skip


def thinned(points: Points) -> Points:
    """At most ``MOST_POINTS``, of each bucket the lowest, the highest, and one that is no number;
    all where there are not more."""
    if len(points) <= MOST_POINTS:
        return points
    size, kept = bucket(points), []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        finite = [(v, i) for i, (_, v) in enumerate(part) if v is not None]
        lost = [i for i, (_, v) in enumerate(part) if v is None]
        chosen = {min(finite)[1], max(finite)[1]} if finite else set()
        kept += [part[i] for i in sorted(chosen | {*lost[:1]})]
    return kept


def bucket(points: Points) -> int:
    return math.ceil(len(points) / (MOST_POINTS // 3))


def show(value: float) -> str:
    """Four digits, as short as they can be: 12345 -> '12.3k'."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return re.sub(r"e([+-])0", r"e\1", f"{value:.4g}")


class _Axes:
    """Where a step and a value are on the picture."""

    def __init__(self, chart: Chart, series: Sequence[Series]) -> None:
        steps = [step for s in series for step, _ in s.points]
        self.first, self.last = min(0.0, *steps), max(chart.last_step, *steps)
        levels = [level.value * chart.scale for level in chart.levels]
        values = [*chart.values, *levels] or [0.0, 1.0]
        low, high = min(values), max(values)
        self.log = chart.may_be_log and low > 0 and high / low > _LOG_FROM
        if self.log:
            low, high = 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
            powers = range(round(math.log10(low)), round(math.log10(high)) + 1)
            self.ticks = [10.0**p for p in powers][:: 1 + len(powers) // 7]
        else:
            low = min(low, 0.0) if chart.from_zero else low
            room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
            low, high = (low if low == 0 and chart.from_zero else low - room), high + room
            self.ticks = _ticks(low, high, 5)
        self.low, self.high = low, high

    def x(self, step: float) -> float:
        share = (step - self.first) / ((self.last - self.first) or 1)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return _HEIGHT - _BOTTOM - (value - low) / ((high - low) or 1) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[Html]:
        parts: list[Html] = []
        for tick in self.ticks:
            y = self.y(tick)
            parts.append(
                el(
                    "line",
                    class_="grid",
                    x1=_LEFT,
                    x2=_WIDTH - _RIGHT,
                    y1=f"{y:.1f}",
                    y2=f"{y:.1f}",
                )
            )
            parts.append(el("text", show(tick), class_="end", x=_LEFT - 6, y=f"{y + 4:.1f}"))
        steps = [t for t in _ticks(self.first, self.last, 5) if t == int(t)] or [self.first]
        for step in steps:
            x = f"{self.x(step):.1f}"
            parts.append(el("text", show(step), class_="middle", x=x, y=_HEIGHT - 12))
        parts.append(el("text", "step", class_="end", x=_LEFT - 22, y=_HEIGHT - 12))
        return parts


def _curve(series: Series, axes: _Axes, scale: float) -> list[Html]:
    """The line, broken where a value was no number; such steps are marked at the bottom."""
    path, parts, lost, pen = "", [], [], "M"
    shown = thinned(series.points)
    look = f"c{series.style % COLOURS}"
    for step, value in shown:
        if value is None:
            lost.append(step)
            pen = "M"
            continue
        path += f"{pen}{axes.x(step):.1f} {axes.y(value * scale):.1f}"
        pen = "L"
    dash = DASHES[series.style % len(DASHES)] or None
    parts.append(el("path", class_=f"line {look}", d=path, stroke_dasharray=dash))
    alone = [p for i, p in enumerate(shown) if p[1] is not None and _is_alone(shown, i)]
    dots = [p for p in shown if p[1] is not None] if series.marks else alone
    for step, value in dots:
        assert value is not None
        x, y = f"{axes.x(step):.1f}", f"{axes.y(value * scale):.1f}"
        parts.append(el("circle", class_=f"dot {look}", cx=x, cy=y, r=3))
    for step in lost:
        words = f"{series.name} is NaN or infinite at step {step:g}"
        parts.append(
            el("text", el("title", words), "×", class_=f"lost {look}", x=f"{axes.x(step):.1f}",
               y=_HEIGHT - _BOTTOM)
        )  # fmt: skip
    return parts


def _is_alone(points: Points, at: int) -> bool:
    """Without a neighbour to draw a line to."""
    beside = [points[i] for i in (at - 1, at + 1) if 0 <= i < len(points)]
    return all(value is None for _, value in beside)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten between two numbers."""
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    size = next(m * power for m in (1, 2, 5, 10) if m * power >= (high - low) / count * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [round(n * size, 12) for n in range(first, last + 1)]


def _legend(series: Sequence[Series]) -> Html | None:
    if len(series) == 1:
        return None
    keys = (key(s.name, s.style, has_marks=s.marks) for s in series)
    return el("p", *keys, class_="legend")


def key(name: str, style: int, *, has_marks: bool = False) -> Html:
    """A name with a piece of its line."""
    dash, look = DASHES[style % len(DASHES)] or None, f"c{style % COLOURS}"
    line = el("path", class_=f"line {look}", d="M0 5H24", stroke_dasharray=dash)
    dot = el("circle", class_=f"dot {look}", cx=12, cy=5, r=3) if has_marks else None
    return el("span", el("svg", line, dot, viewBox="0 0 24 10", aria_hidden="true"), name)


def _in_words(series: Sequence[Series], chart: Chart) -> str:
    """For readers who do not see the picture."""
    said = []
    for each in series:
        values = [v * chart.scale for _, v in each.points if v is not None]
        if values:
            said.append(
                f"{each.name}: {show(values[0])} at first, {show(values[-1])} at last, between "
                f"{show(min(values))} and {show(max(values))}."
            )
        if lost := sum(value is None for _, value in each.points):
            said.append(f"{each.name}: NaN or infinite at {lost} logged steps.")
    return " ".join(said)
