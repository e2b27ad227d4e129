"""The pages as a site: built strictly, every link leads somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import pytest

import scpl_ds
from tests.docs.pages import ROOT

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(HTMLParser):
    """What a page of the site links to, loads, and can be linked to at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.in_nav: list[str] = []
        self._depth = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self._depth += tag == "nav" and "md-nav--primary" in found.get("class", "")
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
            if self._depth:
                self.in_nav.append(found["href"])
        if tag in LOADED and found.get("rel") != "canonical" and LOADED[tag] in found:
            self.loaded.append(found[LOADED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, text=True, timeout=200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout, done.stdout
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    return {
        str(path.relative_to(site)): Page(path.read_text())
        for path in site.rglob("*.html")
        if path.name != "404.html"  # its links start at the root of a server
    }


def resolve(here: str, link: str) -> tuple[str, str]:
    """The file of the site and the anchor that a link leads to."""
    parts = urllib.parse.urlsplit(urllib.parse.unquote(link))
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), parts.path))
    if not parts.path:
        path = here
    elif parts.path.endswith("/") or path in (".", "") or "." not in posixpath.basename(path):
        path = posixpath.normpath(posixpath.join(path, "index.html"))
    return path, parts.fragment


def test_links_and_anchors_of_the_site_lead_somewhere(site: Path, pages: dict[str, Page]):
    followed = 0
    for here, page in pages.items():
        for link in page.links:
            if link.startswith(("http://", "https://", "mailto:")):
                continue
            path, anchor = resolve(here, link)
            assert (site / path).is_file(), f"{here}: {link}"
            if anchor and path in pages:
                assert anchor in pages[path].anchors, f"{here}: {link}"
            followed += 1
    assert followed > 1000


def test_the_site_loads_nothing_from_elsewhere(site: Path, pages: dict[str, Page]):
    for here, page in pages.items():
        assert page.loaded
        for link in page.loaded:
            assert not link.startswith(("http://", "https://", "//")), f"{here}: {link}"
            assert (site / resolve(here, link)[0]).is_file(), f"{here}: {link}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


def test_every_page_of_the_docs_is_in_the_navigation(pages: dict[str, Page]):
    listed = {resolve("index.html", link)[0] for link in pages["index.html"].in_nav}
    for path in (ROOT / "docs").rglob("*.md"):
        name = path.relative_to(ROOT / "docs").with_suffix("")
        home = "index.html" if str(name) == "index" else f"{name}/index.html"
        assert home in listed, f"add {name}.md to nav in mkdocs.yml"


def test_the_search_knows_every_page(site: Path):
    index = json.loads((site / "search" / "search_index.json").read_text())
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"", "recipe/", "troubleshooting/", "repository/launch/"} <= found
    assert list(site.glob("assets/javascripts/workers/search*.js"))


def test_the_python_reference_has_every_public_name(pages: dict[str, Page]):
    anchors = pages["api/index.html"].anchors
    assert {*scpl_ds._HOME, "__version__"} == set(scpl_ds.__all__)
    for name, home in scpl_ds._HOME.items():
        assert f"{home}.{name}" in anchors, f"{home}.{name}"
    for method in (
        "train_batch",
        "eval_batch",
        "save_checkpoint",
        "load_checkpoint",
        "reduce_loss",
    ):
        assert f"scpl_ds.engine.Engine.{method}" in anchors
