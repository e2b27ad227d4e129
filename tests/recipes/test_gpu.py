"""What needs a CUDA device: skipped without one, run where one is lent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.demo,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("zero", [0, 1])
def test_two_ranks_train_export_and_score_on_the_gpus_there_are(tmp_path: Path, zero: int) -> None:
    """With one GPU both ranks share it (gloo between them); with two each has its own."""
    words = [
        "recipes/quickstart.yaml", "train.max_steps=3", "data.max_train_samples=128",
        "data.max_eval_samples=32", f"train.output_dir={tmp_path / 'run'}", "trackers=[]",
        f"deepspeed.zero_optimization.stage={zero}",
    ]  # fmt: skip
    script = 'source launch/environment.sh && find_environment && run_deepspeed 2 train "$@"'
    run = subprocess.run(
        ["bash", "-c", script, "bash", *words],
        cwd=ROOT,
        env={**os.environ, "SCPL_DS_VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["eval_accuracy"] == pytest.approx(result["stage_eval_accuracy"], abs=1 / 32)
    config = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert any("stage1/loss" in line for line in config)
