"""TensorBoard and MLflow: what they wrote is read back with their own readers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.trackers._base import Artifact, TrackerSet

CONFIG = {"train": {"max_steps": 4, "seed": 1}, "scpl": {"stages": 2}}
SAMPLES = [{"prompt": "Once", "text": "upon\na | time", "probability": 0.5}]


def id_of(run_dir: Path) -> str:
    return (run_dir / "mlflow_run_id").read_text().strip()


def run(run_dir: Path, section: dict[str, Any], steps: range, *, resumed: int | None = None):
    run_dir.mkdir(exist_ok=True)
    trackers = TrackerSet.build(
        [section], run_dir=run_dir, resume=resumed is not None, run_name="mine"
    )
    trackers.start(CONFIG, total_steps=4, resumed_step=resumed)
    for step in steps:
        trackers.log({"stage0/loss": 10.0 + step, "head/loss": float("nan")}, step)
    trackers.table("samples", SAMPLES, steps[-1])
    ids = trackers.run_ids()
    assert ids == ({"MlflowTracker": id_of(run_dir)} if section["name"] == "mlflow" else {})
    (run_dir / "timeline.svg").write_text("<svg/>")
    trackers.picture("profile/timeline", run_dir / "timeline.svg")
    trackers.finish({"eval_accuracy": 0.5})


class TestTensorBoard:
    pytestmark = pytest.mark.skipif(
        importlib.util.find_spec("tensorboard") is None, reason="needs scpl-ds[tensorboard]"
    )

    @staticmethod
    def read(folder: Path) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return events

    def test_scalars_texts_and_the_recipe_are_in_the_event_files(self, tmp_path: Path) -> None:
        run(tmp_path, {"name": "tensorboard"}, range(1, 5))
        events = self.read(tmp_path / "tensorboard")
        rows = events.Scalars("stage0/loss")
        assert [(row.step, row.value) for row in rows] == [(n, 10.0 + n) for n in range(1, 5)]
        assert len(events.Scalars("head/loss")) == 4
        texts = {name: events.Tensors(name)[0].tensor_proto for name in events.Tags()["tensors"]}
        assert b'"max_steps": 4' in texts["config/text_summary"].string_val[0]
        table = texts["samples/text_summary"].string_val[0].decode().splitlines()
        assert table[0] == "| prompt | text | probability |"
        assert table[2:] == [r"| Once | upon a \| time | 0.5 |"], "a row stays a row"
        assert b'"eval_accuracy": 0.5' in texts["summary/text_summary"].string_val[0]

    def test_a_resumed_run_takes_the_place_of_what_came_after_its_checkpoint(
        self, tmp_path: Path
    ) -> None:
        run(tmp_path, {"name": "tensorboard"}, range(1, 4))
        run(tmp_path, {"name": "tensorboard"}, range(3, 5), resumed=2)
        rows = self.read(tmp_path / "tensorboard").Scalars("stage0/loss")
        assert [row.step for row in rows] == [1, 2, 3, 4]

    def test_a_run_that_begins_anew_keeps_nothing_of_the_one_before(self, tmp_path: Path) -> None:
        run(tmp_path, {"name": "tensorboard"}, range(1, 4))
        run(tmp_path, {"name": "tensorboard"}, range(1, 2))
        assert len(self.read(tmp_path / "tensorboard").Scalars("stage0/loss")) == 1


class TestMlflow:
    pytestmark = pytest.mark.skipif(
        importlib.util.find_spec("mlflow") is None, reason="needs scpl-ds[mlflow]"
    )

    def test_a_run_is_in_the_run_folder_and_goes_on_under_its_id(self, tmp_path: Path) -> None:
        from mlflow import MlflowClient
        from mlflow.artifacts import load_dict, load_text

        section = {"name": "mlflow", "tags": {"team": "ours"}}
        run(tmp_path, section, range(1, 3))
        run(tmp_path, section, range(3, 5), resumed=2)

        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("scpl-ds")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        assert found.info.run_id == id_of(tmp_path)
        assert found.info.status == "FINISHED" and found.info.run_name == "mine"
        assert found.data.tags["team"] == "ours"
        assert found.data.params == {"train.max_steps": "4", "train.seed": "1", "scpl.stages": "2"}
        rows = client.get_metric_history(found.info.run_id, "stage0/loss")
        assert [(row.step, row.value) for row in rows] == [(n, 10.0 + n) for n in range(1, 5)]
        root = found.info.artifact_uri
        assert Path(root.removeprefix("file://")).is_relative_to(tmp_path)
        assert load_dict(f"{root}/result.json") == {"eval_accuracy": 0.5}
        assert json.loads(load_text(f"{root}/samples/00000004.json")) == SAMPLES
        assert load_text(f"{root}/profile/timeline.svg") == "<svg/>"

    @pytest.mark.parametrize("asked", [True, False])
    def test_the_export_is_copied_where_it_is_asked_for_and_checkpoints_never(
        self, tmp_path: Path, asked: bool
    ) -> None:
        from mlflow import MlflowClient

        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "model.safetensors").write_bytes(b"weights")
        section = {"name": "mlflow", "log_model": asked}
        trackers = TrackerSet.build([section], run_dir=tmp_path, resume=False)
        trackers.start({})
        trackers.artifact(Artifact(tmp_path / "export", "checkpoint", 1, {}))
        trackers.artifact(Artifact(tmp_path / "export", "model", 2, {}))
        trackers.finish({})
        client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
        found = [file.path for file in client.list_artifacts(id_of(tmp_path), "model")]
        assert found == (["model/model.safetensors"] if asked else [])
        assert not client.list_artifacts(id_of(tmp_path), "checkpoint")

    def test_an_option_of_a_resumed_run_that_changed_does_not_stop_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        run(tmp_path, {"name": "mlflow"}, range(1, 2))
        monkeypatch.setitem(CONFIG, "train", {"max_steps": 8, "seed": 1})
        caplog.clear()
        run(tmp_path, {"name": "mlflow"}, range(2, 3), resumed=1)
        assert not [record for record in caplog.records if "failed in" in record.getMessage()]
