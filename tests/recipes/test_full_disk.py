"""A disk that takes no more, outside of a save: what is left, and what to do, in one message."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.cli import main
from scpl_ds.errors import SaveError
from scpl_ds.run_folder import RunFolder
from tests.support.tiny import recipe_for, train

Recipe = dict[str, Any]


@contextlib.contextmanager
def no_room_for(path: Path) -> Iterator[None]:
    """Files as large as ``path``, or larger, really cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size - 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_an_export_without_room_says_what_is_whole_and_leaves_nothing(
    plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    """It was a traceback of shutil.Error or of SafetensorError."""
    out, own = tmp_path / "out", sorted((plain_run / "export").glob("*.safetensors"))
    with no_room_for(own[0] if name == "model.safetensors" else plain_run / "export" / name):
        assert main(["export", str(plain_run), str(out)]) == 1
    said = capsys.readouterr().err
    assert f"SaveError: {out} could not be written: " in said and "too large" in said
    assert f"then `scpl-ds export {plain_run / 'checkpoint-8'} {out}" in said
    assert "Traceback" not in said and not list(tmp_path.iterdir())
    assert main(["export", str(plain_run), str(out)]) == 0


@pytest.mark.parametrize("name", ["recipe.yaml", "model/tokenizer.json"])
def test_a_run_folder_without_room_is_refused_before_the_first_step(
    plain_run: Path, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
):
    run = tmp_path / "run"
    recipe = recipe_for(base, "none", run)
    with no_room_for(plain_run / name):
        assert train(recipe) == 1
    said = capsys.readouterr().err
    assert f"SaveError: {run} could not be written: " in said and "too large" in said
    assert "Nothing was trained" in said and "Traceback" not in said
    assert not list(run.glob("checkpoint-*"))


def test_a_result_without_room_is_said_instead(tmp_path: Path):
    folder = RunFolder(tmp_path)
    result = {"eval_accuracy": 0.75, "run_dir": "x" * 99}
    (tmp_path / "as long").write_text("x" * 99)
    with (
        no_room_for(tmp_path / "as long"),
        pytest.raises(SaveError, match=r"eval_accuracy\W+0\.75"),
    ):
        folder.write_result(result)
