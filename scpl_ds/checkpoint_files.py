"""The files of a checkpoint: written to the disk, renamed, and checked against their checksums."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save_file
from torch import Tensor

MANIFEST, LATEST = "manifest.json", "latest"
MODEL_FILES, OWN_FILES = "model", "deepspeed"
"""Folders in a checkpoint: what an export needs, and a backend's own files, which nobody here
reads."""
_CHUNK = 16 * 2**20
_SEAL = re.compile(rb',\n "checksum": "([0-9a-f]{16})"\n}\Z')


@dataclasses.dataclass(frozen=True)
class Written:
    """One file of a checkpoint as it lies on the disk."""

    name: str
    """Relative to the checkpoint's folder."""
    size: int
    checksum: str
    tensors: tuple[str, ...] = ()
    """Names of the tensors in it, in a safetensors file."""


def checksum(path: Path) -> str:
    """XXH3-64 of a file's bytes, as 16 hexadecimal digits."""
    digest = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def describe(path: Path, folder: Path, tensors: tuple[str, ...] = ()) -> Written:
    """What the manifest of ``folder`` says of one of its files."""
    name = path.relative_to(folder).as_posix()
    return Written(name, path.stat().st_size, checksum(path), tensors)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], folder: Path
) -> Written:
    """Write a safetensors file and see it onto the disk."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, metadata={"format": "pt", **metadata})
    path.chmod(0o644)  # safetensors writes 0600
    sync_file(path)
    return describe(path, folder, tuple(whole))


def copy_files(source: Path, target: Path, folder: Path) -> list[Written]:
    """Copy a folder into a checkpoint's ``folder`` and see it onto the disk."""
    shutil.copytree(source, target)
    copied = sorted(path for path in target.rglob("*") if path.is_file())
    for path in [*copied, target, *(path for path in target.rglob("*") if path.is_dir())]:
        sync_file(path)
    return [describe(path, folder) for path in copied]


def take_files(paths: Iterable[Path], folder: Path) -> list[Written]:
    """See files that somebody else wrote into a checkpoint's ``folder`` onto the disk."""
    found = sorted(paths)
    for path in (*found, *sorted({path.parent for path in found})):
        sync_file(path)
    return [describe(path, folder) for path in found]


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_file(path.parent)


def sync_file(path: Path) -> None:
    """Wait until what was written to a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems do not sync folders
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def replace_folder(folder: Path, new: Path) -> None:
    """Give ``new`` the name ``folder``; what had it before is kept aside until that is done."""
    old = aside(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where ``folder`` lies while another takes its name; a kill in that moment leaves it there."""
    return folder.with_name(f".{folder.name}.old")


# -- text that knows whether it was changed ------------------------------------------------


def seal(content: Mapping[str, Any]) -> str:
    """JSON whose last entry is the checksum of the text before it."""
    body = json.dumps(dict(content), indent=1).removesuffix("\n}")
    return f'{body},\n "checksum": "{xxhash.xxh3_64_hexdigest(body.encode())}"\n}}'


def unseal(data: bytes) -> bool | None:
    """Whether sealed JSON is as it was written; None: it bears no checksum."""
    found = _SEAL.search(data)
    if found is None:
        return None
    return xxhash.xxh3_64_hexdigest(data[: found.start()]) == found[1].decode()


def sealed_name(name: str) -> str:
    """A name and, in a line of its own, its checksum."""
    return f"{name}\n{xxhash.xxh3_64_hexdigest(name.encode())}"


def unsealed_name(data: bytes) -> str | None:
    """The name; None where it is not the one that was sealed. A line alone is anybody's own."""
    name, _, check = data.strip().partition(b"\n")
    torn = not check and re.search(rb"[0-9a-f]{16}\Z", name)  # the end of its line was changed
    changed = check and check != xxhash.xxh3_64_hexdigest(name).encode()
    if torn or changed or not name.strip():
        return None
    try:
        return name.decode().strip()
    except UnicodeDecodeError:
        return None


def share_out(sizes: Mapping[str, int], parts: int) -> dict[str, int]:
    """Which of ``parts`` gets which name, so that the largest part is small: the largest name goes
    first, to the part with the least so far."""
    load, owner = [0] * parts, {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner
