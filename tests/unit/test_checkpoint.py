"""The checkpoint format by itself: written whole or not at all, read by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scpl_ds import checkpoint
from scpl_ds.checkpoint import Reader, Share, Writer
from scpl_ds.checkpoint_files import seal
from scpl_ds.errors import CheckpointError
from scpl_ds.optim import OptimizerState

PARTS: tuple[dict[str, Tensor], ...] = (
    {"a.weight": torch.arange(6.0).reshape(2, 3), "scpl_heads.layer_1.weight": torch.ones(2)},
    {"b.weight": torch.full((4,), 2.0), "b.count": torch.tensor(7)},
)


def moments(part: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    floats = {name: tensor * 10 for name, tensor in part.items() if tensor.is_floating_point()}
    return {"exp_avg": floats, "exp_avg_sq": {n: t * 10 for n, t in floats.items()}}


def save(folder: Path, *, step: int = 3, **finish: Any) -> Path:
    with Writer(folder, is_coordinator=True) as writer:
        for index, part in enumerate(PARTS):
            writer.write_stage(Share(index, part, OptimizerState(step, moments(part))))
        given = {"bounds": (0, 2, 4), "client_state": {"seen": 5}, "save_latest": True}
        writer.finish(step=step, **{**given, **finish})
    return folder


def as_format_1(folder: Path) -> None:
    """What versions without checksums wrote."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksums"], manifest["checksum"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}, indent=1))
    (folder.parent / "latest").write_text(folder.name)


def test_tensors_come_back_by_name_whatever_file_they_are_in(tmp_path: Path):
    reader = Reader(save(tmp_path / "checkpoint-3"))
    assert reader.manifest["step"] == 3 and reader.manifest["client_state"] == {"seen": 5}
    found = reader.tensors(["b.count", "a.weight", "b.weight"])
    for name, tensor in found.items():
        assert torch.equal(tensor, (PARTS[0] | PARTS[1])[name])
    assert found["b.count"].dtype == torch.int64


def test_optimizer_state_comes_back_for_the_names_asked_for(tmp_path: Path):
    state = Reader(save(tmp_path / "checkpoint-3")).optimizer_state(["b.weight", "not.there"])
    assert state.step == 3
    assert {key: list(by_name) for key, by_name in state.moments.items()} == {
        "exp_avg": ["b.weight"],
        "exp_avg_sq": ["b.weight"],
    }
    assert torch.equal(state.moments["exp_avg"]["b.weight"], torch.full((4,), 20.0))


def test_a_tensor_that_is_missing_means_another_model(tmp_path: Path):
    reader = Reader(save(tmp_path / "checkpoint-3"))
    with pytest.raises(CheckpointError, match=r"another model: it has no 'c.weight'.*'a.weight'"):
        reader.tensors(["a.weight", "c.weight"])


def test_a_tensor_of_another_shape_means_another_model(tmp_path: Path):
    reader = Reader(save(tmp_path / "checkpoint-3"))
    with pytest.raises(CheckpointError, match=r"'a.weight' is \[2, 3\] there and \[3, 2\] here"):
        reader.tensors(["a.weight"], {"a.weight": (3, 2)})


def test_a_longer_model_is_another_model(tmp_path: Path):
    """Its first layers would fit by name and shape; the rest used to be left out without a word."""
    reader = Reader(save(tmp_path / "checkpoint-3"))
    reader.require_layers(4)
    with pytest.raises(CheckpointError, match="it has 4 layers, this one 3"):
        reader.require_layers(3)


def test_a_local_head_that_is_missing_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("scpl_ds"), "propagate", True)
    reader = Reader(save(tmp_path / "checkpoint-3"))
    found = reader.tensors(["a.weight", "scpl_heads.layer_0.weight"])
    assert list(found) == ["a.weight"]
    assert "has no local head for layer 0 (it was cut at layers [0, 2, 4])" in caplog.text


def test_a_save_that_fails_leaves_the_one_before_whole(tmp_path: Path):
    save(tmp_path / "checkpoint-3")
    with pytest.raises(KeyboardInterrupt), Writer(tmp_path / "checkpoint-3", is_coordinator=True):
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "latest"]
    Reader(tmp_path / "checkpoint-3").tensors(["a.weight"])


def test_a_kill_in_the_middle_leaves_the_one_before_as_the_latest(tmp_path: Path):
    save(tmp_path / "checkpoint-3")
    writer = Writer(tmp_path / "checkpoint-4", is_coordinator=True)
    writer.__enter__()  # and never left
    writer.write_stage(Share(0, PARTS[0], OptimizerState(4, {})))
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoint-3"


def test_saving_over_a_checkpoint_replaces_it(tmp_path: Path):
    save(tmp_path / "checkpoint-3")
    save(tmp_path / "checkpoint-3", step=9)
    assert Reader(tmp_path / "checkpoint-3").manifest["step"] == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "latest"]


def killed_while_replacing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save over ``folder``, with a kill after the one there was moved and before the new one is."""
    rename = Path.rename

    def until_the_second(path: Path, target: Path) -> Path:
        if target == folder:
            raise SystemExit
        return rename(path, target)

    writer = Writer(folder, is_coordinator=True)
    writer.__enter__()  # and never left
    for index, part in enumerate(PARTS):
        writer.write_stage(Share(index, part, OptimizerState(9, moments(part))))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "rename", until_the_second)
        writer.finish(step=9, bounds=(0, 2, 4), client_state={}, save_latest=True)
    assert not folder.exists()


@pytest.mark.parametrize("tag", ["checkpoint-3", "best"])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_one_before_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tag: str
):
    """It lay under a name that nothing looked for: `resume` said that there was no checkpoint."""
    monkeypatch.setattr(logging.getLogger("scpl_ds"), "propagate", True)
    save(tmp_path / tag)
    killed_while_replacing(tmp_path / tag, monkeypatch)
    for found in (
        checkpoint.resolve(tmp_path),
        checkpoint.resolve(tmp_path / tag),
        checkpoint.resolve(tmp_path, tag),
    ):
        assert Reader(found).manifest["step"] == 3
    assert f"{tag} was being replaced" in caplog.text


def test_the_last_complete_checkpoint_may_be_one_that_was_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for step in (2, 3):
        save(tmp_path / f"checkpoint-{step}", step=step)
    killed_while_replacing(tmp_path / "checkpoint-3", monkeypatch)
    steps = [Reader(path).manifest["step"] for path in checkpoint.completed(tmp_path)]
    assert steps == [2, 3]
    (tmp_path / "latest").unlink()
    assert Reader(checkpoint.resolve(tmp_path)).manifest["step"] == 3


def test_the_next_save_after_a_kill_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path / "checkpoint-3")
    killed_while_replacing(tmp_path / "checkpoint-3", monkeypatch)
    save(tmp_path / "checkpoint-3", step=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "latest"]
    assert Reader(tmp_path / "checkpoint-3").manifest["step"] == 4


def test_prune_removes_one_that_was_being_replaced_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path / "checkpoint-3")
    killed_while_replacing(tmp_path / "checkpoint-3", monkeypatch)
    for step in (4, 5):
        save(tmp_path / f"checkpoint-{step}", step=step)
    checkpoint.prune(tmp_path, 2)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-3.partial", "checkpoint-4", "checkpoint-5", "latest"}


def test_everybody_may_read_a_checkpoint(tmp_path: Path):
    folder = save(tmp_path / "checkpoint-3")
    assert {oct(path.stat().st_mode & 0o777) for path in folder.glob("*.safetensors")} == {"0o644"}


def test_the_checkpoint_of_a_run_folder_is_the_latest_one(tmp_path: Path):
    for step in (9, 10, 3):
        save(tmp_path / f"checkpoint-{step}", step=step)
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoint-3"
    assert checkpoint.resolve(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"
    assert checkpoint.resolve(tmp_path / "checkpoint-10") == tmp_path / "checkpoint-10"
    assert [path.name for path in checkpoint.completed(tmp_path)] == [
        "checkpoint-3", "checkpoint-9", "checkpoint-10",
    ]  # fmt: skip


def test_a_latest_that_is_gone_means_the_last_complete_one_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("scpl_ds"), "propagate", True)
    save(tmp_path / "checkpoint-3")
    (tmp_path / "latest").write_text("checkpoint-4")
    assert checkpoint.resolve(tmp_path) == tmp_path / "checkpoint-3"
    assert "checkpoint-4 is missing or incomplete" in caplog.text


def test_save_latest_false_leaves_latest_alone(tmp_path: Path):
    save(tmp_path / "checkpoint-3")
    save(tmp_path / "best", step=4, save_latest=False)
    assert (tmp_path / "latest").read_text().split()[0] == "checkpoint-3"
    assert checkpoint.resolve(tmp_path, "best") == tmp_path / "best"


@pytest.mark.parametrize("latest, kept", [(10, [9, 10]), (3, [3, 10])])
def test_prune_keeps_so_many_and_always_the_latest(tmp_path: Path, latest: int, kept: list[int]):
    for step in (3, 9, 10):
        save(tmp_path / f"checkpoint-{step}", step=step)
    (tmp_path / "latest").write_text(f"checkpoint-{latest}")
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.completed(tmp_path)] == [
        f"checkpoint-{step}" for step in kept
    ]


def test_prune_without_a_limit_keeps_all(tmp_path: Path):
    for step in (1, 2):
        save(tmp_path / f"checkpoint-{step}", step=step)
    checkpoint.prune(tmp_path, None)
    assert len(checkpoint.completed(tmp_path)) == 2


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("[]", "holds no mapping"),
        ("{", "is damaged"),
        (seal({"format": 9}), "format 9"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: str, word: str):
    folder = save(tmp_path / "checkpoint-3")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=word):
        Reader(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bytes", None), ("bounds", None), ("bounds", []), ("tensors", None), ("moments", 3),
        ("step", "3"), ("client_state", None),
    ],
)  # fmt: skip
def test_a_manifest_that_lacks_something_is_refused(tmp_path: Path, key: str, value: Any):
    """It ended in a KeyError."""
    folder = save(tmp_path / "checkpoint-3")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[key] = value
    if value is None:
        del manifest[key]
    del manifest["checksum"]
    (folder / "manifest.json").write_text(seal(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json is damaged: '{key}' is missing or"):
        Reader(folder)


def test_a_damaged_optimizer_file_is_refused(tmp_path: Path):
    """Its step count was read without a guard and ended in the safetensors library's traceback."""
    folder = save(tmp_path / "checkpoint-3")
    path = folder / "stage-1.optimizer.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match=r"stage-1.optimizer.safetensors is damaged"):
        Reader(folder).optimizer_state(["b.weight"])
    as_format_1(folder)
    with pytest.raises(CheckpointError, match=r"stage-1.optimizer.safetensors cannot be read"):
        Reader(folder).optimizer_state(["b.weight"])


def test_no_checkpoint_at_all_says_what_a_folder_should_hold(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no complete checkpoint-N folder"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.resolve(tmp_path / "nowhere")
