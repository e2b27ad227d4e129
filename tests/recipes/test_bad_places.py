"""Places that nothing can be written to are refused by the commands, without a traceback."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.cli import main
from scpl_ds.errors import RecipeError
from scpl_ds.export import check_destination
from tests.support.tiny import put, write_recipe

NOBODY = 65534


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("out", [".", "..", "sub/.."])
def test_an_export_into_the_folder_one_stands_in_is_refused(
    out: str,
    plain_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """An empty one ended in a ValueError of pathlib."""
    (tmp_path / "work" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    said = refused(["export", str(plain_run), out], capsys)
    assert "is the folder you are in, or holds it; name a new one" in said
    (tmp_path / "work" / "sub").rmdir()
    if out != "sub/..":
        assert "name a new one" in refused(["export", str(plain_run), out], capsys)
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("out", ["file/x", "file/x/y"])
def test_an_export_below_a_file_is_refused(
    out: str, plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It ended in a NotADirectoryError."""
    (tmp_path / "file").write_text("mine")
    said = refused(["export", str(plain_run), str(tmp_path / out)], capsys)
    assert f"export: {tmp_path / 'file'} is a file" in said


def test_an_export_where_one_may_not_write_is_refused():
    """Root may write everywhere: where the tests run as root, nobody asks for the moment."""
    users = os.getresuid()
    if users[1] == 0:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        with pytest.raises(RecipeError, match=r"^export: / is not writable"):
            check_destination(Path("/scpl-ds-export/x"), key="export")
    finally:
        os.setresuid(*users)


def test_an_export_dir_below_a_file_is_refused_before_the_training(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("mine")
    places = {
        "train.output_dir": str(tmp_path / "run"),
        "train.export_dir": str(tmp_path / "file" / "x"),
    }
    path = write_recipe(tmp_path / "mine.yaml", put(base, places))
    assert "train.export_dir: " in refused(["train", str(path)], capsys)
    assert not (tmp_path / "run").exists()


def test_a_schema_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    said = refused(["schema", "--out", str(tmp_path / "none" / "x")], capsys)
    assert f"--out {tmp_path / 'none' / 'x'}: cannot be written" in said
