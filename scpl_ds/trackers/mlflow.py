"""MLflow: one run, on a tracking server or in a file of the run folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field

from scpl_ds.trackers._base import Artifact, Rows, Tracker, TrackerOptions

log = logging.getLogger(__name__)

ID_FILE = "mlflow_run_id"
DATABASE = "mlflow.db"
DEFAULT_EXPERIMENT = "scpl-ds"
_LONGEST = 500
"""Characters of a parameter's value that every MLflow store takes."""
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""Unless set: MLflow's own are 7 tries of up to 120 seconds, in which the run would stand still."""


class MlflowOptions(TrackerOptions):
    """Options of ``{name: mlflow}``. What is unset comes from MLflow's own variables."""

    tracking_uri: str | None = None
    """Server or store; unset: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the run folder
    (SQLite), which ``mlflow ui --backend-store-uri`` shows."""
    experiment: str | None = None
    """Experiment, made if it is not there; unset: ``MLFLOW_EXPERIMENT_NAME``, else ``scpl-ds``."""
    run_name: str | None = None
    """Display name; unset: ``MLFLOW_RUN_NAME``, else ``train.run_name``, else the run folder's."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""
    log_model: bool = False
    """Copy the export into the run's artifacts at the end, as ``model``."""


class MlflowTracker(Tracker):
    """Metrics per step, the recipe as parameters (``train.max_steps``), tables and pictures as
    artifacts.

    The id is kept in ``mlflow_run_id`` in the run folder; a resumed run goes on under it. MLflow
    keeps what was logged: after a resume, steps after the checkpoint have their numbers twice, the
    same.

    Raises:
        ModuleNotFoundError: From ``start``, when mlflow is not installed.
    """

    Options: ClassVar[type[BaseModel]] = MlflowOptions

    def __init__(self, options: MlflowOptions, *, run_dir: Path, resume: bool) -> None:
        super().__init__(options, run_dir=run_dir, resume=resume)
        self.options = options
        self._client: Any = None
        self._run_id = ""

    def start(
        self,
        config: Mapping[str, Any],
        *,
        total_steps: int | None = None,
        resumed_step: int | None = None,
    ) -> None:
        del total_steps, resumed_step
        for name, value in _IMPATIENT.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "the mlflow tracker needs mlflow: pip install 'scpl-ds[mlflow]'"
            ) from error
        folder = self.run_dir.resolve()
        uri = self.options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        local = uri is None
        if uri is None:
            uri = f"sqlite:///{folder / DATABASE}"
            logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
            logging.getLogger("alembic").setLevel(logging.WARNING)
        client = MlflowClient(tracking_uri=uri)
        path = folder / ID_FILE
        if self.resume and path.exists():
            run = client.get_run(path.read_text(encoding="utf-8").strip())
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            experiment = self._experiment(client, folder if local else None)
            run = client.create_run(experiment, run_name=self._name(), tags=self.options.tags)
            path.write_text(run.info.run_id + "\n", encoding="utf-8")
        self._client, self._run_id = client, run.info.run_id
        self._log_parameters(config, run.data.params)
        log.info("mlflow run %s in %s", self._run_id, uri.rpartition("@")[2])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = round(time.time() * 1000)
        rows = [Metric(name, float(value), now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)

    def picture(self, name: str, svg: Path) -> None:
        self._client.log_text(self._run_id, svg.read_text(encoding="utf-8"), f"{name}.svg")

    def table(self, name: str, rows: Rows, step: int) -> None:
        self._client.log_dict(self._run_id, [dict(row) for row in rows], f"{name}/{step:08d}.json")

    def artifact(self, made: Artifact) -> None:
        if self.options.log_model and made.kind == "model":  # after training: this one may wait
            self._client.log_artifacts(self._run_id, str(made.path), "model")

    def run_id(self) -> str | None:
        return self._run_id or None

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        if self._client is None:
            return
        client, self._client = self._client, None
        client.log_dict(self._run_id, dict(summary), "result.json")
        client.set_terminated(self._run_id, "FAILED" if exit_code else "FINISHED")

    def _experiment(self, client: Any, folder: Path | None) -> str:
        name = (
            self.options.experiment
            or os.environ.get("MLFLOW_EXPERIMENT_NAME")
            or DEFAULT_EXPERIMENT
        )
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        # Beside the database: MLflow's own default is the working directory.
        artifacts = None if folder is None else (folder / "mlflow-artifacts").as_uri()
        return client.create_experiment(name, artifact_location=artifacts)

    def _name(self) -> str:
        return (
            self.options.run_name
            or os.environ.get("MLFLOW_RUN_NAME")
            or self.run_name
            or self.run_dir.resolve().name
        )

    def _log_parameters(self, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """What is new: MLflow refuses another value for a parameter, which a resumed run may have
        (``max_steps``); the first stays there, and ``config.json`` has the latest."""
        from mlflow.entities import Param

        flat = {n: str(v)[:_LONGEST] for n, v in _flat(config) if v is not None}
        new = [Param(name, value) for name, value in flat.items() if name not in known]
        for start in range(0, len(new), 100):  # most that a server takes at once
            self._client.log_batch(self._run_id, params=new[start : start + 100])
        self._client.log_dict(self._run_id, dict(config), "config.json")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """``{"train": {"seed": 1}}`` as ``[("train.seed", 1)]``; lists are values."""
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [row for key, own in value.items() for row in _flat(own, f"{prefix}.{key}".lstrip("."))]
