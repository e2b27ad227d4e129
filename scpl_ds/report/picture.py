"""``profile/timeline.svg`` as a part of the page: only what a picture is made of is taken over."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from scpl_ds.report.markup import Html, el

_SVG = "{http://www.w3.org/2000/svg}"
_TAGS = frozenset({"svg", "g", "rect", "line", "text", "title", "style"})
_ATTRIBUTES = frozenset(
    {"viewBox", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "class", "role"}
)
_LARGEST = 4_000_000
"""Characters: ours have some ten thousand."""


def timeline(path: Path) -> Html | None:
    """The picture with its own style, which reaches nothing else; None where there is none, or what
    is there is no picture of ours."""
    try:
        source = path.read_text(encoding="utf-8")
        # A document type could define entities that grow without end; ours have none.
        if len(source) > _LARGEST or "<!DOCTYPE" in source or "<!ENTITY" in source:
            return None
        root = ET.fromstring(source)
    except (OSError, ValueError, ET.ParseError):
        return None
    if root.tag != f"{_SVG}svg":
        return None
    return el("div", el("template", _copied(root), shadowrootmode="open"), class_="timeline")


def _copied(node: ET.Element) -> Html | None:
    name = node.tag.removeprefix(_SVG)
    if name not in _TAGS:
        return None
    words = node.text or ""
    if name == "style":  # escaped, for in SVG its text is text; and it loads nothing
        words = "" if "@import" in words or "url(" in words else words
    kept = {key: value for key, value in node.attrib.items() if key in _ATTRIBUTES}
    if name == "svg":
        kept = {"viewBox": kept.get("viewBox", "0 0 1200 200"), "role": "img"}
    return el(name, words, *(_copied(child) for child in node), **kept)
