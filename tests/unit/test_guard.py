"""What stands around a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
