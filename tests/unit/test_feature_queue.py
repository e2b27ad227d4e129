"""Remembered rows are further positives and negatives of every anchor, and never anchors."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scpl_ds.errors import RecipeError
from scpl_ds.objectives._queue import FeatureQueue
from scpl_ds.objectives.supcon import SupCon, SupConOptions, supcon_loss

torch.set_num_threads(1)


def rows(number: int, *, seed: int, width: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(number, width, generator=generator, dtype=torch.float64) * 3
    return features, torch.randint(0, classes, (number,), generator=generator)


def brute_force(
    h: Tensor, labels: Tensor, memory: tuple[Tensor, Tensor], temperature: float, pos_norm: str
) -> Tensor:
    """The formula of docs/objectives.md anchor by anchor, over batch and memory."""
    unit = [x / x.pow(2).sum().sqrt() for x in [*h, *memory[0]]]
    classes = [*labels.tolist(), *memory[1].tolist()]
    total, anchors, with_positive = h.new_zeros(()), 0, 0
    for i in range(len(h)):
        if classes[i] == -100:
            continue
        others = [k for k, c in enumerate(classes) if k != i and c != -100]
        positives = [k for k in others if classes[k] == classes[i]]
        anchors, with_positive = anchors + 1, with_positive + bool(positives)
        if not positives:
            continue
        s = {k: unit[i].dot(unit[k]) / temperature for k in others}
        log_sum = torch.stack(list(s.values())).exp().sum().log()
        own = sum((log_sum - s[j] for j in positives), h.new_zeros(()))
        total = total + own / (len(positives) + (pos_norm == "paper"))
    return total / max(anchors if pos_norm == "paper" else with_positive, 1)


def value_and_gradient(loss_of: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("pos_norm", ["paper", "khosla"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("number, remembered", [(1, 6), (2, 1), (6, 9), (12, 3)])
@pytest.mark.parametrize("ignored", [False, True])
def test_value_and_gradient_are_those_of_the_formula(
    number: int, remembered: int, temperature: float, pos_norm: Any, ignored: bool
):
    h, labels = rows(number, seed=number)
    memory = rows(remembered, seed=50 + remembered)
    if ignored:
        memory[1][::2] = -100
        labels[1::3] = -100
    ours = value_and_gradient(
        lambda x: supcon_loss(x, labels, temperature=temperature, pos_norm=pos_norm, memory=memory),
        h,
    )
    wanted = value_and_gradient(
        lambda x: brute_force(x, labels, memory, temperature, pos_norm) + 0 * x.sum(), h
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pos_norm", ["paper", "khosla"])
def test_an_empty_memory_is_no_memory_to_the_bit(pos_norm: Any):
    h, labels = rows(9, seed=0)
    empty = (torch.zeros(0, 5), torch.zeros(0).long())
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with_memory = value_and_gradient(
            lambda x: supcon_loss(x, labels, pos_norm=pos_norm, memory=empty), h.to(dtype)
        )
        without = value_and_gradient(
            lambda x: supcon_loss(x, labels, pos_norm=pos_norm), h.to(dtype)
        )
        assert all(torch.equal(a, b) for a, b in zip(with_memory, without, strict=True))


def test_free_places_count_for_nothing_even_when_they_hold_nan():
    h, labels = rows(9, seed=0)
    features, classes = rows(4, seed=1)
    free = (torch.full((3, 5), float("nan")), torch.full((3,), -100))
    found, wanted = (
        value_and_gradient(lambda x, m=memory: supcon_loss(x, labels, memory=m), h)
        for memory in (
            (torch.cat([free[0], features]), torch.cat([free[1], classes])),
            (features, classes),
        )
    )
    # The sums run over more zeros, in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


def test_memory_gets_no_gradient():
    h, labels = rows(4, seed=0)
    features, classes = rows(4, seed=1)
    features.requires_grad_()
    supcon_loss(h.requires_grad_(), labels, memory=(features, classes)).backward()
    assert features.grad is None and h.grad is not None


def test_memory_in_another_precision_is_compared_in_float32():
    h, labels = rows(6, seed=0)
    features, classes = rows(6, seed=1)
    half = h.bfloat16()
    found = supcon_loss(half, labels, memory=(features.float(), classes))
    assert torch.equal(found, supcon_loss(half.float(), labels, memory=(features.float(), classes)))


@pytest.mark.parametrize(
    "memory, message",
    [
        ((torch.zeros(2, 4), torch.zeros(2).long()), "5 features a row and 4 in memory"),
        ((torch.zeros(2, 5), torch.zeros(3).long()), r"\[2, 5\] and labels of shape \[3\]"),
        ((torch.zeros(2, 5), torch.zeros(2)), "integer labels"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(memory: Any, message: str):
    h, labels = rows(4, seed=0)
    with pytest.raises(ValueError, match=message):
        supcon_loss(h, labels, memory=memory)


# ------------------------------------------------------------------------------------ the queue


def push(queue: FeatureQueue, *labels: int) -> None:
    """One row a label, whose direction is (label, 1)."""
    features = torch.tensor([[float(label), 1.0] for label in labels]).reshape(-1, 2)
    queue.push(features, torch.tensor(labels, dtype=torch.int64))


def test_the_newest_rows_stay_oldest_first_and_rows_without_a_class_do_not_enter():
    queue = FeatureQueue(4, 2)
    drawn = []
    for labels in ([1, 2], [-100, 3], [], [4, 5], [6, 7, -100, 8, 9, 10]):
        push(queue, *labels)
        drawn.append(queue.labels.tolist())
        directions = torch.stack([queue.labels.float(), torch.ones(4)], dim=1)
        wanted = F.normalize(directions).masked_fill(queue.labels[:, None] == -100, 0.0)
        torch.testing.assert_close(queue.features, wanted)
    assert drawn == [
        [-100, -100, 1, 2],
        [-100, 1, 2, 3],
        [-100, 1, 2, 3],
        [2, 3, 4, 5],
        [7, 8, 9, 10],
    ]


def test_rollback_goes_back_to_the_last_commit():
    queue = FeatureQueue(3, 2)
    push(queue, 1)
    queue.commit()
    kept = queue.features.clone()
    push(queue, 2)
    push(queue, 3, 4)
    queue.rollback()
    queue.rollback()
    assert queue.labels.tolist() == [-100, -100, 1] and torch.equal(queue.features, kept)
    push(queue, 5)
    queue.commit()
    queue.rollback()
    assert queue.labels.tolist() == [-100, 1, 5]
    queue.clear()
    assert queue.labels.tolist() == [-100] * 3 and not queue.features.any()


def test_rows_that_are_not_finite_do_not_enter():
    """One such row used to make the loss of every later micro-batch NaN."""
    queue = FeatureQueue(4, 2)
    inf, nan = float("inf"), float("nan")
    features = torch.tensor([[1.0, 2.0], [inf, 1.0], [1.0, nan], [2.0, 1.0]])
    queue.push(features, torch.tensor([0, 1, 0, 1]))
    assert queue.labels.tolist() == [-100, -100, 0, 1]
    assert queue.features.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_queue_whose_buffers_a_backend_cast_keeps_their_type(dtype: torch.dtype):
    queue = FeatureQueue(3, 2).to(dtype)
    push(queue, 1, 2)
    assert queue.features.dtype == dtype and queue.labels.dtype == torch.int64
    assert queue.labels.tolist() == [-100, 1, 2]


# -------------------------------------------------------------------------------- the objective


def build(*, hidden_size: int | None = 8, **options: Any) -> SupCon:
    torch.manual_seed(0)
    return SupCon(SupConOptions(**options), hidden_size=hidden_size, num_labels=3)


def hidden(number: int, *, seed: int) -> tuple[Tensor, Tensor]:
    features, labels = rows(number, seed=seed, width=8)
    return features.float()[:, None].repeat(1, 3, 1), labels


def test_the_second_micro_batch_is_compared_with_the_first():
    objective = build(feature_queue=8)
    first, second = hidden(4, seed=1), hidden(3, seed=2)
    objective(first[0], attention_mask=None, labels=first[1]).loss.backward()
    memory = (objective.head(first[0].mean(1)), first[1])
    wanted = supcon_loss(objective.head(second[0].mean(1)), second[1], memory=memory)
    found = objective(second[0], attention_mask=None, labels=second[1])
    torch.testing.assert_close(found.loss, wanted, rtol=1e-5, atol=1e-6)
    has_positive = [
        label in [*first[1], *second[1][:i], *second[1][i + 1 :]]
        for i, label in enumerate(second[1])
    ]
    assert found.metrics["valid_anchor_fraction"].item() == pytest.approx(sum(has_positive) / 3)
    assert objective.queue is not None
    assert objective.queue.labels.tolist() == [-100, *first[1].tolist(), *second[1].tolist()]
    found.loss.backward()


def test_a_micro_batch_of_one_row_learns_from_the_queue():
    objective = build(feature_queue=4)
    x, _ = hidden(3, seed=1)
    for n, label in enumerate([0, 1, 0]):
        row = x[n : n + 1].clone().requires_grad_()
        out = objective(row, attention_mask=None, labels=torch.tensor([label]))
        out.loss.backward()
        has_positive = n == 2
        assert out.metrics["valid_anchor_fraction"].item() == has_positive
        assert row.grad is not None and bool(row.grad.any()) is has_positive


def test_fully_padded_rows_do_not_enter():
    objective = build(feature_queue=4)
    x, _ = hidden(3, seed=1)
    x[1] = float("nan")
    mask = torch.ones(3, 3).long()
    mask[1] = 0
    objective(x, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
    assert objective.queue is not None
    assert objective.queue.labels.tolist() == [-100, -100, 0, 2]
    assert torch.isfinite(objective.queue.features).all()


def test_outside_training_the_queue_is_neither_read_nor_written():
    objective, without = build(feature_queue=4), build()
    first, second = hidden(4, seed=1), hidden(3, seed=2)
    objective(first[0], attention_mask=None, labels=first[1])
    objective.commit_step()
    kept = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective.eval()
    found = objective(second[0], attention_mask=None, labels=second[1]).loss
    assert torch.equal(found, without(second[0], attention_mask=None, labels=second[1]).loss)
    assert all(torch.equal(kept[name], tensor) for name, tensor in objective.state_dict().items())


def test_without_a_queue_the_state_is_as_it_was():
    assert not any("queue" in name for name in build().state_dict())


@pytest.mark.parametrize(
    "options",
    [{}, {"projection": "linear", "projection_dim": 5}, {"projection": "identity"}],
)
def test_flops_count_the_queue(options: dict[str, Any]):
    objective = build(feature_queue=10, **options)
    x, labels = hidden(4, seed=1)
    with FlopCounterMode(display=False) as counter:
        objective(x, attention_mask=None, labels=labels)
    assert objective.flops(4, 3) == counter.get_total_flops()


@pytest.mark.parametrize(
    "options, width", [({}, 8), ({"projection_dim": 5}, 5), ({"projection": "identity"}, 8)]
)
def test_a_row_is_as_wide_as_the_projection(options: dict[str, Any], width: int):
    queue = build(feature_queue=3, **options).queue
    assert queue is not None and queue.features.shape == (3, width)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"feature_queue": -1}, "greater than or equal to 0"),
        ({"feature_queue": 1.5}, "valid integer"),
        ({"gather": "perhaps"}, "valid boolean"),
    ],
)
def test_options_refuse(options: dict[str, Any], message: str):
    with pytest.raises(pydantic.ValidationError, match=message):
        SupCon.Options(**options)


def test_a_queue_without_a_known_width_is_refused():
    with pytest.raises(RecipeError, match=r"scpl.objective.feature_queue: 4 rows need the width"):
        build(hidden_size=None, projection="identity", layer_norm=False, feature_queue=4)
