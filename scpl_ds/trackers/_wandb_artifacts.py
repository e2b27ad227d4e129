"""What W&B asks its service about before it takes it, tables and artifacts: in a thread of its own,
never in the training's way."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scpl_ds.trackers._base import Artifact

log = logging.getLogger(__name__)
_LOOK_S = 1
"""How long to wait, at each new artifact, for one that may be uploaded by now."""


class Uploads:
    """Hands tables and artifacts to a run, one after the other.

    wandb 0.31 asks the service at each of them, and waits: some 20 seconds for one that is silent.

    What is handed over as an artifact is a second name (hard link) of every file, made at once: a
    checkpoint that is pruned, or an export that is replaced, takes nothing away from what is still
    to be sent, and costs no room while it stays. The links are in ``folder``: until they are
    uploaded or, of an offline run, for good, because ``wandb sync`` reads them.

    Args:
        folder: Made when it is needed; on the disk of what comes, or files are copied.
        online: There is a server, and so an end of an upload.
    """

    def __init__(self, folder: Path, *, online: bool) -> None:
        self._folder, self._online = folder.resolve(), online
        self._todo: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._sent: list[tuple[Any, Path]] = []
        self._thread: threading.Thread | None = None
        self._warned = self._left_out = False

    def add(self, run: Any, made: Artifact) -> None:
        """Take ``made`` as it is now; where that cannot be, the run goes on without it."""
        name = f"{made.kind}-{run.id}-step-{made.step}"
        links = self._folder / name
        shutil.rmtree(links, ignore_errors=True)  # of an earlier save of that step
        try:
            links.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made.path, links, copy_function=_link)
        except OSError as error:  # no room for a copy, where there can be no links
            shutil.rmtree(links, ignore_errors=True)
            say = log.debug if self._left_out else log.warning
            say(
                "artifact %s is left out: %s could not be linked or copied to %s: %s. Make room "
                "there, or set log_model: false. All else is logged; this is said once.",
                name, made.path, links, _why(error),
            )  # fmt: skip
            self._left_out = True
            return
        self.later(f"artifact {name}", lambda: self._send(run, made, links))

    def later(self, what: str, work: Callable[[], None]) -> None:
        """Do ``work`` behind what is there already."""
        if self._thread is None:
            # A daemon: a server that never answers does not keep the process.
            self._thread = threading.Thread(target=self._work, name="wandb-uploads", daemon=True)
            self._thread.start()
        self._todo.put((what, work))

    def finish(self, limit_s: float, *, failed: bool) -> None:
        """Give what is left at most so long, of which artifacts keep their links. Without a server
        all comes to its end, and is waited for unless the run has ``failed``."""
        if self._thread is None:
            return
        self._todo.put(None)
        end = time.monotonic() + limit_s
        self._thread.join(limit_s if self._online or failed else None)
        while not self._thread.is_alive() and self._sent and time.monotonic() < end:
            self._forget_uploaded()
        if self._thread.is_alive() or self._sent:
            log.warning(
                "wandb did not get all tables and artifacts within finish_timeout_s %g. Tables are "
                "in tables.jsonl, the files of artifacts in %s.",
                limit_s, self._folder,
            )  # fmt: skip

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            what, work = job
            try:
                work()
            except Exception as error:
                say = log.debug if self._warned else log.warning
                say(
                    "wandb did not take %s: %s. Tables are in tables.jsonl, the files of artifacts "
                    "in %s; this is said once.",
                    what, error, self._folder,
                )  # fmt: skip
                self._warned = True
            if self._online:
                self._forget_uploaded()

    def _send(self, run: Any, made: Artifact, links: Path) -> None:
        import wandb

        artifact = wandb.Artifact(
            f"{made.kind}-{run.id}",
            type=made.kind,
            metadata={"step": made.step, **made.metadata},
        )
        for file in sorted(path for path in links.rglob("*") if path.is_file()):
            # Immutable: the links are nobody else's, so wandb need not copy them once more.
            name = file.relative_to(links).as_posix()
            artifact.add_file(str(file), name, policy="immutable", skip_cache=True)
        aliases = ["latest", f"step-{made.step}", *(["best"] if made.best else [])]
        logged = run.log_artifact(artifact, aliases=aliases)
        if self._online:
            self._sent.append((logged, links))

    def _forget_uploaded(self) -> None:
        """Remove the links of what has arrived."""
        for logged, links in list(self._sent):
            try:
                logged.wait(timeout=_LOOK_S)
            except Exception as error:  # also: it is not there yet
                log.debug("wandb: %s is not uploaded: %s", links.name, error)
                return
            self._sent.remove((logged, links))
            shutil.rmtree(links, ignore_errors=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def _why(error: OSError) -> str:
    """Of ``copytree``'s list of every file the first one's reason."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        return str(error.args[0][0][-1])
    return str(error)
