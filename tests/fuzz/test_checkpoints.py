"""Whatever is done to a checkpoint, what is read is what was saved, or a ``ScplError`` says that it
is damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from scpl_ds.checkpoint import MANIFEST, Reader, resolve
from scpl_ds.export import export_checkpoint
from scpl_ds.optim import OptimizerState
from tests.support import tiny
from tests.support.mutations import hunt, mutate_bytes, mutate_tree
from tests.support.tiny import put, recipe_for, train

CASES = 700
EXPORTED = 0.05
"""Share that is exported as well, and RESUMED cases are trained on from."""
RESUMED = 10
ACCEPTED_IN_SILENCE: frozenset[str] = frozenset()
"""Kinds of damage that no checksum shows: none. A damaged checkpoint that is read without a word
fails the test."""


class Saved(NamedTuple):
    """A run with two checkpoints, and what the second (and first) holds."""

    run: Path
    recipe: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]]
    optimizer: dict[str, OptimizerState]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two stages with a local head, saved after steps 3 and 6, and at the end."""
    folder = tmp_path_factory.mktemp("saved")
    changes = {"train.save_steps": 3, "train.max_steps": 6, "train.eval_strategy": "no"}
    base = put(tiny.make(folder), {**changes, "scpl.objective": {"name": "supcon"}})
    recipe = recipe_for(base, "none", folder / "run")
    assert train(recipe) == 0
    tensors, optimizer = {}, {}
    for name in ("checkpoint-3", "checkpoint-6"):
        reader = Reader(folder / "run" / name)
        tensors[name] = reader.tensors(reader.names())
        optimizer[name] = reader.optimizer_state(reader.names())
    assert optimizer["checkpoint-6"].step == 6 and optimizer["checkpoint-6"].moments
    return Saved(folder / "run", recipe, tensors, optimizer)


# -- damage ----------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def weights_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def changed_bytes(rng: random.Random, folder: Path) -> str:
    path = rng.choice(
        [*files_of(folder), *weights_of(folder), *weights_of(folder), folder / MANIFEST]
    )
    what, content = mutate_bytes(rng, path.read_bytes())
    path.write_bytes(content)
    return f"{path.name}: {what}"


def same_size(rng: random.Random, folder: Path) -> str:
    path = rng.choice(weights_of(folder))
    content = bytearray(path.read_bytes())
    limit = rng.choice((8, 400, len(content)))  # the length of the header, the header, all
    for _ in range(rng.choice((1, 3, 40))):
        content[rng.randrange(limit)] = rng.randrange(256)
    path.write_bytes(content)
    return f"{path.name}: bytes below {limit}"


def changed_header(rng: random.Random, folder: Path) -> str:
    """A header that says something else, and a manifest with the new sizes."""
    path = rng.choice(weights_of(folder))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    what, header = mutate_tree(rng, json.loads(content[8 : 8 + length]))
    text = json.dumps(header, default=str, skipkeys=True).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest.get("bytes", {}):
        manifest["bytes"][name] = (folder / name).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return f"header of {path.name}: {what}"


def changed_manifest(rng: random.Random, folder: Path) -> str:
    path = folder / MANIFEST
    what, tree = mutate_tree(rng, json.loads(path.read_text()))
    path.write_text(json.dumps(tree, default=str, skipkeys=True))
    return f"manifest: {what}"


def lost(rng: random.Random, folder: Path) -> str:
    path = rng.choice(files_of(folder))
    path.unlink()
    if rng.random() < 0.2:
        path.mkdir()
    return f"{path.name} lost"


def exchanged(rng: random.Random, folder: Path) -> str:
    first, second = rng.sample(weights_of(folder), 2)
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{first.name} and {second.name} exchanged"


def of_another_step(rng: random.Random, folder: Path) -> str:
    """A copy that was interrupted: some files are of the checkpoint before."""
    path = rng.choice(weights_of(folder))
    shutil.copy(folder.parent / "checkpoint-3" / path.name, path)
    return f"{path.name} of step 3"


def latest(rng: random.Random, folder: Path) -> str:
    path = folder.parent / "latest"
    what, content = mutate_bytes(rng, path.read_bytes())
    path.write_bytes(content)
    return f"latest: {what}: {content[:60]!r}"


DAMAGES = (
    changed_bytes, changed_bytes, same_size, same_size, changed_header, changed_header,
    changed_manifest, changed_manifest, changed_manifest, lost, exchanged, of_another_step, latest,
)  # fmt: skip


# -- reading ---------------------------------------------------------------------------------


def difference(saved: Saved, run: Path) -> str | None:
    """What of the checkpoint that is read is not as it was saved."""
    reader = Reader(resolve(run))
    name = reader.folder.name
    wanted, moments = saved.tensors[name], saved.optimizer[name]
    reader.require_layers(4)
    found = reader.tensors(wanted, {n: t.shape for n, t in wanted.items()})
    state = reader.optimizer_state(wanted)
    for key, tensor in wanted.items():
        if key not in found or not _equal(found[key], tensor):
            return f"{name} was accepted, but {key} is not as it was saved"
    if (state.step, state.loss_scale) != (moments.step, moments.loss_scale):
        return (
            f"{name} was accepted with optimizer step {state.step}, loss scale {state.loss_scale}"
        )
    if state.moments.keys() != moments.moments.keys():
        return f"{name} was accepted with the moments {list(state.moments)}"
    for moment, tensors in moments.moments.items():
        for key, tensor in tensors.items():
            if not _equal(state.moments[moment].get(key), tensor):
                return f"{name} was accepted, but {moment} of {key} is not as it was saved"
    return None


def _equal(found: torch.Tensor | None, wanted: torch.Tensor) -> bool:
    if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def copied(saved: Saved, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(saved.run, target)
    return target


def excused(folder: Path, before: dict[str, int], damage: Callable[..., str]) -> bool:
    """Whether only a checksum could show the damage."""
    if damage is latest:
        return False
    sizes = {p.name: p.stat().st_size for p in weights_of(folder)}
    manifest = damage in (changed_manifest, changed_header) or (
        damage is changed_bytes and sizes == before
    )
    kind = "manifest" if manifest else "bytes"
    return kind in ACCEPTED_IN_SILENCE and (manifest or sizes == before)


@pytest.mark.timeout(1200)  # for a machine that does much else
def test_a_damaged_checkpoint_is_refused_or_read_as_it_was_saved(saved: Saved, tmp_path: Path):
    silent: list[str] = []
    whole = {p.name: p.stat().st_size for p in weights_of(saved.run / "checkpoint-6")}

    def draw(rng: random.Random) -> tuple[str, Callable[[], str | None]]:
        run = copied(saved, tmp_path / "run")
        folder = run / "checkpoint-6"
        damage = rng.choice(DAMAGES)
        what = damage(rng, folder)
        export = rng.random() < EXPORTED

        def work() -> str | None:
            wrong = difference(saved, run)
            if wrong is not None and excused(folder, whole, damage):
                silent.append(f"{what}: {wrong}")
                wrong = None
            if export:
                out = tmp_path / "out"
                shutil.rmtree(out, ignore_errors=True)
                export_checkpoint(resolve(run), out, task="sequence-classification")
            return wrong

        return what, work

    try:
        outcomes = hunt("checkpoints", CASES, draw)
    finally:
        if os.environ.get("SCPL_FUZZ_SHOW"):
            print(len(silent), "accepted in silence", *silent, sep="\n")
    assert outcomes["CheckpointError"] > outcomes.total() / 4, outcomes
    if os.environ.get("SCPL_FUZZ_SHOW"):
        print(outcomes)


@pytest.mark.timeout(1200)  # for a machine that does much else
def test_a_run_goes_on_from_a_damaged_checkpoint_or_says_why_not(
    saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def draw(rng: random.Random) -> tuple[str, Callable[[], str | None]]:
        run = copied(saved, tmp_path / "run")
        recipe = put(saved.recipe, {"train.output_dir": str(run), "train.max_steps": 8})
        damage = rng.choice((changed_manifest, changed_manifest, changed_header, latest, lost))
        what = damage(rng, run / "checkpoint-6")

        def work() -> str | None:
            code = train(recipe, "train.resume_from_checkpoint=true")
            return None if code in (0, 1, 2) else f"exit code {code}"

        return what, work

    hunt("resumed", RESUMED, draw)
    capsys.readouterr()
