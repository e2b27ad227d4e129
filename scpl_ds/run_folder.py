"""The run folder: what lies in it, and how an earlier run in the same place is kept."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scpl_ds import checkpoint
from scpl_ds import lock as lock_file
from scpl_ds.checkpoint import write_text
from scpl_ds.checkpoint_disk import writing
from scpl_ds.errors import RecipeError
from scpl_ds.lock import RunLock
from scpl_ds.recipe import Recipe, load_recipe

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "safetensors", "wandb")


LAUNCH = "launch"
"""File with the names of what started the run, and of the run itself."""


def launches(environ: Mapping[str, str] = os.environ) -> dict[str, bool]:
    """What started this process, the same when it starts it again -> whether it has done so."""
    found = {}
    if "TORCHELASTIC_RUN_ID" in environ:  # torchrun's own process is this one's parent
        name = f"torchrun {environ['TORCHELASTIC_RUN_ID']} {platform.node()} {os.getppid()}"
        found[name] = int(environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if "SLURM_JOB_ID" in environ:
        name = f"slurm {environ['SLURM_JOB_ID']}"
        found[name] = int(environ.get("SLURM_RESTART_COUNT", 0)) > 0
    return found


class RunFolder:
    """``recipe.yaml plan.txt about.json model/ logs/ metrics.jsonl checkpoint-N/ latest export/
    profile/ result.json``."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def model_files(self) -> Path:
        """config.json and tokenizer, as the export will have them."""
        return self.path / "model"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def log_file(self, rank: int) -> Path:
        return self.path / "logs" / f"rank{rank}.log"

    @property
    def profile(self) -> Path:
        """``trace.json``, ``timeline.svg`` and ``shares.json``, with ``train.profile``."""
        return self.path / "profile"

    @property
    def plan(self) -> Path:
        """The start banner: partition table, schedule, what is predicted."""
        return self.path / "plan.txt"

    @property
    def about(self) -> Path:
        """What was known before the first step, for programs."""
        return self.path / "about.json"

    def starts(self) -> list[dict[str, Any]]:
        """When, and after which step, the run here was begun or gone on with; empty where nobody
        wrote it down."""
        try:
            return list(json.loads(self.about.read_text(encoding="utf-8"))["starts"])
        except (OSError, ValueError, TypeError, KeyError):
            return []

    def is_run(self) -> bool:
        """Whether a run was started here; a recipe.yaml alone may be anybody's."""
        return self.recipe.is_file() and self.plan.is_file()

    def check(self) -> None:
        """Refuse a place where no run folder can be, or where one would overwrite something.

        Raises:
            RecipeError: A file is in the way, it cannot be written, or the recipe.yaml in it is
                not of a run.
        """
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if os.path.lexists(p))
        if not nearest.is_dir():
            raise RecipeError(f"train.output_dir: {nearest} is a file, not a folder; name another.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RecipeError(
                f"train.output_dir: {self.path} cannot be made, {nearest} is not writable; "
                "name another."
            )
        if self.recipe.exists() and not self.is_run():
            raise RecipeError(
                f"train.output_dir: {self.path} holds a recipe.yaml that is not of a run; it would "
                "be overwritten. Name a folder of its own, such as runs/mine."
            )

    def resume_point(self, recipe: Recipe) -> Path | None:
        """The checkpoint that ``train.resume_from_checkpoint`` means; None: the run starts anew.
        On the coordinating rank.

        ``true``: the latest of this folder; ``auto``: that one, if there is a complete one; a path:
        the one there. Whatever it says, a run that its launcher has started again (torchrun,
        SLURM), under the same recipe, goes on from the latest that it has written.

        Raises:
            CheckpointError: There is none where one was asked for.
        """
        asked, complete = recipe.train.resume_from_checkpoint, checkpoint.completed(self.path)
        if complete and self._is_restart(recipe):
            log.warning("Started again by its launcher: going on from the latest in %s.", self.path)
            asked = True
        if asked is False or (asked == "auto" and not complete):
            return None
        return checkpoint.resolve(self.path if asked in (True, "auto") else Path(asked))

    def _is_restart(self, recipe: Recipe) -> bool:
        try:
            run, *before = (self.path / LAUNCH).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return False
        again = [name for name, restarted in launches().items() if restarted]
        return run == recipe.fingerprint() and not set(again).isdisjoint(before)

    def prepare(self, recipe: Recipe, *, resuming: bool, lock: RunLock) -> None:
        """Make the folder on the coordinating rank, and take its lock; an earlier run there is
        moved aside, not lost.

        Raises:
            RecipeError: Another run is training in it.
        """
        if not resuming and self.is_run():
            lock.take()
            aside = self._free_name()
            self.path.resolve().rename(aside)
            (aside / lock_file.NAME).unlink()
            log.warning("%s held an earlier run; it is kept as %s.", self.path, aside)
        self.path.mkdir(parents=True, exist_ok=True)
        lock.take()
        self.result.unlink(missing_ok=True)  # of the run that this one goes on with
        write_text(self.path / LAUNCH, "\n".join([recipe.fingerprint(), *launches()]) + "\n")
        write_text(self.recipe, recipe.to_yaml())

    def _free_name(self) -> Path:
        path, number = self.path.resolve(), 1
        while (name := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        return name

    def write_result(self, result: Mapping[str, Any]) -> None:
        text = json.dumps(dict(result), indent=2)
        left = f"The run has ended, and its checkpoints are whole; it says: {text}"
        with writing(self.result, then=left):
            write_text(self.result, text + "\n")


def open_run(path: str | Path, overrides: list[str] | None = None) -> tuple[RunFolder, Recipe]:
    """A finished or interrupted run and the recipe it was run with.

    Raises:
        RecipeError: ``path`` is no run folder.
    """
    run = RunFolder(Path(path))
    if not run.recipe.is_file():
        raise RecipeError(
            f"{path} is not a run folder (it has no recipe.yaml). `scpl-ds train RECIPE` makes "
            "one; name it as train.output_dir says, runs/<recipe> by default. A checkpoint of "
            "engine.save_checkpoint is exported with `scpl-ds export CHECKPOINT OUT --task ...`."
        )
    # Quoted: the value is YAML, and a path may hold anything.
    where = f"train.output_dir={json.dumps(str(run.path))}"
    return run, load_recipe(run.recipe, [where, *(overrides or [])])


def result_of(folder: Path) -> dict[str, Any] | None:
    """What ``result.json`` of a run says, if its scores are of the export of this checkpoint."""
    try:
        result = json.loads((folder.parent / "result.json").read_text(encoding="utf-8"))
        best = result.get("best_model_checkpoint")
        named = f"checkpoint-{result['steps']}" if best is None else Path(best).name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if named == folder.name and result.get("export_dir") else None


def versions() -> dict[str, str]:
    """Installed versions of what determines the numbers, and ``scpl_ds_commit`` where scpl_ds runs
    from its repository: with ``-dirty`` when files there differ from that commit."""
    found = {}
    for name in ("scpl-ds", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if (commit := _own_commit()) is not None:
        found["scpl_ds_commit"] = commit
    return found


@functools.cache
def _own_commit() -> str | None:
    """Asked once a process: every save wants it, and git is another process."""
    repository = Path(__file__).parents[1]
    # Installed elsewhere, the folder may lie inside a repository that is not ours.
    if not (repository / ".git").exists():
        return None
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *describe],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
