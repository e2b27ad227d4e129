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
from transformers import GraniteConfig, GraniteForCausalLM, LlamaForCausalLM, PreTrainedModel

import scpl_ds
from scpl_ds.errors import DataError
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


def by_hand(model: PreTrainedModel, scale: float = 1.0, lanes: int = 1) -> tuple[Tensor, Tensor]:
    """The map of a head behind layer 1: from the mid of a whole model to what its LM head reads;
    of each lane the first positions of its own micro-batches."""
    rows, targets = [], []
    head = model.get_output_embeddings()
    read: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    for lane in range(lanes):
        own: list[tuple[Tensor, Tensor]] = []
        for batch in itertools.islice(batches(ranks=lanes, rank=lane), 10):
            with torch.no_grad():
                out = model.eval()(**batch, output_hidden_states=True)
            taught = batch["attention_mask"].bool()
            taught = taught[:, :-1] & taught[:, 1:]
            own.append((out.hidden_states[2][:, :-1][taught], read.pop()[:, :-1][taught]))
        rows.append(torch.cat([x for x, _ in own])[: WANTED // lanes])
        targets.append(torch.cat([y for _, y in own])[: WANTED // lanes] * scale)
    handle.remove()
    found = ridge(F.layer_norm(torch.cat(rows), (32,)), torch.cat(targets), lambda _: None)
    assert found is not None
    return found


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


def test_scores_at_padding_say_nothing_about_what_the_model_scales() -> None:
    """Left padding, where the scores of a model may be anything: here they are NaN."""

    class Padded(LlamaForCausalLM):
        def forward(  # pyright: ignore
            self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any
        ) -> Any:
            out = super().forward(input_ids, attention_mask, **inputs)
            out.logits = out.logits.masked_fill((attention_mask == 0)[..., None], torch.nan)
            return out

    def left(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = torch.ones_like(batch["input_ids"])
        mask[:, :3] = 0
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}

    def body() -> None:
        found = []
        for kind in (LlamaForCausalLM, Padded):
            model = tiny_lm.model()
            model.__class__ = kind
            running = engine(model=model, pipeline_ranks=1)
            running.calibrate(map(left, batches()))
            found.append(weights(running)[HEAD + "map.weight"])
        assert torch.equal(*found) and found[0].abs().sum() > 0

    run_ranks(1, body)


class Restarting:
    """As DeepSpeed's loader: an iterator whose ``iter`` begins anew."""

    def __init__(self, count: int) -> None:
        self._all = list(itertools.islice(batches(), count))
        self._place = 0

    def __iter__(self) -> Restarting:
        self._place = 0
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._place == len(self._all):
            raise StopIteration
        self._place += 1
        return self._all[self._place - 1]


def trained_on(running: scpl_ds.Engine) -> list[int]:
    """The first tokens of all that is trained on from here; fills as it is."""
    seen: list[int] = []
    forward = running.stages[0].forward

    def watched(batch: Any) -> Any:
        seen.append(int(batch.inputs["input_ids"][0, 0]))
        return forward(batch)

    running.stages[0].forward = watched  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def firsts(count: int, start: int = 0) -> list[int]:
    return [int(b["input_ids"][0, 0]) for b in itertools.islice(batches(), start, start + count)]


@pytest.mark.parametrize("how", ["by train_batch", "before", "a loader that restarts"])
def test_what_calibration_reads_is_trained_on_once_and_in_order(how: str) -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1, accumulation=2)
        data = Restarting(20) if how == "a loader that restarts" else batches()
        if how == "before":
            running.calibrate(data)
        seen = trained_on(running)
        for _ in range(10):
            running.train_batch(data)
        assert seen == firsts(20)

    run_ranks(1, body)


def test_iterators_that_take_turns_each_give_what_was_read_of_them() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        seen = trained_on(running)
        one, other = batches(), itertools.islice(batches(), 10, None)
        for data in (one, other, one, other, one):
            running.train_batch(data)
        assert seen == [*firsts(1), *firsts(1, 10), *firsts(1, 1), *firsts(1, 11), *firsts(1, 2)]

    run_ranks(1, body)


def test_items_are_collated_once() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        running.set_batch_fn(lambda item: item.pop("whole"))
        running.train_batch({"whole": batch} for batch in batches())
        assert running.global_steps == 1

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
    weight, bias = by_hand(tiny_lm.model(), lanes=2)
    torch.testing.assert_close(parts[0][HEAD + "map.weight"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0][HEAD + "map.bias"], bias, rtol=1e-4, atol=1e-5)


def test_a_head_behind_copies_of_layers_is_fitted_to_what_it_sees(tmp_path: Path) -> None:
    """The first of two stages ends behind layer 1 and sees what layer 2 gives."""
    from scpl_ds.recipe import recipe_from_mapping
    from scpl_ds.setup import cut_model, load_data, make_engine, start_world

    tiny_lm.save(tmp_path / "model")
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 60)

    def heads(lookahead: int) -> dict[str, Tensor]:
        asked = recipe_from_mapping(
            {
                "model": {"name_or_path": str(tmp_path / "model"), "task": "causal-lm"},
                "scpl": {
                    "stages": 2, "sharding": "none", "objective": LENS, "lookahead": lookahead,
                    "partition": "uniform",
                },
                "deepspeed": {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}},
                "data": {
                    "name": "text", "train": str(tmp_path / "a.txt"), "max_length": 12,
                    "document": "file",
                },
                "train": {"output_dir": str(tmp_path / "run"), "learning_rate": 1e-3},
            }
        )  # fmt: skip
        mesh, device = start_world(asked)
        data = load_data(asked, mesh)
        running = make_engine(asked, cut_model(asked, data.facts), mesh, device, total_steps=2)
        running.calibrate(batches())
        return weights(running)

    def body() -> None:
        whole = tiny_lm.model().eval()
        rows, read = [], []
        for batch in itertools.islice(batches(), 6):
            with torch.no_grad():
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                out = whole.model(**inputs, output_hidden_states=True)
            taught = batch["attention_mask"].bool()
            taught = taught[:, :-1] & taught[:, 1:]
            rows.append(out.hidden_states[3][:, :-1][taught])
            read.append(out.last_hidden_state[:, :-1][taught])
        found = heads(1)[HEAD + "map.weight"]
        targets = torch.cat(read)[:WANTED]
        behind_one = torch.cat(rows)[:WANTED]
        fitted = ridge(F.layer_norm(behind_one, (32,)), targets, lambda _: None)
        assert fitted is not None
        weight = fitted[0]
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(heads(0)[HEAD + "map.weight"], weight, rtol=1e-3, atol=1e-4)

    run_ranks(1, body)


@pytest.mark.parametrize("detach", [True, "both"])
def test_a_last_stage_with_an_objective_is_fitted_too(detach: Any) -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1, detach=detach)
        running.train_batch(batches())
        found = weights(running)[f"scpl_heads.layer_{3}.map.weight"]
        assert not torch.allclose(found, torch.eye(32), atol=0.05)

    run_ranks(1, body)


def test_positions_beyond_those_asked_for_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from scpl_ds.objectives.logit_lens import LogitLens

    def body() -> None:
        sizes: list[int] = []
        plain = LogitLens.calibrate

        def watched(self: Any, rows: Tensor, targets: Tensor, add_up: Any) -> Any:
            sizes.extend((len(rows), len(targets)))
            return plain(self, rows, targets, add_up)

        monkeypatch.setattr(LogitLens, "calibrate", watched)
        engine(pipeline_ranks=1, objective={**LENS, "calibration": 7}).train_batch(batches())
        assert sizes == [7, 7]

    run_ranks(1, body)


def test_data_without_anything_taught_leave_the_identity_and_say_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        batch = next(batches())
        running.train_batch(iter([batch | {"labels": torch.full_like(batch["labels"], -100)}]))
        assert "none of them is taught" in caplog.text
        found = weights(running)[HEAD + "map.weight"]
        assert found.isfinite().all() and torch.allclose(found, torch.eye(32), atol=0.1)

    run_ranks(1, body)


def test_data_without_labels_are_refused_as_without_calibration() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        with pytest.raises(DataError, match="found no 'labels'"):
            running.train_batch({"input_ids": b["input_ids"]} for b in batches())

    run_ranks(1, body)


def test_rows_that_are_not_finite_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, targets = torch.randn(2, 50, 6, generator=generator)
    broken = rows.clone()
    broken[3, 2], broken[9, 0] = torch.nan, torch.inf
    kept = [n for n in range(50) if n not in (3, 9)]
    found = ridge(broken, targets, lambda _: None)
    torch.testing.assert_close(found, ridge(rows[kept], targets[kept], lambda _: None))
    assert ridge(torch.full((4, 6), torch.nan), targets[:4], lambda _: None) is None


def test_a_checkpoint_under_another_cut_has_only_its_new_heads_fitted(tmp_path: Path) -> None:
    def body() -> None:
        two = engine(2, pipeline_ranks=1)
        data = batches()
        two.train_batch(data)
        two.save_checkpoint(tmp_path)
        four = engine(4, pipeline_ranks=1)
        four.load_checkpoint(tmp_path)
        kept = weights(four)[HEAD + "map.weight"]
        four.calibrate(data)
        found = weights(four)
        assert torch.equal(found[HEAD + "map.weight"], kept)
        for layer in (0, 2):
            assert not torch.equal(found[f"scpl_heads.layer_{layer}.map.weight"], torch.eye(32))
        again = engine(2, pipeline_ranks=1)
        again.load_checkpoint(tmp_path)
        again.calibrate(batches())
        assert torch.equal(weights(again)[HEAD + "map.weight"], kept)

    run_ranks(1, body)


def test_the_head_of_another_objective_counts_as_none(tmp_path: Path) -> None:
    def body() -> None:
        other = engine(pipeline_ranks=1, objective={"name": "token_supcon"})
        other.train_batch(batches())
        other.save_checkpoint(tmp_path)
        running = engine(pipeline_ranks=1)
        running.load_checkpoint(tmp_path)
        running.calibrate(batches())
        assert not torch.allclose(weights(running)[HEAD + "map.weight"], torch.eye(32), atol=0.05)

    run_ranks(1, body)


def test_a_lane_without_data_stops_all_lanes_before_anything_is_fitted() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1, sharding="ddp")
        data = iter([]) if running.mesh.dp_rank else itertools.islice(batches(), 3)
        running.calibrate(data)
        assert torch.equal(weights(running)[HEAD + "map.weight"], torch.eye(32))

    run_ranks(2, body)


def test_an_iterator_without_data_ends_training_as_it_would_without_calibration() -> None:
    def body() -> None:
        running = engine(pipeline_ranks=1)
        with pytest.raises(StopIteration):
            running.train_batch(iter([]))

    run_ranks(1, body)


def test_a_batch_that_cannot_be_read_is_named_on_every_rank() -> None:
    def broken() -> Iterator[dict[str, Tensor]]:
        raise ValueError("the disk is gone")
        yield {}

    def body() -> None:
        running = engine()
        match = "the disk is gone"  # on both: of itself, and "rank 0 found the problem: ..."
        with pytest.raises(Exception, match=match):
            running.train_batch(broken())

    run_ranks(2, body)
