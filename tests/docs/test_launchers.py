"""The launch scripts where things are not as they should be: which environment they take, what they
do to it, and what they say. The clones have a space in their path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

Finished = subprocess.CompletedProcess[str]
OURS = "scpl_ds-made-here.stamp"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "my clone"
    for name in ("launch", "recipes"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


def bash(command: str, folder: Path, **more: str) -> Finished:
    """Run as a user would: no environment activated, no package index to install from."""
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "SCPL_DS_VENV")}
    env |= {"PATH": "/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [shutil.which("bash") or "bash", "-c", command],
        cwd=folder, env=env | more, text=True, timeout=240,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# -- installing ----------------------------------------------------------------------------

INSTALL = "set -euo pipefail; source launch/environment.sh; use_environment dev"


def test_an_environment_without_pip_is_kept_and_gets_pip(clone: Path):
    """`uv venv` makes such ones; installing used to empty them."""
    venv.create(clone / ".venv", with_pip=False, symlinks=True)
    (clone / ".venv" / "mine.txt").touch()
    finished = bash(INSTALL, clone)
    assert (clone / ".venv" / "mine.txt").exists()
    assert "Installing scpl-ds[dev]" in finished.stdout
    assert "torch" in finished.stdout and finished.returncode == 1  # there is no index here
    assert list((clone / ".venv" / "bin").glob("pip*"))


def test_a_broken_environment_that_is_not_ours_is_left_alone(clone: Path):
    script(clone / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    finished = bash(INSTALL, clone)
    assert finished.returncode == 2, finished.stdout
    assert f"{clone}/.venv has no working Python" in finished.stdout
    assert "SCPL_DS_VENV" in finished.stdout
    assert [p.name for p in (clone / ".venv").rglob("*")] == ["bin", "python"]


def test_our_own_broken_environment_is_made_anew_by_the_python_that_is_named(clone: Path):
    script(clone / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    (clone / ".venv" / OURS).touch()
    # Writes down what it is asked and makes nothing: the installation ends there.
    log = clone / "asked"
    python = clone / "my python"
    script(python, f'#!/bin/sh\necho "$@" >>"{log}"\n')
    finished = bash(INSTALL, clone, PYTHON=str(python))
    assert finished.returncode != 0
    assert log.read_text().splitlines()[-1] == f"-m venv {clone}/.venv"
    assert [p.name for p in (clone / ".venv").iterdir()] == [OURS]


def test_a_python_that_cannot_make_an_environment_is_refused(clone: Path):
    """Debian's python3 without python3-venv: it has venv, and no ensurepip."""
    script(
        clone / "debian",
        '#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec python3 "$@"\n',
    )
    finished = bash(INSTALL, clone, PYTHON=f"{clone}/debian")
    assert finished.returncode == 2
    assert f"tried: {clone}/debian" in finished.stdout and "python3-venv" in finished.stdout
    assert not (clone / ".venv").exists()


INDEX = "https://download.pytorch.org/whl/cpu"
CHOOSE = """set -euo pipefail; source launch/environment.sh; VENV=$PWD/env
may_have_gpu() { [[ -n ${A_GPU:-} ]]; }
has_slurm() { [[ -n ${A_CLUSTER:-} ]]; }
unset PIP_NO_INDEX PIP_FIND_LINKS; eval "${AND:-}"; echo "<$(cpu_index)>"
"""


@pytest.mark.parametrize(
    "more, chosen",
    [
        ({}, True),
        ({"A_GPU": "1"}, False),
        ({"AND": "export PIP_EXTRA_INDEX_URL=file:///mine"}, False),
        ({"AND": "export PIP_INDEX_URL=file:///mine"}, False),
        ({"AND": "export PIP_FIND_LINKS=/wheels"}, False),
        ({"AND": "export PIP_NO_INDEX=1"}, False),
        ({"AND": "export PIP_CONFIG_FILE=$PWD/pip.conf"}, False),
        ({"AND": "TORCH_CPU_INDEX=file:///nowhere"}, False),
        ({"A_CLUSTER": "1"}, False),
    ],
)
def test_the_cpu_build_is_taken_where_there_is_no_gpu_and_nobody_named_an_index(
    clone: Path, more: dict[str, str], chosen: bool
):
    # pip is the real one; only whether the index answers is said by its address.
    asked = (
        f'#!/bin/sh\ncase $1 in -m) exec "{sys.executable}" "$@" ;; *) [ "$3" = {INDEX} ] ;; esac\n'
    )
    script(clone / "env" / "bin" / "python", asked)
    (clone / "pip.conf").write_text("[global]\nindex-url = file:///mine\n")
    finished = bash(CHOOSE, clone, **more)
    assert finished.stdout == (f"<{INDEX}>\n" if chosen else "<>\n")


# -- starting ------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["deepspeed.sh", "torchrun.sh"])
@pytest.mark.parametrize("python", [None, "#!/bin/sh\nexit 1\n"], ids=["none", "another"])
def test_a_launcher_without_an_environment_says_how_to_get_one(
    launcher: str, python: str | None, clone: Path
):
    """It used to be `python: command not found`, or a ModuleNotFoundError of every rank."""
    tools = clone / "tools"
    tools.mkdir()
    (tools / "dirname").symlink_to(shutil.which("dirname") or "")
    if python is not None:
        script(tools / "python", python)
    finished = bash(f"source launch/{launcher} recipes/quickstart.yaml", clone, PATH=str(tools))
    assert finished.returncode == 2, finished.stdout
    which = "python (there is none on PATH)" if python is None else f"{tools}/python"
    assert f"scpl_ds is not installed for {which}. Run" in finished.stdout
    assert "launch/quickstart.sh" in finished.stdout and "SCPL_DS_VENV" in finished.stdout


@pytest.mark.parametrize(("launcher", "code"), [("deepspeed.sh", 2), ("torchrun.sh", 1)])
def test_a_clone_with_a_space_in_its_path_or_that_was_moved_runs(
    launcher: str, code: int, clone: Path
):
    """The `deepspeed` script names its Python by path; it was not found there."""
    venv.create(clone / ".venv", with_pip=False, symlinks=True)
    for name in ("deepspeed", "torchrun"):
        script(clone / ".venv" / "bin" / name, "#!/elsewhere/my clone/.venv/bin/python\n")
    (site,) = (clone / ".venv").glob("lib/python*/site-packages")
    installed = [path for path in sys.path if path.endswith("-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in installed]
    (site / "here.pth").write_text("".join([*lines, f"{ROOT}\n"]))
    finished = bash(f"RANKS=1 bash '{clone}/launch/{launcher}' 'no such.yaml'", clone.parent)
    assert "scpl-ds: RecipeError: " in finished.stdout, finished.stdout
    assert "no such.yaml does not exist" in finished.stdout
    assert finished.returncode == code


@pytest.mark.parametrize(("reader", "way"), [(".", ""), ("..", "cd '{}' && ")])
def test_what_quickstart_prints_can_be_pasted_where_it_was_started(
    reader: str, way: str, clone: Path
):
    """The commands are relative to the repository, which need not be the reader's folder."""
    result = {"eval_accuracy": 0.8, "majority_accuracy": 0.5, "export_dir": "runs/mine/export"}
    (clone / "runs" / "mine").mkdir(parents=True)
    (clone / "runs" / "mine" / "result.json").write_text(json.dumps(result))
    command = f"'{sys.executable}' launch/summary.py runs/mine {reader}"
    finished = bash(command, clone)
    assert f"Try next, after `{way.format(clone)}source " in finished.stdout, finished.stdout
