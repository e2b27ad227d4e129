"""Nothing that is read is run, no key is written, and nobody else may write into a run folder."""

from __future__ import annotations

import ast
import os
import pickle
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import scpl_ds
from scpl_ds.recipe import RecipeError, recipe_from_mapping
from tests.support import tiny
from tests.support.tiny import put, recipe_for, train, write_recipe

Recipe = dict[str, Any]
PACKAGE = Path(scpl_ds.__file__).parent
MARKER = "k3y-that-nobody-may-see-0815"

# -- nothing is unpickled ----------------------------------------------------------------------

UNPICKLERS = frozenset(
    {"torch.load", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
     "pandas.read_pickle", "numpy.load", "np.load", "torch.jit.load", "torch.package",
     "torch.hub", "torch.distributed.checkpoint"}
)  # fmt: skip


def unpicklers(source: str) -> Iterator[str]:
    """What a file imports, calls or names of :data:`UNPICKLERS`, and calls of eval and exec."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in ("eval", "exec", "compile") else []
            yield from names
        for name in names:
            yield from (bad for bad in UNPICKLERS if f"{name}.".startswith(f"{bad}."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_file_of_the_package_unpickles(path: Path):
    assert list(unpicklers(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from torch import load", "import torch\ntorch.load(f)", "eval(text)",
     "import numpy as np\nnp.load(f)", "def f():\n    import dill"],
)  # fmt: skip
def test_the_search_sees_what_unpickles(source: str):
    assert len(list(unpicklers(source))) >= 1


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def torch_file(path: Path, bomb: Bomb) -> None:
    """As ``torch.save`` writes it, with a bomb in the place of the tensors."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"weight": bomb}, protocol=2))
        file.writestr("archive/version", "3\n")


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path: Path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


def test_weights_of_a_model_are_not_unpickled(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tiny.save_model(tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch_file(model / "pytorch_model.bin", Bomb(tmp_path / "boom"))
    recipe = recipe_for(base, "none", tmp_path / "run", **{"model.name_or_path": str(model)})
    assert train(recipe) == 2
    assert not (tmp_path / "boom").exists()
    assert "PartitionError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet", "folder"])
def test_data_are_not_unpickled(
    base: Recipe, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / name
    data: Recipe = {"name": file.suffix[1:], "train_file": str(file), "max_length": 16}
    if name == "folder":
        file.mkdir()
        file = file / "train.pkl"
        data = {"name": "hf", "dataset": str(file.parent), "cache_dir": str(tmp_path / "cache")}
    file.write_bytes(pickle.dumps([{"text": "a", "label": Bomb(tmp_path / "boom")}]))
    recipe = recipe_for(base, "none", tmp_path / "run", data=data)
    assert train(recipe) == 2
    assert not (tmp_path / "boom").exists()
    assert "DataError" in capsys.readouterr().err


def test_a_checkpoint_is_not_unpickled(
    plain_run: Path, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Every file of it is a pickle with the size that the manifest says."""
    recipe = recipe_for(base, "none", tmp_path / "run")
    folder = tmp_path / "checkpoint-8"
    for source in (plain_run / "checkpoint-8").rglob("*"):
        target = folder / source.relative_to(plain_run / "checkpoint-8")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".json":
            target.write_bytes(source.read_bytes())
        elif source.is_file():
            torch_file(target, Bomb(tmp_path / "boom"))
            size = source.stat().st_size
            target.write_bytes(target.read_bytes()[:size].ljust(size, b"\0"))
    assert train(recipe, f"train.resume_from_checkpoint={folder}") == 2
    assert not (tmp_path / "boom").exists()
    assert "CheckpointError" in capsys.readouterr().err


# -- code of others -----------------------------------------------------------------------------


def test_code_of_a_models_repository_is_never_run(
    base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model = tiny.save_model(tmp_path / "model")
    code = f"from pathlib import Path\nPath({str(tmp_path / 'boom')!r}).touch()\n"
    (model / "modeling_mine.py").write_text(code)
    config = (model / "config.json").read_text()
    mapping = '{"AutoConfig": "modeling_mine.C", "AutoModel": "modeling_mine.M"}'
    text = config.replace("{", f'{{"auto_map": {mapping},', 1).replace('"bert"', '"mine"')
    (model / "config.json").write_text(text)
    recipe = recipe_for(base, "none", tmp_path / "run", **{"model.name_or_path": str(model)})
    assert train(recipe) == 2
    assert not (tmp_path / "boom").exists()
    assert "PartitionError" in capsys.readouterr().err


def test_a_recipe_cannot_switch_it_on(base: Recipe):
    assert recipe_from_mapping(base).model.trust_remote_code is False
    for value in (True, "true", 1):
        with pytest.raises(RecipeError, match="trust_remote_code"):
            recipe_from_mapping(put(base, {"model.trust_remote_code": value}))


# -- keys and modes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_keys(base: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with both keys in the environment and a tracker that uses one, in a folder of its own,
    under a umask that forbids nothing; and all that it said."""
    folder = tmp_path_factory.mktemp("keys")
    trackers = [{"name": "console"}, {"name": "jsonl"}, {"name": "wandb", "mode": "offline"}]
    recipe = recipe_for(base, "none", folder / "run", trackers=trackers)
    recipe = put(recipe, {"train.max_steps": 2, "train.save_steps": 2})
    keys = {"WANDB_API_KEY": MARKER * 2, "HF_TOKEN": f"hf_{MARKER}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "scpl_ds", "train", str(write_recipe(folder / "r.json", recipe))],
        cwd=folder, env={**os.environ, **keys}, capture_output=True, text=True, timeout=280,
        preexec_fn=lambda: os.umask(0),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_no_key_is_in_a_file_of_a_run_or_in_what_it_says(with_keys: tuple[Path, str]):
    folder, said = with_keys
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert (folder / "run" / "wandb").is_dir() and (folder / "run" / "checkpoint-2").is_dir()
    assert [path for path in files if MARKER.encode() in path.read_bytes()] == []
    assert MARKER not in said


def test_nobody_else_may_write_into_a_run_folder(with_keys: tuple[Path, str]):
    run = with_keys[0] / "run"
    every = [run, *(path for path in run.rglob("*") if not path.is_symlink())]
    assert [path for path in every if path.stat().st_mode & stat.S_IWOTH] == []
