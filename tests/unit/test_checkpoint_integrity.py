"""A checkpoint of which a bit has changed is refused, and the file and another checkpoint named."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from scpl_ds import checkpoint
from scpl_ds.checkpoint import Reader
from scpl_ds.checkpoint_files import sealed_name, share_out, unsealed_name
from scpl_ds.errors import CheckpointError
from tests.unit.test_checkpoint import PARTS, as_format_1, save

WORD = "Resume with train.resume_from_checkpoint="


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of which ``latest`` names the second; its files lie in this folder."""
    source = tmp_path / "files"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "bert"}')
    save(tmp_path / "checkpoint-2", step=2)
    return save(tmp_path / "checkpoint-3", model_files=source)


def read_all(folder: Path) -> None:
    """What resuming a run does."""
    reader = Reader(checkpoint.resolve(folder))
    reader.verify()
    reader.tensors(reader.names())
    reader.optimizer_state(reader.names())


def flipped(path: Path, *, all_bits: bool = False) -> Iterator[str]:
    """The file with one bit changed: one of each byte, or all of them; whole again afterwards."""
    whole, draw = path.read_bytes(), random.Random(3)
    for at in range(len(whole)):
        for bit in range(8) if all_bits else [draw.randrange(8)]:
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            yield f"byte {at}, bit {bit} of {path.name}"
    path.write_bytes(whole)


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json", "stage-0.safetensors", "stage-1.safetensors",
        "stage-0.optimizer.safetensors", "stage-1.optimizer.safetensors", "model/config.json",
    ],
)  # fmt: skip
def test_a_changed_bit_anywhere_is_refused_and_the_file_and_another_checkpoint_named(
    folder: Path, name: str
):
    read_all(folder)
    for where in flipped(folder / name):
        with pytest.raises(CheckpointError) as caught:
            read_all(folder)
        assert str(folder / name) in str(caught.value), where
        assert f"{WORD}{folder.parent / 'checkpoint-2'}" in str(caught.value), where
    read_all(folder)


def test_every_changed_bit_of_latest_is_refused(folder: Path):
    """One bit makes of `checkpoint-3` `checkpoint-2`, which is there and complete."""
    for where in flipped(folder.parent / "latest", all_bits=True):
        with pytest.raises(CheckpointError) as caught:
            read_all(folder.parent)
        assert str(folder.parent / "latest") in str(caught.value), where
        assert f"{WORD}{folder}" in str(caught.value), where
    read_all(folder.parent)


@pytest.mark.parametrize("name", ["checkpoint-3", "best", "with space", "cafe-0123456789abcdef"])
def test_latest_may_be_written_by_hand_in_one_line_unless_it_looks_like_a_torn_seal(name: str):
    assert unsealed_name(sealed_name(name).encode()) == name
    torn = name.endswith("0123456789abcdef")
    for hand in (name, f"{name}\n"):
        assert unsealed_name(hand.encode()) == (None if torn else name)


def test_no_tensor_of_a_damaged_file_is_given_out_even_unasked_for(folder: Path):
    """Without `verify` each file is compared before its first tensor is read."""
    path = folder / "stage-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    reader = Reader(folder)
    assert torch.equal(reader.tensors(["a.weight"])["a.weight"], PARTS[0]["a.weight"])
    with pytest.raises(CheckpointError, match=r"stage-1\.safetensors is damaged"):
        reader.tensors(["b.weight"])


def test_a_checkpoint_of_the_first_format_still_loads(folder: Path):
    as_format_1(folder)
    assert checkpoint.resolve(folder.parent) == folder
    read_all(folder.parent)
    found = Reader(folder).tensors(["a.weight", "b.weight"])
    assert torch.equal(found["b.weight"], PARTS[1]["b.weight"])


def test_ranks_share_the_comparing_and_leave_no_file_out(folder: Path):
    parts = [set(Reader(folder).verify(share=n, shares=3)) for n in range(3)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 5
    assert not [n for n in Reader(folder).verify(with_optimizer=False) if "optimizer" in n]


def test_names_are_shared_out_by_bytes():
    sizes = {"a": 9, "b": 5, "c": 4, "d": 1, "e": 1}
    owner = share_out(sizes, 2)
    assert [sum(sizes[n] for n in sizes if owner[n] == part) for part in (0, 1)] == [10, 10]
    assert share_out(sizes, 1) == dict.fromkeys(sizes, 0)
