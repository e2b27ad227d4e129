"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Any

from scpl_ds.errors import RecipeError, SaveError

log = logging.getLogger(__name__)

NAME = "run.lock"
_BEAT_S = 10.0
"""How often a running owner touches its lock; a lock of another machine that is not touched for
three times as long is nobody's."""


class RunLock:
    """``run.lock`` in a run folder: who trains there. Taken by the coordinating rank.

    It names host, process and the moment that the process began (process numbers come again), and
    where that number means something: the host's boot and namespace of process numbers, of which
    containers under one host name have their own. There, the lock of a process that has ended is
    taken over at once; one of anywhere else when nobody has touched it for ``3 * beat_s``: no two
    clocks are compared.
    """

    def __init__(self, folder: Path, *, beat_s: float = _BEAT_S) -> None:
        self._path, self._beat_s = folder / NAME, beat_s
        self._owner = {
            **_here(),
            "pid": os.getpid(),
            "began": _began(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._released = threading.Event()
        self._released.set()

    def check(self) -> None:
        """Refuse a folder that another run is training in.

        Raises:
            RecipeError: One is.
        """
        if (owner := _read(self._path)) is not None and self._lives(owner):
            raise self._taken(owner)

    def take(self) -> None:
        """Make this process the owner; the folder exists.

        Raises:
            RecipeError: Another run is training in it.
        """
        self.check()
        self._write()
        if self._released.is_set():
            self._released.clear()
            threading.Thread(target=self._beat, daemon=True).start()

    def _write(self) -> None:
        with self._path.open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # of two that find a lock nobody's, one is first
            owner = _parse(file)
            if owner is not None and owner["token"] != self._owner["token"]:
                if self._lives(owner):
                    raise self._taken(owner)
                log.warning(
                    "%s was left by process %s on %s, which has ended: taken over.",
                    self._path, owner["pid"], owner["host"],
                )  # fmt: skip
            file.seek(0)
            file.truncate()
            json.dump(self._owner, file)
            file.flush()
            os.fsync(file.fileno())

    def require(self) -> None:
        """Before a save, on every rank: refuse to go on where another run has taken over, which it
        does when this one was suspended or out of reach for too long. Nothing on ranks that did
        not take it.

        Raises:
            SaveError: The lock is another run's.
            RecipeError: It was removed, and another run has it by now.
        """
        if self._released.is_set():
            return
        owner = _read(self._path)
        if owner is None:  # removed by a person
            with contextlib.suppress(OSError):
                self._write()
        elif owner["token"] != self._owner["token"]:
            raise SaveError(
                f"{self._path} is that of another run by now: process {owner['pid']} on "
                f"{owner['host']}. It took over because process {self._owner['pid']} on "
                f"{self._owner['host']} did not touch its lock for {3 * self._beat_s:.0f} s: it "
                "was suspended, or the file system away. This run ends and saves nothing more, so "
                "as not to write into the other's folder."
            )

    def release(self) -> None:
        """Safe to call twice, or without having taken it."""
        self._released.set()
        if (owner := _read(self._path)) is not None and owner["token"] == self._owner["token"]:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(self._beat_s):
            owner = _read(self._path)
            if owner is not None and owner["token"] == self._owner["token"]:
                with contextlib.suppress(OSError):
                    os.utime(self._path)

    def _lives(self, owner: dict[str, Any]) -> bool:
        if owner["token"] == self._owner["token"]:
            return False
        if all(owner.get(key) == value for key, value in _here().items()):
            began = _began(owner["pid"])
            return began is not None and began == owner["began"]
        return self._is_touched()

    def _is_touched(self) -> bool:
        """Whether the owner, on another machine or in another container, is seen to be at work."""
        limit = 3 * self._beat_s
        log.warning(
            "%s is of another machine or container; waiting up to %.0f s to see whether it is "
            "still in use.",
            self._path, limit,
        )  # fmt: skip
        deadline, before = time.monotonic() + limit, _touched(self._path)
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_s / 4))
            if (now := _touched(self._path)) != before:
                return now is not None
        return False

    def _taken(self, owner: dict[str, Any]) -> RecipeError:
        return RecipeError(
            f"train.output_dir: {self._path.parent} is in use by another run: process "
            f"{owner['pid']} on {owner['host']}. Wait for it or end it, or name another folder. "
            f"(If that process is not a run, remove {self._path}.)"
        )


def in_use(folder: Path) -> bool:
    """Whether a run seems to be training in ``folder``; never waits. Of another machine's run it
    goes by how long ago the lock was touched, on this machine's clock."""
    path = folder / NAME
    owner, touched = _read(path), _touched(path)
    if owner is None or touched is None:
        return False
    if all(owner.get(key) == value for key, value in _here().items()):
        began = _began(owner["pid"])
        return began is not None and began == owner["began"]
    return time.time() - touched / 1e9 < 3 * _BEAT_S


def _here() -> dict[str, str | None]:
    """What must be the same for a process number to name the same process."""
    boot = pids = None
    with contextlib.suppress(OSError):  # not Linux: nothing but the host's name
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = str(Path("/proc/self/ns/pid").readlink())
    return {"host": socket.gethostname(), "boot": boot, "pids": pids}


def _began(pid: int) -> str | None:
    """When a process began, in the kernel's clock ticks; None: there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        with contextlib.suppress(PermissionError):  # not Linux: there is such a process
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return None
        return ""
    return None if fields[0] in "ZX" else fields[19]  # ended, and not yet reaped


def _touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open() as file:
            return _parse(file)
    except OSError:
        return None


def _parse(file: IO[str]) -> dict[str, Any] | None:
    """The owner that a lock names; None where it names none (killed while it was written)."""
    file.seek(0)
    try:
        found = json.load(file)
    except ValueError:
        return None
    known = isinstance(found, dict) and {"host", "pid", "began", "token"} <= found.keys()
    return found if known else None
