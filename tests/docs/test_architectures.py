"""The committed page of architectures is the one that the tested list gives."""

from __future__ import annotations

from pathlib import Path

from tests.support.architecture_table import render

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def test_the_page_of_architectures_is_what_the_tested_list_gives() -> None:
    assert PAGE.read_text() == render()
