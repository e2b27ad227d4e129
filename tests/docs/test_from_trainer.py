"""The two scripts of docs/from-trainer.md: how they differ, and that both run."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "docs" / "examples"
BEFORE, AFTER = EXAMPLES / "trainer_before.py", EXAMPLES / "trainer_after.py"
SHORT = [
    "--max_steps", "2", "--eval_steps", "2", "--save_steps", "2", "--logging_steps", "1",
    "--per_device_train_batch_size", "8", "--use_cpu",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def changed_lines() -> list[str]:
    texts = [path.read_text(encoding="utf-8").splitlines() for path in (BEFORE, AFTER)]
    lines = difflib.unified_diff(*texts, lineterm="", n=0)
    return [line for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---")]


def test_the_page_shows_the_difference_of_the_scripts_which_is_at_most_ten_lines():
    found = changed_lines()
    assert 0 < len(found) <= 10
    page = (ROOT / "docs" / "from-trainer.md").read_text(encoding="utf-8")
    assert "```diff\n" + "\n".join(found) + "\n```" in page


@pytest.mark.parametrize(
    "script, launcher", [(BEFORE, []), (AFTER, TORCHRUN)], ids=["before", "after-2-ranks"]
)
def test_the_script_trains_and_leaves_a_model(script: Path, launcher: list[str], tmp_path: Path):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(script), "--output_dir", str(tmp_path / "run"), *SHORT],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 steps," in done.stdout and "eval_f1" in done.stdout
    assert list((tmp_path / "run").rglob("*.safetensors"))
