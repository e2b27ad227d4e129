"""Folders of a run as W&B artifacts: summed and sent beside the training, never in its way."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from scpl_ds.trackers._base import Artifact

log = logging.getLogger(__name__)
_LOOK_S = 1
"""How long to wait, at each new artifact, for one that may be uploaded by now."""


class Uploads:
    """Hands artifacts to a run from a thread of its own.

    What is handed over is a second name (hard link) of every file, made at once: a checkpoint that
    is pruned, or an export that is replaced, takes nothing away from what is still to be sent, and
    costs no room while it stays. The links are in ``folder``: until they are uploaded or, of an
    offline run, for good, because ``wandb sync`` reads them.

    Args:
        folder: Made when it is needed; on the disk of what comes, or files are copied.
        online: There is a server, and so an end of an upload.
    """

    def __init__(self, folder: Path, *, online: bool) -> None:
        self._folder, self._online = folder.resolve(), online
        self._todo: queue.Queue[tuple[Any, Artifact, Path] | None] = queue.Queue()
        self._sent: list[tuple[Any, Path]] = []
        self._thread: threading.Thread | None = None

    def add(self, run: Any, made: Artifact) -> None:
        """Take ``made`` as it is now."""
        name = f"{made.kind}-{run.id}"
        links = self._folder / f"{name}-step-{made.step}"
        shutil.rmtree(links, ignore_errors=True)  # of an earlier save of that step
        links.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made.path, links, copy_function=_link)
        if self._thread is None:
            # A daemon: a server that never answers does not keep the process.
            self._thread = threading.Thread(target=self._work, name="wandb-artifacts", daemon=True)
            self._thread.start()
        self._todo.put((run, made, links))

    def finish(self, limit_s: float, *, failed: bool) -> None:
        """Give uploads at most so long; what has not arrived by then keeps its links. Summing, of
        which the end is certain, is waited for unless the run has ``failed``."""
        if self._thread is None:
            return
        self._todo.put(None)
        self._thread.join(limit_s if failed else None)
        end = time.monotonic() + limit_s
        if self._thread.is_alive():
            log.warning(
                "wandb: artifacts were still being summed when the run failed and are left out; "
                "their files are in %s.",
                self._folder,
            )  # fmt: skip
            return
        while self._sent and time.monotonic() < end:
            self._forget_uploaded()
        if self._sent:
            log.warning(
                "wandb: %d artifacts were not uploaded within finish_timeout_s %g; their files "
                "are kept in %s.",
                len(self._sent), limit_s, self._folder,
            )  # fmt: skip

    def _work(self) -> None:
        while (job := self._todo.get()) is not None:
            try:
                self._send(*job)
            except Exception as error:
                log.warning(
                    "wandb: %s of step %d could not be made an artifact: %s. Its files are in %s.",
                    job[1].kind, job[1].step, error, job[2],
                )  # fmt: skip
            if self._online:
                self._forget_uploaded()

    def _send(self, run: Any, made: Artifact, links: Path) -> None:
        import wandb

        artifact = wandb.Artifact(
            f"{made.kind}-{run.id}", type=made.kind, metadata={"step": made.step, **made.metadata}
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
