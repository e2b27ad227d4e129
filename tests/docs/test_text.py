"""What the documentation says about the code is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scpl_ds import cli_docs, schedules
from scpl_ds.schedules import bubble_fraction, one_f_one_b, render_both, simulate, stream
from tests.docs.pages import BLOCKS, PAGES, ROOT


def by_path(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md"])
def test_the_drawing_is_the_one_the_code_prints(page: str):
    drawings = [b.code for b in BLOCKS if b.page == page and "1F1B with backprop" in b.code]
    assert render_both(4, 4) + "\n" in drawings


def test_every_drawing_is_what_the_code_above_it_draws():
    drawn = []
    for path in PAGES:
        pattern = r"^<!-- drawn by: ([^\n]+) -->\n```text\n(.*?)^```$"
        for code, drawing in re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL):
            assert drawing == eval(code, vars(schedules)) + "\n", f"{path.name}: {code}"
            drawn.append(code)
    assert len(drawn) >= 3


def test_the_table_of_bubbles_is_the_simulated_one():
    def percent(slots: list[schedules.Slot]) -> str:
        return f"{bubble_fraction(slots):.1%}".replace("%", " %")

    text = (ROOT / "docs" / "choosing-stages.md").read_text()
    rows = re.findall(r"^\| K = (\d+), M = (\d+) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 12
    for k, m, found in rows:
        stages, micro_batches = int(k), int(m)
        slots = (
            simulate(one_f_one_b, stages, micro_batches, gradients_travel_back=True),
            simulate(stream, stages, micro_batches),
            simulate(stream, stages, 10 * micro_batches),
        )
        assert found == " | ".join(map(percent, slots)), (k, m)


def test_the_page_of_commands_is_current():
    assert (ROOT / "docs" / "cli.md").read_text() == cli_docs.build_page(), (
        "run: python -m scpl_ds.cli_docs docs/cli.md"
    )


def test_the_gallery_has_every_recipe():
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"(../recipes/{recipe.name})" in gallery, recipe.name


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_a_list_begins_after_an_empty_line(page: Path):
    """On the site it would be a part of the paragraph before it."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    before = ""
    for line in text.splitlines():
        if line.startswith("- "):
            assert not before or before.startswith(("- ", "  ")), f"{page.name}: {line}"
        before = line


def test_the_bubbles_in_the_readme_are_the_simulated_ones():
    backprop = simulate(one_f_one_b, 4, 8, gradients_travel_back=True)
    numbers = [
        f"{bubble_fraction(slots):.1%}".replace("%", " %")
        for slots in (backprop, simulate(stream, 4, 8), simulate(stream, 4, 80))
    ]
    (row,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("| bubble, 4 stages x 8 micro-batches")
    ]
    assert re.findall(r"[\d.]+ %", row) == numbers


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_links_inside_the_repository_lead_somewhere(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_recipes_scripts_and_sources_that_are_named_exist(page: Path):
    pattern = r"\b((?:recipes|launch|scpl_ds|tests|docs)/[\w./-]+\.(?:yaml|sh|py|md|json))\b"
    for name in re.findall(pattern, page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "index.md" or f"({name})" in index, name


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_every_row_of_a_table_has_the_cells_of_its_header(page: Path):
    """A row that is wrapped is not a row any more, and the rest of the table is lost with it."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    header: list[str] | None = None
    for line in text.splitlines():
        if not line.startswith("|"):
            assert header is None or not line, f"{page.name}: glued to a table: {line}"
            header = None
            continue
        assert line.endswith("|"), f"{page.name}: {line}"
        cells = re.split(r"(?<!\\)\|", line)[1:-1]
        header = header or cells
        assert len(cells) == len(header), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=by_path)
def test_no_number_is_still_to_be_measured(page: Path):
    assert "MEASURE" not in page.read_text()
