"""Objectives of causal language models against formulas written out here, and their memory."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from scpl_ds.errors import RecipeError
from scpl_ds.memory_track import LiveBytes
from scpl_ds.objectives import _tokens
from scpl_ds.objectives._base import Objective, StageView
from scpl_ds.objectives._contrast import supcon_loss
from scpl_ds.objectives._tokens import distinct, draw_rows, next_tokens, token_cross_entropy
from scpl_ds.recipe_scpl import ObjectiveChoice

D, V, B, T = 6, 23, 3, 8
NAMES = ("token_supcon", "prototype", "logit_lens")
ACCURACY = {"prototype": "prototype_accuracy", "logit_lens": "token_accuracy"}


def weights(*, width: int = D) -> Any:
    generator = torch.Generator().manual_seed(5)
    both = torch.randn(2, V, width, generator=generator, dtype=torch.float64)
    return {"input_embeddings": both[0], "output_embeddings": both[1]}


def make(asked: Any, *, lend: bool = True, hidden_size: int | None = D, width: int = D) -> Any:
    torch.manual_seed(0)
    objective: Objective = ObjectiveChoice.model_validate(asked).create(
        hidden_size=hidden_size, num_labels=2
    )
    if lend:
        objective.lend(weights(width=width))
    return objective.double()


def texts(*, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [B, T, D]; a mask with padding on the left, the right and nowhere; labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, 2:5] = torch.tensor([3, 4, 3])  # some next tokens occur more than once
    labels[0, 6] = -100
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, :2] = 0
    mask[2, 6:] = 0
    return hidden, mask, labels


def pairs(mask: Tensor | None, labels: Tensor) -> list[tuple[int, int, int]]:
    """(text, position, next token) of every position that is taught, one by one."""
    return [
        (b, t, int(labels[b, t + 1]))
        for b in range(len(labels))
        for t in range(labels.shape[1] - 1)
        if labels[b, t + 1] != -100 and (mask is None or bool(mask[b, t] and mask[b, t + 1]))
    ]


def naive(objective: Any, name: str, hidden: Tensor, kept: list[tuple[int, int, int]]) -> Tensor:
    """The loss of the positions ``kept``, by the formulas of the docstrings, row by row."""
    rows = torch.stack([hidden[b, t] for b, t, _ in kept])
    targets = [y for *_, y in kept]
    if name == "token_supcon":
        z = objective.head(rows)
        return supcon_loss(z, torch.tensor(targets), temperature=0.1, pos_norm="khosla")
    if name == "logit_lens":
        scores = objective.map(objective.norm(rows)) @ objective.output_embeddings.T
        return -torch.stack([scores[i].log_softmax(0)[y] for i, y in enumerate(targets)]).mean()
    z = objective.head(rows)
    z = z / z.norm(dim=1, keepdim=True)
    total = hidden.new_zeros(())
    for i, y in enumerate(targets):
        score = {}
        for c in set(targets):
            p = objective.map(objective.input_embeddings[c])
            score[c] = (z[i] @ p) / p.norm() / objective.options.temperature
            if objective.options.frequency_correction:
                score[c] = score[c] + torch.tensor(float(targets.count(c))).double().log()
        total = total + torch.stack(list(score.values())).exp().sum().log() - score[y]
    return total / len(targets)


def value_and_gradients(objective: Any, loss_of: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    leaf = hidden.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    return loss.detach(), *torch.autograd.grad(loss, [leaf, *objective.parameters()])


def ours(objective: Any, mask: Tensor | None, labels: Tensor) -> Any:
    return lambda hidden: objective(hidden, attention_mask=mask, labels=labels).loss


ASKED: dict[str, Any] = {
    "token_supcon": "token_supcon",
    "prototype": "prototype",
    "prototype without correction": {"name": "prototype", "frequency_correction": False},
    "prototype of another width": {"name": "prototype", "projection_dim": 4, "temperature": 0.5},
    "logit_lens": {"name": "logit_lens", "calibration": 0},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("asked", ASKED)
def test_value_and_gradients_equal_the_formula(asked: str, masked: bool):
    objective = make(ASKED[asked])
    if asked == "logit_lens":
        torch.nn.init.normal_(objective.map.weight)
    hidden, mask, labels = texts()
    given = mask if masked else None
    found = value_and_gradients(objective, ours(objective, given, labels), hidden)
    kept = pairs(given, labels)
    expected = value_and_gradients(
        objective, lambda leaf: naive(objective, asked.split()[0], leaf, kept), hidden
    )
    # Sums in another order.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found[1].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_ignored_positions_change_nothing_whatever_they_hold(name: str):
    objective = make(name)
    hidden, mask, labels = texts()
    expected = value_and_gradients(objective, ours(objective, mask, labels), hidden)
    taught = next_tokens(name, StageView.of(hidden, mask, labels)) != -100
    dirty = hidden.masked_fill(~taught[..., None], float("nan"))
    others = labels.masked_fill(mask == 0, 7)  # a collator that does not mark its padding
    found = value_and_gradients(objective, ours(objective, mask, others), dirty)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not found[1][~taught].any()


def test_a_position_is_taught_the_label_of_the_next_and_the_last_one_nothing():
    labels = torch.tensor([[5, 6, -100, 8], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    view = StageView.of(torch.zeros(2, 4, D), None, labels)
    assert next_tokens("x", view).tolist() == [[6, -100, 8, -100], [2, 3, 4, -100]]
    view = StageView.of(torch.zeros(2, 4, D), mask, labels)
    assert next_tokens("x", view).tolist() == [[6, -100, 8, -100], [-100, 3, -100, -100]]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_learn_gives_zero_and_gradients_of_zeros(name: str):
    objective = make(name)
    hidden = texts()[0]
    labels = torch.full((B, T), -100)
    # One chunk of zeros, and more than are drawn.
    for asked in (name, {"name": name, "positions": 5}):
        objective = make(asked)
        loss, *gradients = value_and_gradients(objective, ours(objective, None, labels), hidden)
        assert loss == 0.0
        assert gradients and all(not gradient.any() for gradient in gradients)
        metrics = objective(hidden, attention_mask=None, labels=labels).metrics
        assert all(torch.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_chunks_equal_the_whole(name: str, monkeypatch: pytest.MonkeyPatch):
    objective = make({"name": name, "chunk_size": 4} if name == "token_supcon" else name)
    hidden, mask, labels = texts()
    chunked = make({"name": name, "chunk_size": 100} if name == "token_supcon" else name)
    whole = value_and_gradients(chunked, ours(chunked, mask, labels), hidden)
    monkeypatch.setattr(_tokens, "_SCORES", 5 * V)
    parts = value_and_gradients(objective, ours(objective, mask, labels), hidden)
    # Sums in another order.
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_so_many_positions_are_drawn_by_the_seed_and_only_taught_ones(name: str):
    objective = make({"name": name, "positions": 6})
    hidden, mask, labels = texts()
    taught = next_tokens(name, StageView.of(hidden, mask, labels)) != -100

    def once(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return value_and_gradients(objective, ours(objective, mask, labels), hidden)

    torch.testing.assert_close(once(1), once(1), rtol=0, atol=0)
    learns = [once(seed)[1].abs().sum(-1) > 0 for seed in range(30)]
    assert all(int(one.sum()) <= 6 and not (one & ~taught).any() for one in learns)
    assert torch.equal(torch.stack(learns).any(0), taught)  # each has its turn


def test_a_draw_has_no_position_twice_and_takes_what_there_is():
    hidden = torch.arange(40.0)[:, None].expand(40, 2).reshape(4, 10, 2)
    labels = torch.full((4, 10), -100)
    labels[:, 3:7] = 9  # 16 positions
    rows, targets = draw_rows("x", StageView.of(hidden, None, labels), 12)
    assert (targets == 9).all() and len(set(rows[:, 0].tolist())) == 12
    rows, targets = draw_rows("x", StageView.of(hidden, None, labels), 20)
    assert (targets == 9).sum() == 16 and not rows[targets == -100].any()


def test_distinct_tokens_come_by_frequency_and_the_rarest_are_left_out():
    targets = torch.tensor([7, -100, 2, 7, 4, 2, 7, -100, 5])
    tokens, counts, places = distinct(targets, 3)
    assert tokens.tolist() == [7, 2, 4] and counts.tolist() == [3, 2, 1]
    assert places.tolist() == [0, -100, 1, 0, 2, 1, 0, -100, -100]
    tokens, counts, places = distinct(targets, 100)
    assert counts.tolist() == [3, 2, 1, 1, 0, 0, 0, 0, 0] and tokens[:4].tolist() == [7, 2, 4, 5]
    assert distinct(torch.full((4,), -100), 2).counts.tolist() == [0, 0]


def test_a_position_whose_token_has_no_prototype_is_not_taught():
    objective = make({"name": "prototype", "prototypes": 2})
    hidden, mask, labels = texts()
    kept = pairs(mask, labels)
    by_count = sorted({y for *_, y in kept}, key=lambda y: (-[p[2] for p in kept].count(y), y))
    among = [pair for pair in kept if pair[2] in by_count[:2]]
    found = value_and_gradients(objective, ours(objective, mask, labels), hidden)
    expected = value_and_gradients(
        objective, lambda leaf: naive(objective, "prototype", leaf, among), hidden
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    metrics = objective(hidden, attention_mask=mask, labels=labels).metrics
    assert metrics["valid_token_fraction"].item() == pytest.approx(len(among) / len(kept))


@pytest.mark.parametrize("corrected, learns", [(True, False), (False, True)])
def test_frequency_correction_leaves_nothing_to_learn_from_frequency(corrected, learns):
    """All positions look alike and all prototypes are equally near: the next tokens' frequencies
    are all there is to know, and the correction knows them."""
    asked = {"name": "prototype", "frequency_correction": corrected, "projection": "identity"}
    objective = make(asked | {"layer_norm": False})
    embedding = torch.zeros(V, D).double()
    embedding[3, 0] = embedding[4, 1] = embedding[5, 2] = 1.0  # at right angles to the features
    objective.input_embeddings.copy_(embedding)
    hidden = torch.zeros(1, 7, D).double()
    hidden[..., 5] = 1.0
    labels = torch.tensor([[0, 3, 3, 3, 4, 4, 5]])
    _, gradient, *_ = value_and_gradients(objective, ours(objective, None, labels), hidden)
    assert bool(gradient.sum((0, 1)).abs().max() > 1e-12) == learns


@pytest.mark.parametrize("name", ["prototype", "logit_lens"])
def test_accuracy_is_how_often_the_next_token_scores_highest(name: str):
    asked: dict[str, Any] = {"name": name, "layer_norm": False}
    right = make(asked | ({"projection": "identity"} if name == "prototype" else {}))
    matrix = right.input_embeddings if name == "prototype" else right.output_embeddings
    matrix.copy_(F.normalize(matrix, dim=1))
    labels = torch.arange(T)[None]
    hidden = torch.zeros(1, T, D).double()
    hidden[0, :-1] = matrix[1:T]
    hidden[0, 0] = matrix[5]  # wrong, of 7
    metrics = right(hidden, attention_mask=None, labels=labels).metrics
    assert metrics[ACCURACY[name]].item() == pytest.approx(6 / 7)


@pytest.mark.parametrize("name", NAMES)
def test_lent_matrices_are_frozen_unsaved_and_not_copied(name: str):
    given = weights()
    torch.manual_seed(0)
    objective: Any = ObjectiveChoice.model_validate(name).create(hidden_size=D, num_labels=2)
    objective.lend(given)
    choice = ObjectiveChoice.model_validate(name)
    borrowed = choice.resolve().borrows(choice.options)
    assert set(borrowed) == {key for key, _ in objective.named_buffers()}
    for key in borrowed:
        assert getattr(objective, key).data_ptr() == given[key].data_ptr()
    objective.double()
    hidden, mask, labels = texts()
    ours(objective, mask, labels)(hidden).backward()
    assert not set(objective.state_dict()) & set(given)
    assert all(buffer.grad is None and not buffer.requires_grad for buffer in objective.buffers())
    assert {key for key, _ in objective.named_parameters()} == set(objective.state_dict())
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_a_sum_borrows_what_its_parts_do_and_passes_it_on():
    asked = [{"name": "prototype"}, {"name": "logit_lens"}, {"name": "prototype"}]
    choice = ObjectiveChoice.model_validate(asked)
    assert choice.resolve().borrows(choice.options) == {"input_embeddings", "output_embeddings"}
    none = ObjectiveChoice.model_validate("supcon")
    assert none.resolve().borrows(none.options) == frozenset()
    objective = make(asked)
    assert objective.parts[0].input_embeddings.shape == (V, D)
    hidden, mask, labels = texts()
    together = objective(hidden, attention_mask=mask, labels=labels)
    metrics = together.metrics
    assert {"token_accuracy", "prototype_accuracy", "prototype_accuracy_2"} <= set(metrics)
    parts = [metrics[f"{name}_loss"] for name in ("prototype", "logit_lens")]
    torch.testing.assert_close(together.loss, sum(parts) + metrics["prototype_loss_2"])


def test_the_map_of_prototypes_takes_any_width_of_embedding_and_keeps_angles():
    wide = make("prototype", width=2 * D)
    assert wide.map.weight.shape == (D, 2 * D)
    torch.testing.assert_close(
        wide.map.weight @ wide.map.weight.T, torch.eye(D).double(), rtol=0, atol=1e-6
    )  # drawn in float32
    assert torch.equal(make("prototype").map.weight, torch.eye(D).double())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "labels, message",
    [
        (
            torch.zeros(B, dtype=torch.int64),
            r"one integer label per position.*got torch.int64.*3\]",
        ),
        (torch.zeros(B, T), r"needs one integer label.*torch.float32"),
    ],
)
def test_labels_that_are_no_tokens_are_refused(name, labels, message):
    hidden, _, _ = texts()
    with pytest.raises(RecipeError, match=message):
        make(name)(hidden, attention_mask=None, labels=labels)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused(name: str):
    hidden, mask, labels = texts()
    with pytest.raises(RecipeError, match=r"every position.*got shape \[3, 6\]"):
        make(name)(hidden[:, 0], attention_mask=None, labels=labels)
    with pytest.raises(ValueError, match=r"labels of shape \[3, 8\].*got \[3, 7\]"):
        make(name)(hidden, attention_mask=None, labels=labels[:, 1:])
    with pytest.raises(ValueError, match=r"attention_mask of shape \[3, 8\].*got \[3, 7\]"):
        make(name)(hidden, attention_mask=mask[:, 1:], labels=labels)


@pytest.mark.parametrize("name, matrix", [("prototype", "input"), ("logit_lens", "output")])
def test_a_model_without_vocabulary_is_refused(name: str, matrix: str):
    hidden, _, labels = texts()
    objective = make(name, lend=False)
    with pytest.raises(RecipeError, match=f"{matrix} embedding matrix.*was lent none"):
        objective(hidden, attention_mask=None, labels=labels)
    with pytest.raises(RecipeError, match=f"{matrix} embedding matrix.*there is none"):
        objective.lend({})
    with pytest.raises(RecipeError, match="needs the hidden size"):
        make(name, lend=False, hidden_size=None)


def test_a_head_may_be_of_another_width():
    objective = make("logit_lens", width=9)
    hidden, mask, labels = texts()
    assert objective.map.weight.shape == (9, 6)
    assert ours(objective, mask, labels)(hidden).isfinite()


def test_a_lens_begins_where_least_squares_over_all_ranks_would_put_it():
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(40, D, generator=generator) * 3 + 1
    targets = torch.randn(40, D, generator=generator)
    objective = make("logit_lens").float()
    halves = [(rows[:15], targets[:15]), (rows[15:], targets[15:])]
    met = threading.Barrier(2)
    boxes: dict[int, list[torch.Tensor]] = {}
    found: dict[int, dict[str, torch.Tensor]] = {}

    def lane(rank: int) -> None:
        def add_up(sums: list[torch.Tensor]) -> None:
            boxes[rank] = [s.clone() for s in sums]
            met.wait()
            for own, *parts in zip(sums, boxes[0], boxes[1], strict=True):
                own.copy_(torch.stack(parts).sum(0))
            met.wait()

        found[rank] = objective.calibrate(*halves[rank], add_up)

    threads = [threading.Thread(target=lane, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    x, y = F.layer_norm(rows, (D,)).double(), targets.double()
    x0, y0 = x - x.mean(0), y - y.mean(0)
    penalty = (0.1 * (x0.T @ x0).diagonal().mean()).sqrt() * torch.eye(D, dtype=torch.float64)
    longer = torch.linalg.lstsq(
        torch.cat([x0, penalty]), torch.cat([y0, torch.zeros(D, D, dtype=torch.float64)])
    ).solution.T
    for values in found.values():
        torch.testing.assert_close(values["map.weight"].double(), longer, rtol=1e-5, atol=1e-6)
        bias = y.mean(0) - longer @ x.mean(0)
        torch.testing.assert_close(values["map.bias"].double(), bias, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("positions", [10, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_positions_drawn(name: str, positions: int):
    objective = make({"name": name, "positions": positions})
    hidden, mask, labels = texts()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(hidden, attention_mask=mask, labels=labels)
    assert objective.flops(B, T) == counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_they_neither_train_the_last_stage_nor_answer(name: str):
    choice = ObjectiveChoice.model_validate(name)
    assert not choice.trains_last_stage() and not choice.can_answer()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_halves_and_autocast_give_a_loss_in_float32_near_the_exact_one(name, dtype):
    hidden, mask, labels = texts()
    exact = ours(make(name), mask, labels)(hidden)
    objective = make(name).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ours(objective, mask, labels)(hidden.to(dtype).requires_grad_())
    assert loss.dtype == torch.float32
    loss.backward()
    # bf16 has 8 bits, and the temperature multiplies an error by ten.
    torch.testing.assert_close(loss.double(), exact, rtol=0.1, atol=0.05)


def test_token_cross_entropy_equals_torch_with_and_without_a_gradient_of_the_weights():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(9, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    targets = torch.tensor([1, -100, 22, 0, 5, 5, -100, 3, 9])
    loss = token_cross_entropy(rows, weight, targets, bias=bias).loss
    expected = F.cross_entropy(rows @ weight.T + bias, targets)
    found = torch.autograd.grad(2 * loss, [rows, weight])
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        found, torch.autograd.grad(2 * expected, [rows, weight]), rtol=1e-11, atol=1e-12
    )
    frozen = token_cross_entropy(rows, weight.detach(), targets, bias=bias).loss
    torch.testing.assert_close(torch.autograd.grad(2 * frozen, rows), found[:1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["prototype", "logit_lens"])
def test_16k_positions_of_a_vocabulary_of_50k_take_under_300_mb(name: str):
    """On tensors without values, which nothing here looks at: the whole matrix of scores would be
    3,277 MB."""
    tokens, positions, width = 50_000, 16_384, 512
    with FakeTensorMode():
        objective: Any = ObjectiveChoice.model_validate(
            {"name": name, "positions": positions}
        ).create(hidden_size=width, num_labels=2)
        matrix = torch.empty(tokens, width)
        objective.lend({"input_embeddings": matrix, "output_embeddings": matrix})
        hidden = torch.randn(4, positions // 4, width, requires_grad=True)
        labels = torch.randint(0, tokens, (4, positions // 4))
        known = [hidden, labels, *objective.parameters(), *objective.buffers()]
        with LiveBytes(known) as tracker:
            objective(hidden, attention_mask=None, labels=labels).loss.backward()
    assert tracker.peak < 300e6


def test_a_lens_is_taught_at_a_quarter_of_the_positions_and_256_at_least():
    objective = make("logit_lens")
    per_position = 2 * D * (D + V)
    for there, taught in ((100, 100), (512, 256), (4096, 1024)):
        assert objective.flops(1, there) == per_position * taught
    assert make({"name": "logit_lens", "positions": 7}).flops(4, 100) == per_position * 7
