"""Which samples a run trains on that is interrupted twice, by a signal within an epoch, and goes on
with two data-parallel ranks and then one: step by step those of the run that never was."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.engine import Engine
from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.trainer import fit
from tests.recipes.test_faults import at_step
from tests.support import tiny_lm
from tests.support.distributed import run_ranks
from tests.support.tiny import DROP, put, recipe_for

pytestmark = pytest.mark.forks

Recipe = dict[str, Any]
Row = tuple[int, ...]
GLOBAL_BATCH, MICRO_BATCH, ROWS, EPOCHS = 8, 2, 64, 2
STEPS_PER_EPOCH = ROWS // GLOBAL_BATCH
STOPS = [(1, 2), (2, 10), (1, None)]
"""Data-parallel ranks, and the step in which a signal comes; its ranks agree within a few."""


def trained_on(recipe: Recipe, name: str, ranks: int, stop: int | None) -> list[list[Row]]:
    """Run a recipe; the rows of each step, without padding, that its ranks trained on."""
    run = Path(recipe["train"]["output_dir"])
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * ranks)
    asked = put(recipe, {"deepspeed.gradient_accumulation_steps": accumulation})

    def body() -> None:
        seen: list[list[list[int]]] = []
        count = Engine._count

        def noted(engine: Engine, inputs: Any) -> None:
            rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            seen.append([ids[mask.bool()].tolist() for ids, mask in rows])
            count(engine, inputs)

        Engine._count = noted  # in a fork
        rank = int(os.environ["RANK"])
        if stop is not None and rank == ranks - 1:
            at_step(stop, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        fit(recipe_from_mapping(asked))
        run.with_name(f"{name}-{rank}.json").write_text(json.dumps(seen))

    run_ranks(ranks, body)
    told = [json.loads(run.with_name(f"{name}-{rank}.json").read_text()) for rank in range(ranks)]
    assert len({len(each) for each in told}) == 1 and len(told[0]) % accumulation == 0
    blocks = [row for blocks in zip(*told, strict=True) for block in blocks for row in block]
    rows = [tuple(row) for row in blocks]
    return [rows[k : k + GLOBAL_BATCH] for k in range(0, len(rows), GLOBAL_BATCH)]


def grouped(base: Recipe, folder: Path) -> Callable[[str], Recipe]:
    changes = {"train.group_by_length": True, "train.num_train_epochs": EPOCHS}
    return lambda name: recipe_for(base, "ddp", folder / name, **changes)


def streamed(base: Recipe, folder: Path) -> Callable[[str], Recipe]:
    tiny_lm.save(folder / "model")
    lines = [json.dumps({"text": f"row {n:02d} " + "x" * (n % 7)}) + "\n" for n in range(ROWS)]
    (folder / "a.jsonl").write_text("".join(lines))
    changes = {
        "model": {"name_or_path": str(folder / "model"), "task": "causal-lm"},
        "data": {
            "name": "jsonl", "train": str(folder / "a.jsonl"), "max_length": 48,
            "streaming": True, "shuffle_buffer": 12,
        },
        "scpl.objective": {"name": "logit_lens", "calibration": 64},
        "train.num_train_epochs": DROP,
        "train.max_steps": EPOCHS * STEPS_PER_EPOCH,
    }  # fmt: skip
    return lambda name: recipe_for(base, "ddp", folder / name, **changes)


@pytest.mark.parametrize("make", [grouped, streamed], ids=["grouped", "streamed"])
def test_a_run_that_is_stopped_twice_trains_on_the_samples_of_one_that_is_not(
    base: Recipe, tmp_path: Path, make: Callable[[Recipe, Path], Callable[[str], Recipe]]
) -> None:
    common = {
        "scpl.pipeline_ranks": 1, "deepspeed.train_micro_batch_size_per_gpu": MICRO_BATCH,
        "train.eval_strategy": "no", "train.save_strategy": "no", "train.save_steps": DROP,
        "train.export": False, "train.resume_from_checkpoint": "auto",
    }  # fmt: skip
    recipe = make(put(base, common), tmp_path)
    whole = trained_on(recipe("whole"), "whole", 1, None)
    parts = [
        trained_on(recipe("stopped"), f"part-{number}", ranks, stop)
        for number, (ranks, stop) in enumerate(STOPS)
    ]
    lengths = [len(part) for part in parts]
    cuts = list(itertools.accumulate(lengths))
    assert all(cut % STEPS_PER_EPOCH for cut in cuts[:-1]), lengths  # within an epoch
    found = list(itertools.chain(*parts))
    assert len(found) == len(whole) == EPOCHS * STEPS_PER_EPOCH
    assert found == whole
    epochs = [
        sorted(itertools.chain(*found[k : k + STEPS_PER_EPOCH]))
        for k in range(0, len(found), STEPS_PER_EPOCH)
    ]
    assert len(set(epochs[0])) > 0.9 * ROWS and epochs == [epochs[0]] * EPOCHS
