"""Every message that the troubleshooting page quotes is one that the code says."""

from __future__ import annotations

import ast
import re

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
QUOTED = re.findall(r"^### `(.+)`$", PAGE.read_text(), re.MULTILINE)


def texts() -> list[str]:
    """All strings of the package, f-strings with a mark where a value goes, and the scripts."""
    found = [path.read_text() for path in (ROOT / "launch").glob("*.sh")]
    for path in (ROOT / "scpl_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()


def said(quoted: str) -> bool:
    """Whether some text has the pieces between the dots in this order, a value between each."""
    pieces = [re.escape(piece.strip()) for piece in quoted.split("…")]
    pattern = re.compile(r"['\s]*\0.*?".join(pieces), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_in_the_code(quoted: str):
    assert said(quoted)


def test_a_message_that_nobody_says_would_be_found():
    assert not said("… pipeline ranks x … need … ranks, but WORLD_SIZE was …")
    assert len(QUOTED) > 25
