"""Every command and every piece of Python in the documentation works as it stands there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from tests.docs.conftest import LAST_COMMAND, Finished, Sandbox
from tests.docs.pages import BLOCKS, PAGES, ROOT, Block

pytestmark = pytest.mark.demo

BASH = [b for b in BLOCKS if b.language == "bash" and b.reason is None]
PYTHON_PAGES = sorted({b.page for b in BLOCKS if b.language == "python" and b.reason is None})


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.name)
def test_a_command_in_the_docs_succeeds(block: Block, run_bash: Callable[[Block], Finished]):
    finished = run_bash(block)
    assert finished.returncode == 0, f"{block.code}\n{finished.stdout}"


@pytest.mark.parametrize("page", [*PYTHON_PAGES, LAST_COMMAND])
def test_the_python_of_a_page_runs(page: str, python_pages: dict[str, str]):
    assert python_pages[page] == ""


def test_the_plan_in_the_quickstart_is_the_one_that_is_printed(
    run_bash: Callable[[Block], Finished],
):
    page = [b for b in BLOCKS if b.page == "docs/quickstart.md"]
    (plan,) = [b.code for b in page if b.language == "text" and "prologue" in b.code]
    (command,) = [b for b in page if b.code.startswith("scpl-ds plan recipes/quickstart.yaml\n")]
    assert plan in run_bash(command).stdout


def test_every_block_is_run_or_says_why_not():
    """A fence that the parser does not see would be skipped in silence."""
    for path in PAGES:
        fences = re.findall(r"^```(?:bash|python)$", path.read_text(), re.MULTILINE)
        page = str(path.relative_to(ROOT))
        seen = [b for b in BLOCKS if b.page == page and b.language in ("bash", "python")]
        assert len(fences) == len(seen), path
        assert not re.search(r"```(sh|shell|console|py)$", path.read_text(), re.MULTILINE), path


def test_few_blocks_are_left_out():
    code = [b for b in BLOCKS if b.language in ("bash", "python")]
    left_out = [b for b in code if b.reason is not None]
    assert len(left_out) <= len(code) / 3, [b.name for b in left_out]
    assert all(b.language == "bash" for b in left_out)


def test_quickstart_ends_with_accuracy_run_folder_and_four_commands(
    quickstart: Finished, sandbox: Sandbox
):
    assert quickstart.returncode == 0, quickstart.stdout
    run = sandbox.folder / "runs" / "quickstart"
    result = json.loads(sandbox.result.read_text())
    assert result["stages"] == result["ranks"] == 2
    assert f"Accuracy   {result['eval_accuracy']:.1%} of the exported model" in quickstart.stdout
    assert f"Run        {run.resolve()}" in quickstart.stdout
    after = quickstart.stdout.partition("Try next")[2].splitlines()[1:5]
    assert [line.split()[:2] for line in after] == [
        ["scpl-ds", "plan"], ["scpl-ds", "eval"], ["scpl-ds", "report"], ["python", "-c"],
    ]  # fmt: skip


def test_a_failed_quickstart_passes_its_exit_code_on_from_any_folder(sandbox: Sandbox):
    command = f"cd / && bash {sandbox.folder}/launch/quickstart.sh train.max_step=2"
    finished = sandbox.bash(Block("launch", 0, "bash", command, None))
    assert "1 problem in recipes/quickstart.yaml" in finished.stdout
    assert finished.returncode == 2, finished.stdout
    assert "Accuracy" not in finished.stdout


def test_quickstart_installs_nothing_into_an_environment_it_is_given(
    quickstart: Finished, sandbox: Sandbox
):
    assert "Installing" not in quickstart.stdout
    assert [path.name for path in (sandbox.folder / ".venv").rglob("*") if path.is_file()] == [
        "activate"
    ]
