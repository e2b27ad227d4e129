"""A copy of the repository to run the documentation in, with its commands made short."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scpl_ds.data.demo import prepare_demo
from tests.docs.pages import BLOCKS, ROOT, Block

TRAINS = re.compile(r"launch/\w+\.sh|\btrain (?=\S+\.yaml)")
SHORT = ["train.max_steps=2", "data.max_train_samples=96", "data.max_eval_samples=32"]
"""Appended to every command that trains, unless it says so itself."""

LAST_COMMAND = "the python command that quickstart prints"

Finished = subprocess.CompletedProcess[str]


class Sandbox:
    """Where the blocks run, and what became of those that did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = folder / "quickstart.json"
        """What quickstart wrote as result.json, before other blocks go on from its run."""
        for name in ("launch", "recipes", "README.md", "pyproject.toml", "constraints.txt"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, folder / name)
        activate = folder / ".venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n")
        self._finished: dict[str, Finished] = {}

    def environment(self) -> dict[str, str]:
        return os.environ | {
            "SCPL_DS_VENV": sys.prefix,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
        }

    def bash(self, block: Block) -> Finished:
        """Run a bash block once."""
        if block.name not in self._finished:
            self._finished[block.name] = self._run(["bash", "-euo", "pipefail", "-c", short(block)])
        return self._finished[block.name]

    def python(self, more: dict[str, str]) -> dict[str, str]:
        """Run every page's python blocks, a process a page; page -> traceback ("" when good)."""
        if "python" not in self._finished:
            pages = dict(more)
            for block in BLOCKS:
                if block.language == "python" and block.reason is None:
                    # Blank lines in front, so that a traceback has the page's line numbers.
                    code = pages.get(block.page, "")
                    code += "\n" * (block.line - code.count("\n")) + block.code
                    pages[block.page] = code
            work = self.folder / "pages.json"
            work.write_text(json.dumps(pages))
            runner = str(Path(__file__).with_name("run_pages.py"))
            self._finished["python"] = self._run([sys.executable, runner, str(work)])
        finished = self._finished["python"]
        assert finished.returncode == 0, finished.stdout
        return json.loads((self.folder / "pages.json.results").read_text())

    def _run(self, command: list[str]) -> Finished:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment(), text=True, timeout=240,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def short(block: Block) -> str:
    """The block with its training commands made short."""
    lines = []
    for line in block.code.splitlines():
        command, hash_, comment = line.partition("  #")
        if TRAINS.search(command) and "--help" not in command:
            added = [o for o in SHORT if f"{o.partition('=')[0]}=" not in command]
            command = " ".join([command.rstrip(), *added])
        lines.append(command + hash_ + comment)
    return "\n".join(lines)


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    prepare_demo()
    return Sandbox(tmp_path_factory.mktemp("docs"))


@pytest.fixture(scope="session")
def quickstart(sandbox: Sandbox) -> Finished:
    """The README's first block: its run folder is what other blocks work on."""
    finished = sandbox.bash(next(b for b in BLOCKS if "quickstart.sh" in b.code))
    result = sandbox.folder / "runs" / "quickstart" / "result.json"
    if result.exists() and not sandbox.result.exists():
        shutil.copy2(result, sandbox.result)
    return finished


@pytest.fixture(scope="session")
def run_bash(sandbox: Sandbox, quickstart: Finished) -> Callable[[Block], Finished]:
    return sandbox.bash


@pytest.fixture(scope="session")
def python_pages(sandbox: Sandbox, quickstart: Finished) -> dict[str, str]:
    """What became of every page's python blocks, after the commands of all pages."""
    commands = [block for block in BLOCKS if block.language == "bash" and block.reason is None]
    exporting = {block.page for block in commands if "export" in block.code}
    for block in commands:
        if block.page in exporting:  # whole pages: what is exported was made further up
            sandbox.bash(block)
    printed = re.search(r'^  python -c "(.+)"$', quickstart.stdout, re.MULTILINE)
    assert printed is not None, quickstart.stdout
    return sandbox.python({LAST_COMMAND: printed[1]})
