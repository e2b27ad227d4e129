"""Does a run that is killed over and over end where an uninterrupted one ends?"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from scpl_ds import checkpoint
from scpl_ds.checkpoint_files import unsealed_name
from scpl_ds.distributed.file_world import join_file_world
from scpl_ds.distributed.world import RankEnv
from scpl_ds.errors import CheckpointError, ScplError
from scpl_ds.partition.random_model import write_random_model
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.trainer import fit

log = logging.getLogger(__name__)

RANKS = 2
STEPS, SAVE_STEPS = 40, 4
_WORDS = [f"word{number}" for number in range(60)]
_ROWS = 160
_LIMIT_S = 120.0
"""A rank that outlives a killed one for so long is ended, and counted with this."""
_JOINED = "joined-"
"""File of a rank that is in the world. One that waits for another to come in waits until the
timeout, or until a launcher ends it: there is none here, so nobody is killed before."""
_SAVING_S = 0.03
"""A kill in a save comes up to so long after its first file has been seen."""


@dataclasses.dataclass
class Figures:
    """What ``--json`` gets."""

    kills: int = 0
    in_saves: int = 0
    """Of them, while a checkpoint was being written or moved."""
    lost: int = 0
    """Kills after which the last complete checkpoint was gone or could not be read."""
    max_exit_seconds: float = 0.0
    """From a kill to the end of the last of the other ranks."""
    wrong_exits: int = 0
    """Ranks that ended with code 0 though the run was not done."""
    runs: int = 0
    """Runs that got to their end, and were compared."""
    bitwise_equal: bool | None = None
    """Whether all of them ended with the parameters and local heads of the uninterrupted run."""


def main(args: argparse.Namespace, save: Callable[[Any], None]) -> str:
    """Kill until there have been ``--kills``; then let the last run end.

    Raises:
        ScplError: A run failed although nobody was killed.
    """
    draw, figures = random.Random(args.seed), Figures()
    torch.set_num_threads(1)  # a fork would inherit the locks of threads, but not the threads
    with tempfile.TemporaryDirectory(prefix="scpl-chaos-") as name:
        folder = Path(name)
        _write_inputs(folder)
        began = time.monotonic()
        with _Life(folder, "whole") as life:
            life.wait()
        whole_s = time.monotonic() - began
        wanted = _result(folder / "whole")
        log.info("an uninterrupted run took %.1f s; now %d kills", whole_s, args.kills)
        while figures.kills < args.kills or figures.runs == 0:
            run = f"run-{figures.runs}"
            while figures.kills < args.kills:
                with _Life(folder, run) as life:
                    if not _kill(life, draw, whole_s, figures):
                        break
                save(dataclasses.asdict(figures))
                log.info("%s", json.dumps(dataclasses.asdict(figures)))
            else:
                with _Life(folder, run) as life:
                    life.wait()
            figures.runs += 1
            equal = _same(_result(folder / run), wanted)
            figures.bitwise_equal = equal and figures.bitwise_equal is not False
            save(dataclasses.asdict(figures))
    return json.dumps(dataclasses.asdict(figures))


class _Life:
    """The ranks of a run, from a start to an end or a kill."""

    def __init__(self, folder: Path, run: str) -> None:
        self.run = folder / run
        self.run.mkdir(exist_ok=True)
        self.recipe = _recipe(folder, self.run)
        fork = multiprocessing.get_context("fork")
        store = Path(tempfile.mkdtemp(dir=folder)) / "store"
        self._meeting = store.parent
        # Beside it: what has no checkpoint yet is moved aside at the next start.
        self.logs = [folder / f"{run}-{rank}.log" for rank in range(RANKS)]
        self.ranks: list[ForkProcess] = []
        for rank, file in enumerate(self.logs):
            process = fork.Process(target=_rank, args=(self.recipe, rank, store, file), daemon=True)
            process.start()
            self.ranks.append(process)

    def __enter__(self) -> _Life:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def begun(self) -> bool:
        """Whether all ranks are in the world."""
        return len(list(self._meeting.glob(f"{_JOINED}*"))) == RANKS

    def running(self) -> bool:
        return all(rank.exitcode is None for rank in self.ranks)

    def wait(self) -> None:
        """To the end of the run."""
        for rank in self.ranks:
            rank.join()
        codes = [rank.exitcode for rank in self.ranks]
        if any(codes):
            said = "\n".join(file.read_text(errors="replace")[-1500:] for file in self.logs)
            raise ScplError(f"nobody was killed, but the ranks ended with codes {codes}:\n{said}")

    def named(self) -> int:
        """Step of the checkpoint that ``latest`` names; -1: there is none."""
        try:
            name = unsealed_name((self.run / checkpoint.LATEST).read_bytes())
        except OSError:
            return -1
        if name is None:  # then it is lost
            raise ScplError(f"{self.run / checkpoint.LATEST} is damaged.")
        return int(name.rpartition("-")[2])

    def step(self) -> int:
        """Of the last complete checkpoint; -1: there is none that can be read."""
        try:
            reader = checkpoint.Reader(checkpoint.resolve(self.run))
            reader.verify()
            reader.tensors(reader.names())
            reader.optimizer_state(reader.names())
        except CheckpointError:
            return -1
        return int(reader.manifest["step"])


def _kill(life: _Life, draw: random.Random, whole_s: float, figures: Figures) -> bool:
    """Kill a rank at a random moment; False: the run was done before."""
    in_save = draw.random() < 0.5
    victim = life.ranks[draw.randrange(RANKS)]
    while life.running() and not life.begun():
        time.sleep(0.002)
    if in_save:
        for _ in range(draw.randint(1, 3)):
            _next_save(life)
        time.sleep(draw.uniform(0, _SAVING_S))
    else:
        deadline = time.monotonic() + draw.uniform(0, whole_s)
        while life.running() and time.monotonic() < deadline:
            time.sleep(0.002)
    before = life.named()
    victim.kill()
    killed = time.monotonic()
    for rank in life.ranks:
        rank.join(max(0.0, killed + _LIMIT_S - time.monotonic()))
        if rank.exitcode is None:
            rank.kill()
            rank.join()
    if victim.exitcode != -9:
        life.wait()  # it had ended: the run was done
        return False
    figures.kills += 1
    figures.in_saves += in_save
    figures.max_exit_seconds = max(figures.max_exit_seconds, time.monotonic() - killed)
    done = (life.run / "result.json").exists()
    figures.wrong_exits += sum(rank.exitcode == 0 for rank in life.ranks) * (not done)
    figures.lost += life.step() < before
    return True


def _next_save(life: _Life) -> None:
    """Until something changes among the checkpoints."""

    def seen() -> set[str]:
        try:
            return {name for name in os.listdir(life.run) if "checkpoint-" in name}
        except FileNotFoundError:  # just being moved aside
            return set()

    first = seen()
    while life.running() and seen() == first:
        time.sleep(0.001)


def _rank(recipe: Recipe, rank: int, store: Path, file: Path) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    join_file_world(RankEnv(rank, RANKS, rank, RANKS), store, timeout_s=recipe.scpl.timeout_s)
    (store.parent / f"{_JOINED}{rank}").touch()
    fit(recipe)


def _result(run: Path) -> dict[str, torch.Tensor]:
    """Parameters and local heads of a run that has ended."""
    files = sorted((run / "export").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in wanted.items()
    )


# -- a run small enough to be begun a hundred times ----------------------------------------


def _recipe(folder: Path, run: Path) -> Recipe:
    return recipe_from_mapping(
        {
            "model": {"name_or_path": str(folder / "model"), "num_labels": 2},
            "scpl": {"stages": RANKS, "sharding": "none", "objective": {"name": "supcon"}},
            "deepspeed": {
                "train_micro_batch_size_per_gpu": 8,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.01}},
            },
            "data": {
                "name": "csv",
                "train_file": str(folder / "train.csv"),
                "eval_file": str(folder / "eval.csv"),
                "max_length": 16,
            },
            "train": {
                "output_dir": str(run),
                "max_steps": STEPS,
                "save_steps": SAVE_STEPS,
                "save_total_limit": 2,
                "eval_strategy": "no",
                "resume_from_checkpoint": "auto",
                "disable_tqdm": True,
            },
            "trackers": [],
        }
    )


def _write_inputs(folder: Path) -> None:
    model = folder / "model"
    write_random_model("bert-tiny", model)
    special = ["[PAD]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate((*special, *_WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.save(str(model / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": special[0],
        "unk_token": special[1],
        "model_max_length": 32,
    }
    (model / "tokenizer_config.json").write_text(json.dumps(about))
    draw = random.Random(0)
    for name, rows in (("train", _ROWS), ("eval", 8)):
        _write_rows(folder / f"{name}.csv", [_row(draw, number % 2) for number in range(rows)])


def _row(draw: random.Random, label: int) -> tuple[str, int]:
    half = len(_WORDS) // 2
    own = _WORDS[label * half : (label + 1) * half]
    words = draw.choices(_WORDS, k=draw.randint(2, 8)) + draw.choices(own, k=3)
    return " ".join(words), label


def _write_rows(path: Path, rows: Sequence[tuple[str, int]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)
