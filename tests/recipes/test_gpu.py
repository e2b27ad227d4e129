"""What needs a CUDA device: skipped without one, run where one is lent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(ranks: int, out: Path, *words: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The quickstart for three steps on the GPUs there are: its result and its metrics."""
    words = (
        "recipes/quickstart.yaml", "train.max_steps=3", "data.max_train_samples=128",
        "data.max_eval_samples=32", f"train.output_dir={out}", "trackers=[]",
        "train.logging_steps=1", *words,
    )  # fmt: skip
    script = f'source launch/environment.sh && find_environment && run_deepspeed {ranks} train "$@"'
    run = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        cwd=ROOT,
        env={**os.environ, "SCPL_DS_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "result.json").read_text()), metrics


@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_train_export_and_score_on_the_gpus_there_are(tmp_path: Path, zero: int) -> None:
    """With one GPU both ranks share it (gloo between them); with two each has its own."""
    result, metrics = train(2, tmp_path / "run", f"deepspeed.zero_optimization.stage={zero}")
    assert result["eval_accuracy"] == pytest.approx(result["stage_eval_accuracy"], abs=1 / 32)
    assert any("stage1/loss" in row for row in metrics)


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_hidden_states_of_a_gpu_arrive_as_if_both_stages_shared_a_rank(
    tmp_path: Path, transport: str
) -> None:
    """Through pinned host memory, or NCCL where there are two GPUs: the losses of one rank."""
    plain = ("scpl.sharding=none", "deepspeed.zero_optimization.stage=0")
    _, apart = train(2, tmp_path / "two", f"scpl.transport={transport}", *plain)
    _, together = train(1, tmp_path / "one", *plain)
    for key in ("stage0/loss", "stage1/loss"):
        found = [row[key] for row in apart if key in row]
        assert len(found) == 3
        assert found == pytest.approx([row[key] for row in together if key in row], rel=1e-3)
