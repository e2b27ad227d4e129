"""Stages of a model with adapters that have none: what they pass on, and where they are refused."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import scpl_ds
from scpl_ds.errors import OtherRankFailed, PartitionError
from scpl_ds.memory import Workload, predict
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.setup import cut_model
from scpl_ds.trainer import fit
from tests.parity import test_language
from tests.parity.test_lora import WITHOUT_HEAD, mapping, trained
from tests.support import runs, tiny_lm
from tests.support.distributed import distributed, run_ranks

pytestmark = pytest.mark.forks

FIRST_ONLY = {"model.lora.target_modules": ["0.attention.self.query"], "scpl.stages": 4}


def asked(folder: Path, task: str = "sequence-classification", **changes: Any) -> Recipe:
    return recipe_from_mapping(mapping(folder, task, **changes))


def test_a_polished_run_with_a_resting_stage_is_refused_before_its_first_step(
    tmp_path: Path,
) -> None:
    changes = {**FIRST_ONLY, "scpl.objective": WITHOUT_HEAD, "scpl.polish": 0.5}
    recipe = asked(tmp_path, **changes, **{"scpl.pipeline_ranks": 2})

    def body() -> None:
        says = r"stage 1 \(layer 1\) has nothing to train|rank 0 found the problem"
        with pytest.raises((PartitionError, OtherRankFailed), match=says):
            fit(recipe)

    run_ranks(2, body)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("target", ["0.attention.self.query", "3.attention.self.query"])
def test_a_local_head_with_weights_is_enough_for_a_polished_run(
    target: str, ranks: int, tmp_path: Path
) -> None:
    changes = {"model.lora.target_modules": [target], "scpl.polish": 0.5}
    run = trained(tmp_path, ranks, "sequence-classification", **changes)
    assert (run.output_dir / "checkpoint-8").is_dir()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_which_every_stage_rests_or_is_frozen_is_refused_on_every_rank(
    ranks: int, tmp_path: Path
) -> None:
    changes = {
        "model.lora.target_modules": ["0.self_attn.q_proj"],
        "scpl.objective": {"name": "logit_lens", "calibration": 64},
        "scpl.freeze_stages": 1,
        "scpl.pipeline_ranks": ranks,
    }
    recipe = asked(tmp_path, "causal-lm", **changes)

    def body() -> None:
        says = "none of the 2 stages has anything to train|rank 0 found the problem"
        with pytest.raises((PartitionError, OtherRankFailed), match=says):
            fit(recipe)

    run_ranks(ranks, body)


def adapted_lm(target: str) -> Any:
    torch.manual_seed(5)
    how = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[target])
    return peft.get_peft_model(tiny_lm.model(), how)


@distributed(2)
def test_initialize_refuses_what_trains_nothing_on_every_rank() -> None:
    config = runs.config(2, objective={"name": "logit_lens", "calibration": 64}, freeze_stages=1)
    with pytest.raises(PartitionError, match="none of the 2 stages has anything to train"):
        scpl_ds.initialize(model=adapted_lm("0.self_attn.q_proj"), config=config)


def of_last_stage(target: str, steps: int = 2) -> tuple[float, dict[str, Any]]:
    config = runs.config(2, objective={"name": "logit_lens", "calibration": 64}, pipeline_ranks=1)
    engine = scpl_ds.initialize(model=adapted_lm(target), config=config, seed=runs.SEED).engine
    data = test_language.batches()
    loss = math.nan
    for _ in range(steps):
        loss = float(engine.train_batch(data))
    return loss, {name: float(value) for name, value in engine.metrics().items()}


@distributed(1)
def test_a_resting_last_stage_tells_its_loss_and_that_it_rests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "scpl_ds"):
        loss, metrics = of_last_stage("0.self_attn.q_proj")
    assert math.isfinite(loss)
    assert loss == metrics["head/loss"] == metrics["stage1/loss"]
    (line,) = [r.getMessage() for r in caplog.records if "passes its outputs on" in r.getMessage()]
    assert line.startswith("stage 1 (layers 2 to 3) has nothing to train")
    # The adapter of layer 0 starts at zero effect, so the first loss is that of any other place.
    (first, _), (other, _) = of_last_stage("0.self_attn.q_proj", 1), of_last_stage("q_proj", 1)
    assert first == pytest.approx(other, rel=1e-5)


def test_the_plan_counts_a_resting_stage_as_the_run_builds_it(tmp_path: Path) -> None:
    changes = {**FIRST_ONLY, "scpl.objective": WITHOUT_HEAD}
    recipe = asked(tmp_path, **changes)
    ranks = predict(Workload.of(recipe, cut_model(recipe), "cpu"), pipeline_ranks=4, dp_size=1)
    assert [rank.optimizer > 0 for rank in ranks] == [True, False, False, True]


@pytest.mark.parametrize("sharding", ["fsdp", "deepspeed"])
def test_the_plan_counts_a_resting_stage_whole_on_every_rank(sharding: str, tmp_path: Path) -> None:
    changes = {
        **FIRST_ONLY,
        "scpl.objective": WITHOUT_HEAD,
        "scpl.sharding": sharding,
        "deepspeed.zero_optimization": {"stage": 3},
    }
    recipe = asked(tmp_path, **changes)
    work = Workload.of(recipe, cut_model(recipe), "cpu")
    one, eight = (predict(work, pipeline_ranks=4, dp_size=dp) for dp in (1, 8))
    assert eight[0].parameters < one[0].parameters / 4
    assert eight[1].parameters == one[1].parameters
