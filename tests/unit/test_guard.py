"""What stands around a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scpl_ds.trainer_losses import Losses

HANDLER = """
#include <signal.h>
static void nothing(int number) { (void)number; }
__attribute__((constructor)) static void at_start(void) { signal(SIGUSR1, nothing); }
"""
PROGRAM = """
import os, signal
from scpl_ds.trainer_guard import _signals_ask

class Stop:
    asked = []
    def ask(self, reason):
        self.asked.append(reason)

assert signal.getsignal(signal.SIGUSR1) is None
with _signals_ask(Stop()):
    os.kill(os.getpid(), signal.SIGUSR1)
assert Stop.asked == ["SIGUSR1"]
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
"""


def test_a_handler_that_was_set_in_c_does_not_fail_a_run_that_has_ended(tmp_path: Path):
    """MPI sets such; Python knows it as None, and to put it back raised TypeError."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "handler.c", tmp_path / "handler.so"
    source.write_text(HANDLER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_loss_is_only_said_to_explode_far_beyond_what_is_usual_and_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    losses = Losses()
    for step, value in enumerate([0.0, 1e-6, 0.3, 2.0, 90.0, 0.1, -3.0, 0.0], 1):
        losses.logged(step, {"stage0/loss": value, "stage1/loss": 5e5 + value})
    assert losses.spared(tmp_path / "checkpoint-8") == [tmp_path / "checkpoint-8"]
    assert not caplog.records, "a loss may begin at 0, and another be large from the start"
    for step in range(9, 60):  # however long it lasts, it does not become usual
        losses.logged(step, {"stage0/loss": 1e6, "stage1/loss": 5e5})
        losses.seen(step, {"stage0/loss": 1e6})
    assert losses.spared(tmp_path / "checkpoint-59") == [tmp_path / "checkpoint-8"]
    assert len(caplog.records) == 1
    assert "stage0/loss is 1e+06 at step 9" in caplog.text and "(checkpoint-8)" in caplog.text
    losses.logged(60, {"stage0/loss": 0.2})
    assert losses.spared(tmp_path / "checkpoint-60") == [tmp_path / "checkpoint-60"]
