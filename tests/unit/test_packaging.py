"""The wheel and the source distribution, built without a network: what is in them."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import scpl_ds

ROOT = Path(__file__).parents[2]
NOT_SOURCE = (
    ".git",
    ".venv",
    "build",
    "dist",
    "runs",
    "wandb",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
)
PACKAGE = {str(p.relative_to(ROOT)) for p in (ROOT / "scpl_ds").rglob("*.py")}
PACKAGE |= {"scpl_ds/py.typed", "scpl_ds/report/page.css", "scpl_ds/report/page.js"}
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def build(kind: str, source: Path, out: Path) -> Path:
    """What pip does in its isolated environment, with the setuptools that is here."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clone = tmp_path_factory.mktemp("clone") / "repository"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return build("sdist", clone, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(source_distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the source distribution, so that nothing is in it that is only in a clone."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(source_distribution) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return build("wheel", unpacked, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_the_package_its_types_and_its_licence_and_nothing_else(wheel: Path):
    info = f"scpl_ds-{scpl_ds.__version__}.dist-info"
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == PACKAGE | {f"{info}/{name}" for name in about}
        for name in ("scpl_ds/cli.py", f"{info}/licenses/LICENSE"):
            assert (
                archive.read(name) == (ROOT / name.removeprefix(f"{info}/licenses/")).read_bytes()
            )


def test_the_wheel_needs_what_pyproject_says(wheel: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        about = email.message_from_bytes(archive.read(name))
    assert about["Version"] == project["version"] == scpl_ds.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about.get_all("Provides-Extra") == list(project["optional-dependencies"])
    needs = [need for need in about.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert len(needs) == len(project["dependencies"])


def test_the_command_of_the_wheel_runs_outside_the_repository(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "scpl_ds", "--version"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.stdout == f"scpl-ds {scpl_ds.__version__}\n", done.stderr


@pytest.mark.slow  # a minute: torch is copied
@pytest.mark.timeout(1200)
def test_the_wheel_installs_without_extras_and_its_commands_work(wheel: Path, tmp_path: Path):
    """As a user does it: an environment with nothing in it, the index, no clone beside it."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*command: str | Path) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=environ, text=True, check=True, stdout=subprocess.PIPE
        ).stdout

    run(sys.executable, "-m", "venv", "env")
    python, command = tmp_path / "env/bin/python", tmp_path / "env/bin/scpl-ds"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "torch", wheel)
    run(python, "-m", "pip", "check")
    assert run(python, "-m", "scpl_ds", "--version") == f"scpl-ds {scpl_ds.__version__}\n"
    assert "train" in run(command, "--help")
    assert '"scpl"' in run(command, "schema")
    found = run(python, "-c", "import scpl_ds; print(scpl_ds.Trainer, scpl_ds.__file__)")
    assert str(tmp_path) in found


def test_the_source_distribution_has_what_the_pages_name(source_distribution: Path):
    with tarfile.open(source_distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    beside = {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "mkdocs.yml", ".ci/run"}
    recipes = {str(p.relative_to(ROOT)) for p in (ROOT / "recipes").rglob("*.yaml")}
    scripts = {str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.sh")}
    pages = {str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")}
    wanted = PACKAGE | beside | recipes | scripts | pages | {"tests/unit/test_packaging.py"}
    assert wanted <= names, wanted - names
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs/")]


def test_the_changelog_is_not_ahead_of_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d[^\]]*)\]", text, re.MULTILINE)
    version = Version(scpl_ds.__version__)
    assert all(Version(found) <= version for found in released)
    assert scpl_ds.__version__ in released or "## [Unreleased]" in text
