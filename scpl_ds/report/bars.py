"""Stacked bars, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from scpl_ds.report.markup import Html, el, join


class Part(NamedTuple):
    """A piece of a bar. ``look`` is a class of page.css."""

    name: str
    look: str
    share: float
    """Of the whole width."""
    words: str


def bar(label: str, parts: Iterable[Part], *, after: str = "") -> Html:
    """A line with its name in front and its numbers in it."""
    pieces = [
        el(
            "span",
            el("i", part.words),
            class_=f"part {part.look}",
            style=f"width:{100 * min(1.0, max(0.0, part.share)):.3f}%",
            title=f"{part.name}: {part.words}",
        )
        for part in parts
    ]
    return el(
        "div",
        el("span", label, class_="label"),
        el("span", *pieces, class_="bar"),
        el("span", after, class_="after"),
        class_="row",
    )


def legend(looks: Iterable[tuple[str, str]]) -> Html:
    """(name, look) of what the bars are made of."""
    keys = (el("span", el("i", class_=f"swatch {look}"), name) for name, look in looks)
    return el("p", join(*keys), class_="legend")


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], *, left: Iterable[int] = (0,)
) -> Html:
    """Columns to the right but ``left``; it scrolls by itself where it is too wide."""
    aligned = frozenset(left)

    def cells(name: str, values: Sequence[object]) -> Html:
        return join(
            *(
                el(
                    name,
                    v,
                    class_="left" if i in aligned else None,
                    scope="col" if name == "th" else None,
                )
                for i, v in enumerate(values)
            )
        )

    head = el("thead", el("tr", cells("th", header)))
    body = el("tbody", *(el("tr", cells("td", row)) for row in rows))
    return el("div", el("table", head, body), class_="scroll", tabindex="0")
