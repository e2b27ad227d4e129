"""Language models in stages: what streams is what one process trains, packed or padded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scpl_ds
from scpl_ds.errors import RecipeError
from tests.support import runs, tiny_lm
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks

TOKEN_LEVEL: dict[str, Any] = {
    "token_supcon": {"name": "token_supcon", "positions": 16},
    "prototype": {"name": "prototype", "positions": 24},
    "logit_lens": {"name": "logit_lens", "positions": 16, "calibration": 64},
    "sum": [{"name": "logit_lens", "calibration": 64}, {"name": "reconstruction", "weight": 0.1}],
}
MORE: dict[str, dict[str, Any]] = {
    "freeze": {"objective": TOKEN_LEVEL["logit_lens"], "freeze_stages": 1},
}
STEPS = 6


def batches(*, packed: bool = False, seed: int = 3) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        ids = torch.randint(1, 257, (4, 12), generator=generator)
        if packed:
            starts = torch.tensor([[*range(5), *range(7)]] * 4)
            labels = ids.masked_fill(starts == 0, -100)
            yield {"input_ids": ids, "position_ids": starts, "labels": labels}
            continue
        mask = torch.ones_like(ids)
        mask[1:, 9:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def engine(stages: int, objective: Any, *, tied: bool = True, **options: Any) -> scpl_ds.Engine:
    config = runs.config(stages, objective=objective, **options)
    model = tiny_lm.model(dropout=0.1 if tied else 0.0, tied=tied)
    return scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [*TOKEN_LEVEL, *MORE])
def test_a_language_model_streamed_over_ranks_is_the_one_trained_in_one_process(
    name: str, packed: bool, tmp_path: Path
) -> None:
    def train() -> None:
        running = engine(2, **(MORE.get(name) or {"objective": TOKEN_LEVEL[name]}))
        data = batches(packed=packed)
        for _ in range(STEPS):
            running.train_batch(data)
        found = runs.weights_of_engine(running)
        torch.save(found, tmp_path / f"{running.mesh.world_size}-{running.mesh.rank}.pt")

    run_ranks(1, train)
    run_ranks(2, train)
    wanted = torch.load(tmp_path / "1-0.pt")
    assert any("scpl_heads" in key for key in wanted) == (name != "freeze")
    found = torch.load(tmp_path / "2-0.pt") | torch.load(tmp_path / "2-1.pt")
    assert found.keys() == wanted.keys()
    runs.assert_equal(found, wanted)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_backpropagation_over_stages_of_a_language_model_is_that_of_the_whole(
    schedule: str, tmp_path: Path
) -> None:
    def train() -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        way = {"method": "bp"} | ({"schedule": schedule} if ranks > 1 else {})
        running = engine(ranks, "logit_lens", tied=False, accumulation=2, **way)
        data = batches()
        for _ in range(STEPS):
            running.train_batch(data)
        torch.save(runs.weights_of_engine(running), tmp_path / f"{ranks}-{running.mesh.rank}.pt")

    run_ranks(1, train)
    run_ranks(2, train)
    wanted = torch.load(tmp_path / "1-0.pt")
    found = torch.load(tmp_path / "2-0.pt") | torch.load(tmp_path / "2-1.pt")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_language_model_that_names_no_objective_learns_through_a_lens() -> None:
    def body() -> None:
        config = runs.config(2)
        del config["scpl"]["objective"]
        config["scpl"]["pipeline_ranks"] = 1
        running = scpl_ds.initialize(model=tiny_lm.model(), config=config, seed=runs.SEED).engine
        assert [type(s.module.objective).__name__ for s in running.stages] == [
            "LogitLens",
            "NoneType",
        ]

    run_ranks(1, body)


def test_what_is_borrowed_is_neither_trained_nor_saved() -> None:
    def body() -> None:
        running = engine(2, TOKEN_LEVEL["prototype"], pipeline_ranks=1)
        head = running.stages[0].module.objective
        assert head is not None
        (lent,) = [b for b in head.buffers() if b.shape == (257, 32)]
        before = lent.clone()
        data = batches()
        for _ in range(2):
            running.train_batch(data)
        torch.testing.assert_close(lent, before, rtol=0, atol=0)
        names = runs.weights_of_engine(running)
        assert not any(t.shape == (257, 32) for n, t in names.items() if "scpl_heads" in n)

    run_ranks(1, body)


def test_an_objective_for_classes_says_what_a_language_model_takes() -> None:
    def body() -> None:
        running = engine(2, {"name": "supcon"}, pipeline_ranks=1)
        with pytest.raises(RecipeError, match="causal-lm"):
            running.train_batch(batches())

    run_ranks(1, body)


def recipe(folder: Path, **data: Any) -> dict[str, Any]:
    model = tiny_lm.save(folder / "model")
    text = "the cat sat on the mat. a dog ran to the red house. " * 40
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text[: len(text) // 8])
    return {
        "model": {"name_or_path": str(model), "task": "causal-lm"},
        "scpl": {"stages": 2, "sharding": "none",
                "objective": {"name": "logit_lens", "calibration": 64},},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        },
        "data": {
            "name": "text", "train": str(folder / "a.txt"), "eval": str(folder / "b.txt"),
            "max_length": 48, **data,
        },
        "train": {"num_train_epochs": 12, "output_dir": str(folder / "run"), "disable_tqdm": True},
    }  # fmt: skip


def test_polish_ends_with_backpropagation_also_where_weights_were_tied(tmp_path: Path) -> None:
    def body() -> None:
        from scpl_ds.recipe import recipe_from_mapping
        from scpl_ds.trainer import fit

        asked = recipe(tmp_path)
        asked["scpl"]["polish"] = 0.5
        asked["train"]["num_train_epochs"] = 6
        found = fit(recipe_from_mapping(asked))
        assert found["eval_perplexity"] < 20
        assert found["eval_perplexity"] == pytest.approx(found["stage_eval_perplexity"], rel=1e-4)

    run_ranks(1, body)


@pytest.mark.parametrize("packing", [False, True])
def test_a_recipe_trains_scores_exports_and_speaks(tmp_path: Path, packing: bool) -> None:
    def body() -> None:
        from scpl_ds import checkpoint
        from scpl_ds.generation import generate
        from scpl_ds.recipe import recipe_from_mapping
        from scpl_ds.trainer import fit

        asked = recipe_from_mapping(recipe(tmp_path, packing=packing))
        result = fit(asked)
        assert result["eval_perplexity"] < 8  # 257 tokens, of which 20 occur
        assert result["eval_perplexity"] == pytest.approx(result["stage_eval_perplexity"], rel=1e-4)
        (text,) = generate(
            asked, checkpoint.resolve(tmp_path / "run"), ["the cat sat"], max_new_tokens=8
        )
        assert len(text) >= 4 and set(text) <= set("the cat sat on the mat. a dog ran red house")

    run_ranks(1, body)


def test_tokens_of_packed_rows_which_have_no_mask_are_counted() -> None:
    def body() -> None:
        running = engine(2, TOKEN_LEVEL["logit_lens"], pipeline_ranks=1)
        running.train_batch(batches(packed=True))
        assert (running.samples_seen, running.tokens_seen) == (4, 48)
        running.train_batch(batches())
        assert running.tokens_seen == 48 + 12 + 3 * 9

    run_ranks(1, body)
