"""A page taken apart by the standard library's parser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any, NamedTuple


class Tag(NamedTuple):
    name: str
    attributes: dict[str, str | None]


class Page(HTMLParser):
    """Tags, text that is shown (also what is folded away), scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[Tag] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words += data

    def named(self, tag: str) -> list[Tag]:
        return [each for each in self.tags if each.name == tag]

    def curves(self) -> dict[str, list[list[float | None]]]:
        """Points of every curve, by its name (of several alike the first)."""
        found: dict[str, Any] = {}
        for figure in self.named("figure"):
            for series in json.loads(figure.attributes["data-series"] or ""):
                found.setdefault(series["name"], series["points"])
        return found

    def loads(self) -> list[Tag]:
        """What a browser would fetch, go to or run: nothing but places in the page is allowed."""
        watched = ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "background")
        outside = ("img", "image", "iframe", "object", "embed", "link", "base", "form", "use")
        return [
            tag
            for tag in self.tags
            if tag.name in outside
            or any(name.startswith("on") for name in tag.attributes)
            or any(not (tag.attributes.get(n) or "#").startswith("#") for n in watched)
            or "url(" in (tag.attributes.get("style") or "")
        ]
