"""Whether the installed packages are those that scpl_ds asks for."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from scpl_ds.doctor_findings import Finding, ok, problem, warning

_NAME = "scpl-ds"
_EXTRAS = ("wandb", "tensorboard", "mlflow", "lora", "qlora", "plot", "demo")


class Asked(NamedTuple):
    """What this version of scpl_ds needs."""

    python: str
    packages: list[Requirement]
    extras: dict[str, list[Requirement]]


def asked() -> Asked:
    """From the repository's pyproject.toml where there is one: what an editable installation wrote
    down may be older."""
    path = Path(__file__).parents[1] / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
        if project.get("name") == _NAME:
            optional = project["optional-dependencies"]
            return Asked(
                project["requires-python"],
                [Requirement(text) for text in project["dependencies"]],
                {extra: [Requirement(text) for text in optional[extra]] for extra in _EXTRAS},
            )
    every = [Requirement(text) for text in importlib.metadata.requires(_NAME) or ()]
    return Asked(
        importlib.metadata.metadata(_NAME)["Requires-Python"],
        [one for one in every if one.marker is None or one.marker.evaluate({"extra": ""})],
        {
            extra: [r for r in every if r.marker and r.marker.evaluate({"extra": extra})]
            for extra in _EXTRAS
        },
    )


def check_packages(wanted: Asked | None = None) -> Iterator[Finding]:
    """Python, every package that is needed, and the extras that are there."""
    wanted = wanted or asked()
    python = platform.python_version()
    if SpecifierSet(wanted.python).contains(python, prereleases=True):
        yield ok("python", python)
    else:
        yield problem(
            "python", f"{python}, but {wanted.python} is needed", "install another Python"
        )
    good, bad = [], []
    for requirement in wanted.packages:
        found = _version(requirement.name)
        text = f"{requirement.name} {found or 'missing'}"
        (good if found and _fits(requirement, found) else bad).append((text, requirement))
    for text, requirement in bad:
        yield problem(
            "packages", f"{text}, needed: {requirement.specifier or 'any version'}",
            f"pip install '{requirement}'; the versions tested are in constraints.txt",
        )  # fmt: skip
    if good:
        yield ok("packages", ", ".join(text for text, _ in good))
    yield from _extras(wanted)


def _extras(wanted: Asked) -> Iterator[Finding]:
    there, absent = [], []
    for extra, requirements in wanted.extras.items():
        versions = {r.name: _version(r.name) for r in requirements}
        for requirement in requirements:
            found = versions[requirement.name]
            if found is not None and not _fits(requirement, found):
                yield warning(
                    "extras",
                    f"{requirement.name} {found}, [{extra}] needs {requirement.specifier}",
                    f"pip install '{requirement}'",
                )  # fmt: skip
        (there if all(versions.values()) else absent).append(extra)
    text = f"installed: {', '.join(there) or 'none'}"
    if absent:
        text += f"; not: {', '.join(absent)} (pip install '{_NAME}[{','.join(absent)}]')"
    yield ok("extras", text)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(requirement: Requirement, version: str) -> bool:
    return requirement.specifier.contains(version, prereleases=True)
