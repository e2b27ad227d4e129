"""HTML and SVG as text in which nothing that was read can be anything but text."""

from __future__ import annotations

import html
import re

_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""What HTML cannot hold, and halves of characters that no file can."""
_VOID = frozenset({"meta", "br"})


class Html(str):
    """Text that is HTML already. Made here only; every other ``str`` is escaped."""

    __slots__ = ()


def text(value: object) -> Html:
    """``value`` as HTML that shows it."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_NOT_TEXT.sub("�", str(value)), quote=True))


def join(*parts: object, by: str = "") -> Html:
    """The parts after each other; None is left out."""
    return Html(by.join(text(part) for part in parts if part is not None))


def el(name: str, /, *children: object, **attributes: object) -> Html:
    """``<name attributes>children</name>``. ``class_`` is ``class``, other underscores are hyphens;
    an attribute that is None is left out, True is its name alone."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written += f" {key.rstrip('_').replace('_', '-')}"
        written += "" if value is True else f'="{text(str(value))}"'
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")
