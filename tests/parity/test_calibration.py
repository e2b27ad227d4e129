"""Local heads that begin where the model, as it came, would end: which numbers, on which ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

import scpl_ds
from scpl_ds.objectives._calibration import ridge
from tests.support import runs, tiny_lm
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks
WANTED = 100
LENS: dict[str, Any] = {"name": "logit_lens", "calibration": WANTED}
HEAD = "scpl_heads.layer_1."


def batches(*, ranks: int = 1, rank: int = 0) -> Iterator[dict[str, Tensor]]:
    """2 x 12 tokens, the last three of the second row padding; every ``ranks``-th."""
    generator = torch.Generator().manual_seed(3)
    for number in itertools.count():
        ids = torch.randint(1, 257, (2, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        if number % ranks == rank:
            labels = ids.masked_fill(mask == 0, -100)
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def engine(
    stages: int = 2,
    model: PreTrainedModel | None = None,
    objective: Any = LENS,
    *,
    zero: int = 0,
    **options: Any,
) -> scpl_ds.Engine:
    config = runs.config(stages, objective=objective, zero=zero, **options)
    model = tiny_lm.model() if model is None else model
    return scpl_ds.initialize(model=model, config=config, seed=runs.SEED).engine


def by_hand(model: PreTrainedModel, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The map of a head behind layer 1: from the mid of a whole model to what its LM head reads."""
    rows, targets = [], []
    data, head = batches(), model.get_output_embeddings()
    read: list[Tensor] = []
    while sum(map(len, rows)) < WANTED:
        batch = next(data)
        read.clear()
        handle = head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        with torch.no_grad():
            out = model.eval()(**batch, output_hidden_states=True)
        handle.remove()
        taught = batch["attention_mask"].bool()
        taught = taught[:, :-1] & taught[:, 1:]
        rows.append(out.hidden_states[2][:, :-1][taught])
        targets.append(read[0][:, :-1][taught] * scale)
    return ridge(F.layer_norm(torch.cat(rows), (32,)), torch.cat(targets), lambda _: None)


def weights(running: scpl_ds.Engine) -> dict[str, Tensor]:
    return {n: t for stage in running.stages for n, t in stage.parameters_by_name().items()}


def test_a_head_begins_as_the_map_to_what_the_language_model_head_reads() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        running.calibrate(batches())
        weight, bias = by_hand(tiny_lm.model())
        found = weights(running)
        torch.testing.assert_close(found[HEAD + "map.weight"], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[HEAD + "map.bias"], bias, rtol=1e-4, atol=1e-5)
        assert not running.to_calibrate

    run_ranks(1, body)


def test_scores_that_the_model_divides_are_divided_for_the_head_too() -> None:
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        logits_scaling=8.0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = GraniteForCausalLM(config)
    weight, _ = by_hand(model, scale=1 / 8)

    def body() -> None:
        running = engine(model=model, pipeline_ranks=1)
        running.calibrate(batches())
        found = weights(running)[HEAD + "map.weight"]
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-6)

    run_ranks(1, body)


def test_what_calibration_reads_is_trained_on_afterwards(tmp_path: Path) -> None:
    def body() -> None:
        torch.set_num_threads(1)
        found = []
        for before in (True, False):
            running = engine(pipeline_ranks=1, accumulation=2)
            if before:
                running.calibrate(batches())
            data = batches()
            for _ in range(6):
                running.train_batch(data)
            found.append(weights(running))
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

    run_ranks(1, body)


def test_a_head_is_the_same_to_the_bit_on_ranks_and_in_one_process(tmp_path: Path) -> None:
    def body() -> None:
        torch.set_num_threads(1)
        running = engine(3)
        data = batches()
        for _ in range(3):
            running.train_batch(data)
        torch.save(weights(running), tmp_path / f"{running.mesh.world_size}-{running.mesh.rank}")

    run_ranks(3, body)

    def alone() -> None:
        torch.set_num_threads(1)
        running = engine(3, pipeline_ranks=1)
        data = batches()
        for _ in range(3):
            running.train_batch(data)
        torch.save(weights(running), tmp_path / "alone")

    run_ranks(1, alone)
    wanted = torch.load(tmp_path / "alone")
    parts = [torch.load(tmp_path / f"3-{rank}") for rank in range(3)]
    found = parts[0] | parts[1] | parts[2]
    assert found.keys() == wanted.keys() and HEAD + "map.weight" in found
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "backend",
    [{"sharding": "ddp"}, {"sharding": "fsdp", "zero": 3}]
    + [{"sharding": "deepspeed", "zero": zero} for zero in (1, 2, 3)],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_data_parallel_ranks_fit_one_head_on_the_rows_of_all(
    tmp_path: Path, backend: dict[str, Any]
) -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1, **backend)
        running.calibrate(batches(ranks=2, rank=running.mesh.dp_rank))
        torch.save(weights(running), tmp_path / f"{running.mesh.rank}")

    run_ranks(2, body)
    parts = [torch.load(tmp_path / f"{rank}") for rank in range(2)]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    weight, bias = by_hand(tiny_lm.model())
    # Both ranks read half of the micro-batches; rounded up, they may be one more than by hand.
    count = -(-WANTED // 19)
    assert count % 2 == 0, "or the two would read other rows"
    torch.testing.assert_close(parts[0][HEAD + "map.weight"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0][HEAD + "map.bias"], bias, rtol=1e-4, atol=1e-5)


def test_a_head_behind_copies_of_layers_is_fitted_to_what_it_sees() -> None:
    """Three of four layers ahead of the first: what the copies give is what layer 3 gives."""

    def body() -> None:
        from scpl_ds.engine_calibration import _Features

        running = engine(pipeline_ranks=1)
        first, last = running.stages
        first.module.ahead = last.module.body  # equal to copies before training
        features = _Features()
        first.probe, first.module.looks = features, True
        batch = next(batches())
        for _ in running.evaluate(iter([batch]), 1):
            pass
        with torch.no_grad():
            out = tiny_lm.model().eval().model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            )  # fmt: skip
        first.probe, first.module.looks = None, False
        rows = torch.cat(features.rows)
        normed = tiny_lm.model().model.norm(rows)
        taught = batch["attention_mask"].bool()
        taught = taught[:, :-1] & taught[:, 1:]
        wanted = out.last_hidden_state[:, :-1][taught]
        torch.testing.assert_close(normed, wanted, rtol=1e-5, atol=1e-5)

    run_ranks(1, body)


def test_a_checkpoint_under_another_cut_has_only_its_new_heads_fitted(tmp_path: Path) -> None:
    def body() -> None:
        two = engine(2, pipeline_ranks=1)
        data = batches()
        two.train_batch(data)
        two.save_checkpoint(tmp_path)
        four = engine(4, pipeline_ranks=1)
        four.load_checkpoint(tmp_path)
        assert four.to_calibrate
        kept = weights(four)[HEAD + "map.weight"]
        four.calibrate(data)
        found = weights(four)
        assert torch.equal(found[HEAD + "map.weight"], kept)
        for layer in (0, 2):
            assert not torch.equal(found[f"scpl_heads.layer_{layer}.map.weight"], torch.eye(32))
        again = engine(2, pipeline_ranks=1)
        again.load_checkpoint(tmp_path)
        assert not again.to_calibrate

    run_ranks(1, body)


def test_an_iterator_without_data_ends_training_as_it_would_without_calibration() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        with pytest.raises(StopIteration):
            running.train_batch(iter([]))

    run_ranks(1, body)


def test_a_batch_that_cannot_be_read_is_named_on_its_rank_and_ends_the_others() -> None:
    def broken() -> Iterator[dict[str, Tensor]]:
        raise ValueError("the disk is gone")
        yield {}

    def body() -> None:
        running = engine()
        match = "the disk is gone" if running.mesh.rank == 0 else "rank 0 found the problem"
        with pytest.raises(Exception, match=match):
            running.train_batch(broken())

    run_ranks(2, body)
