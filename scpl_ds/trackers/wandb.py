"""Weights & Biases: one run for all ranks, online or offline, that cannot hurt the training."""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, PositiveFloat

from scpl_ds.trackers._base import Artifact, Rows, Tracker, TrackerOptions
from scpl_ds.trackers._wandb_artifacts import Uploads

log = logging.getLogger(__name__)

ID_FILE = "wandb_run_id"
LAST_STEP_FILE = "wandb_last_step"
STEP_METRIC = "train/global_step"
DEFAULT_PROJECT = "scpl-ds"
_BEST = {
    "val/accuracy": "max",
    "val/token_accuracy": "max",
    "val/loss": "min",
    "val/perplexity": "min",
}
"""Of what the summary holds the best value too."""
_KEPT = {"end": ("model",), "checkpoint": ("model", "checkpoint")}
FLUSH_S = 30.0
"""After so many seconds wandb has written a row down. wandb 0.31 needs about 15, and a process
killed within them takes its rows along."""


class WandbOptions(TrackerOptions):
    """Options of ``{name: wandb}``. What is unset comes from wandb's own ``WANDB_*`` variables."""

    project: str | None = None
    """Project; unset: ``WANDB_PROJECT``, else ``scpl-ds``."""
    entity: str | None = None
    """User or team; unset: ``WANDB_ENTITY``, else the account's default."""
    run_name: str | None = None
    """Display name; unset: ``WANDB_NAME``, else ``train.run_name``, else the run folder's name."""
    run_id: str | None = None
    """Id of the run; unset: ``WANDB_RUN_ID``, else a new one, or on resume the one before."""
    group: str | None = None
    """Group of runs; unset: ``WANDB_RUN_GROUP``."""
    tags: tuple[str, ...] | None = None
    """Tags; unset: ``WANDB_TAGS``."""
    notes: str | None = None
    """A longer description; unset: ``WANDB_NOTES``."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """``offline`` writes into the run folder without touching the network, for ``wandb sync``
    later; unset: ``WANDB_MODE``, else ``online``."""
    init_timeout_s: PositiveFloat = Field(default=30.0, allow_inf_nan=False)
    """Seconds to wait for the server at the start; then the run goes on offline."""
    finish_timeout_s: PositiveFloat = Field(default=60.0, allow_inf_nan=False)
    """Seconds to wait at the end for tables and artifacts, and again for the rest; that can be sent
    later with ``wandb sync``."""
    log_model: Literal["end", "checkpoint", False] | None = None
    """``end``: the export as an artifact; ``checkpoint``: every checkpoint too; unset:
    ``WANDB_LOG_MODEL``, else neither."""
    system_metrics: bool = True
    """Let wandb sample GPU, CPU and memory use while online. Never sampled offline."""


class WandbTracker(Tracker):
    """One W&B run: every metric over one monotonic axis, ``train/global_step``.

    - The id is kept in ``wandb_run_id`` in the run folder; a resumed run goes on under the same id,
      and steps that were logged before the interruption are not logged twice (a resumed run gives
      the same numbers again).
    - ``online`` without an API key or without a reachable server becomes ``offline``, saying so
      once; nothing ever asks for input.
    - Neither source code, git remotes nor the command line are sent, only ``config``, metrics,
      tables and pictures, and with ``log_model`` the folders it names.

    Raises:
        ModuleNotFoundError: From ``start``, when wandb is not installed.
    """

    Options: ClassVar[type[BaseModel]] = WandbOptions

    def __init__(self, options: WandbOptions, *, run_dir: Path, resume: bool) -> None:
        super().__init__(options, run_dir=run_dir, resume=resume)
        self.options = options
        log_model = options.log_model
        if log_model is None:
            log_model = os.environ.get("WANDB_LOG_MODEL", "false").lower()
        self._kept = _KEPT.get(log_model or "false", ())
        self._run: Any = None
        self._uploads: Uploads
        self._online, self._folder = False, self.run_dir
        self._last_step = -1
        self._unsafe: deque[tuple[float, int]] = (
            deque()
        )  # (when, step) of rows wandb may still lose

    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        del total_steps, resumed_step
        mode = self.options.mode or _mode_from_environment()
        if mode == "disabled":
            return
        if mode == "offline":
            # wandb 0.31 reports its own usage even from an offline run, and waits for the answer.
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the wandb tracker needs wandb: pip install 'scpl-ds[wandb]'"
            ) from error

        self.run_dir.mkdir(parents=True, exist_ok=True)
        run_id = self._run_id()
        if self.resume:
            self._last_step = self._read_last_step()
        else:
            (self.run_dir / LAST_STEP_FILE).unlink(missing_ok=True)
        if mode == "online" and not self._logged_in(wandb):
            mode = "offline"
        self._run = self._init(wandb, mode, run_id, config)
        mode = "offline" if self._run.settings.mode == "offline" else "online"
        run_id = self._run.id  # another one where the caller had a run open already
        # Kept only now: an id that no run was opened under must not be resumed.
        (self.run_dir / ID_FILE).write_text(run_id + "\n", encoding="utf-8")
        self._define_metrics()
        self._online, self._folder = mode == "online", Path(self._run.settings.sync_dir)
        self._uploads = Uploads(self.run_dir / "wandb" / "artifacts", online=self._online)
        if mode == "offline":
            pattern = Path(self._run.settings.sync_dir).parent / f"offline-run-*-{run_id}"
            log.info("wandb run %s is offline; upload it with: wandb sync %s", run_id, pattern)
        else:
            log.info("wandb run %s: %s", run_id, self._run.url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._run is None or step < self._last_step:
            return
        self._last_step = step
        # No step= argument: wandb drops rows whose own step does not grow, without an error.
        self._run.log({**metrics, STEP_METRIC: step})
        now = time.monotonic()
        self._unsafe.append((now, step))
        while now - self._unsafe[0][0] > FLUSH_S:
            self._write_last_step(self._unsafe.popleft()[1])

    def picture(self, name: str, svg: Path) -> None:
        if self._run is None:
            return
        import wandb

        # As a page: wandb's own images are bitmaps.
        page = wandb.Html(svg.read_text(encoding="utf-8"), inject=False)
        self._run.log({name: page, STEP_METRIC: max(0, self._last_step)})

    def table(self, name: str, rows: Rows, step: int) -> None:
        if self._run is None or step < self._last_step or not rows:
            return
        import wandb

        columns: list[Any] = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
        run, row = self._run, {name: table, STEP_METRIC: step}
        if self._online:
            self._uploads.later(f"table {name}", lambda: run.log(row))
        else:
            run.log(row)

    def artifact(self, made: Artifact) -> None:
        if self._run is not None and made.kind in self._kept:
            self._uploads.add(self._run, made)

    def run_id(self) -> str | None:
        return None if self._run is None else self._run.id

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        if self._run is None:
            return
        run, self._run = self._run, None
        self._uploads.finish(self.options.finish_timeout_s, failed=exit_code != 0)
        began = time.monotonic()
        try:
            run.summary.update(dict(summary))
            run.finish(exit_code=exit_code)
        except Exception as error:  # wandb's own process may have crashed
            why = f"{type(error).__name__} {error}".strip()
        else:
            late = time.monotonic() - began >= self.options.finish_timeout_s
            why = f"not within finish_timeout_s {self.options.finish_timeout_s:g}" if late else ""
        if why and self._online:
            log.warning(
                "wandb has not confirmed the end of the run (%s). All of it is in %s; send it "
                "with: wandb sync --include-online %s",
                why, self._folder, self._folder,
            )  # fmt: skip
        elif why:
            log.warning("wandb could not end the offline run in %s: %s", self._folder, why)
        self._write_last_step(self._last_step)

    def _define_metrics(self) -> None:
        """W&B puts metrics with the same words before the ``/`` into one section of panels."""
        self._run.define_metric(STEP_METRIC, hidden=True)
        self._run.define_metric("*", step_metric=STEP_METRIC)
        self._run.define_metric("perf/rank*", step_metric=STEP_METRIC, hidden=True)
        for name, best in _BEST.items():
            self._run.define_metric(name, step_metric=STEP_METRIC, summary=f"last,{best}")

    def _init(self, wandb: Any, mode: str, run_id: str, config: Mapping[str, Any]) -> Any:
        """Open the run; an unreachable server makes it an offline one."""
        folder = Path(os.environ.get("WANDB_DIR") or self.run_dir)
        before = set(folder.glob(f"*wandb/run-*-{run_id}"))
        try:
            return self._open(wandb, mode, folder, run_id, config)
        except Exception as error:
            if mode == "offline":
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning("wandb is not reachable, so this run is written offline: %s", reason)
        wandb.teardown()  # or the id stays taken by the attempt that failed
        for empty in set(folder.glob(f"*wandb/run-*-{run_id}")) - before:
            shutil.rmtree(empty, ignore_errors=True)
        return self._open(wandb, "offline", folder, run_id, config)

    def _open(
        self, wandb: Any, mode: str, folder: Path, run_id: str, config: Mapping[str, Any]
    ) -> Any:
        o = self.options
        environment = os.environ
        return wandb.init(
            mode=mode,
            id=run_id,
            resume=environment.get("WANDB_RESUME") or ("allow" if self.resume else None),
            dir=str(folder),
            project=o.project or environment.get("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=o.entity,
            name=o.run_name
            or environment.get("WANDB_NAME")
            or self.run_name
            or self.run_dir.resolve().name,
            group=o.group,
            tags=o.tags,
            notes=o.notes,
            config=dict(config),
            allow_val_change=True,  # a resumed run may have a new max_steps
            settings=wandb.Settings(
                init_timeout=o.init_timeout_s,
                finish_timeout=o.finish_timeout_s,
                silent=True,
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # it holds the command line, which may hold a secret
                x_disable_stats=mode == "offline" or not o.system_metrics,
                x_disable_machine_info=mode == "offline" or not o.system_metrics,
            ),
        )

    @staticmethod
    def _logged_in(wandb: Any) -> bool:
        """Whether there is an API key; looks for one without asking the person or the server."""
        wandb.setup(settings=wandb.Settings(silent=True))
        if wandb.login(prompt=False, verify=False):
            return True
        log.warning(
            "wandb has no API key on this machine (or is set to offline), so this run is written "
            "offline. Run `wandb login` once to have the next one online."
        )
        return False

    def _run_id(self) -> str:
        given = self.options.run_id or os.environ.get("WANDB_RUN_ID")
        path = self.run_dir / ID_FILE
        before = path.read_text(encoding="utf-8").strip() if path.exists() else ""
        return given or (before if self.resume else "") or uuid.uuid4().hex[:8]

    def _write_last_step(self, step: int) -> None:
        (self.run_dir / LAST_STEP_FILE).write_text(f"{step}\n", encoding="utf-8")

    def _read_last_step(self) -> int:
        try:
            return int((self.run_dir / LAST_STEP_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return -1


def _mode_from_environment() -> str:
    """``WANDB_MODE`` in the three words this tracker knows; wandb's default is online."""
    mode = os.environ.get("WANDB_MODE", "online").lower()
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)
