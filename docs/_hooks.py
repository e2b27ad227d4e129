"""mkdocs: a page may link to any text file of the repository, as it may on a forge.

What lies outside docs/ and is linked to becomes a page ``repository/<path>``: Markdown as it is,
any other file as one block of code. A target that does not exist is left as it was, so that
mkdocs names it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")
_PART = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
_LANGUAGES = {".yaml": "yaml", ".sh": "bash", ".sbatch": "bash", ".py": "python", ".json": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/, and what any page links to there."""
    waiting = list(PAGES)
    for file in files.documentation_pages():
        waiting += _outside(f"docs/{file.src_uri}", (ROOT / "docs" / file.src_uri).read_text())
    while waiting:
        path = waiting.pop()
        name = _site_name(path)
        if files.get_file_from_path(name) is None:
            text = (ROOT / path).read_text()
            if path.endswith(".md"):
                waiting += _outside(path, text)
            else:
                kind = _LANGUAGES.get(Path(path).suffix, "text")
                text = f"# {path}\n\n````{kind}\n{text}````\n"
            files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to where the page is on the site."""
    here = _repository_path(page.file.src_uri)

    def site_link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        if not (ROOT / path).is_file():
            return match[0]
        target = posixpath.relpath(_site_name(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{target}{match[3]}"

    parts = _PART.split(markdown)  # every other one is a block of code
    return "".join(p if i % 2 else _LINK.sub(site_link, p) for i, p in enumerate(parts))


def _outside(page: str, text: str) -> Iterator[str]:
    """The files outside docs/ that a page of the repository links to."""
    for match in _LINK.finditer(_PART.sub("", text)):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), match[2]))
        if (ROOT / path).is_file() and not path.startswith(("docs/", "../")):
            yield path


def _site_name(path: str) -> str:
    """README.md -> repository/README.md; recipes/a.yaml -> repository/recipes/a.yaml.md."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def _repository_path(name: str) -> str:
    return name.removeprefix("repository/") if name.startswith("repository/") else f"docs/{name}"
