"""Run pieces of Python, a forked process each, after importing once what takes seconds.

``python run_pages.py pages.json``: a mapping from page to code; writes ``pages.json.results``, a
mapping from page to what went wrong ("" when nothing did).
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import torch  # noqa: F401
import transformers  # noqa: F401

import scpl_ds.build
import scpl_ds.trainer  # noqa: F401

LIMIT_S = 90


def run(page: str, code: str, report: Path) -> None:
    output = io.StringIO()
    wrong = "it ended the process"
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            exec(compile(code, page, "exec"), {"__name__": "__main__"})
        wrong = ""
    except BaseException:
        wrong = output.getvalue() + traceback.format_exc()
    report.write_text(wrong)
    os._exit(0)


def main(path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    results = {}
    for number, (page, code) in enumerate(json.loads(path.read_text()).items()):
        report = path.with_name(f"{path.name}.{number}")
        report.write_text(f"it did not end within {LIMIT_S} s, or ended the process")
        process = fork.Process(target=run, args=(page, code, report))
        process.start()
        process.join(LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join()
        results[page] = report.read_text()
    path.with_name(f"{path.name}.results").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
