"""The supervised contrastive objective against the authors' formula, and at its edges."""

from __future__ import annotations

import doctest
import math

import pydantic
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scpl_ds import registry
from scpl_ds.errors import RecipeError
from scpl_ds.memory_track import LiveBytes
from scpl_ds.objectives import _contrast
from scpl_ds.objectives.supcon import SupCon, supcon_loss

torch.set_num_threads(1)


def authors_loss(h, labels, temperature):
    """The formula of minyaho/SCPL, model/loss_fn.py, LocalLoss, written out anchor by anchor.

    z = h / |h|; s_ij = z_i.z_j / t less its row maximum (i = j included, constant for autograd);
    P(i) = {j != i: y_j = y_i}; logp_ij = s_ij - log sum over k != i of exp(s_ik);
    l_i = - sum over P(i) of logp_ij / (|P(i)| + 1); the loss is the mean of l_i over all anchors.
    """
    z = h / h.pow(2).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    total = h.new_zeros(())
    for i in range(len(z)):
        s = (z[i] * z).sum(1) / temperature
        s = s - s.max().detach()
        others = [k for k in range(len(z)) if k != i]
        log_sum = s[others].exp().sum().log()
        positives = [j for j in others if labels[j] == labels[i]]
        log_probabilities = [s[j] - log_sum for j in positives]
        total = total - sum(log_probabilities, h.new_zeros(())) / (len(positives) + 1)
    return total / len(z)


def value_and_gradient(loss_of, embeddings):
    leaf = embeddings.detach().clone().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def random_batch(rows, classes, *, seed=0, dtype=torch.float64, width=7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    return torch.randn(rows, width, generator=generator, dtype=dtype) * 3, labels


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("rows, classes", [(2, 1), (5, 3), (16, 2), (24, 30)])
def test_paper_normalisation_equals_the_authors_formula(rows, classes, temperature):
    h, labels = random_batch(rows, classes, seed=rows)
    ours = value_and_gradient(lambda x: supcon_loss(x, labels, temperature=temperature), h)
    theirs = value_and_gradient(lambda x: authors_loss(x, labels, temperature), h)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_an_anchor_without_positives_stays_in_the_paper_mean_and_leaves_the_khosla_mean():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    one_anchor = -(1.0 - math.log(math.e + 1.0))  # its positive at cosine 1, the other at 0
    paper = supcon_loss(x, labels, temperature=1.0)
    khosla = supcon_loss(x, labels, temperature=1.0, pos_norm="khosla")
    assert paper.item() == pytest.approx(2 * one_anchor / 2 / 3, abs=1e-14)
    assert khosla.item() == pytest.approx(one_anchor, abs=1e-14)


def test_docstring_examples_hold():
    failures, tried = doctest.testmod(_contrast)
    assert tried and not failures


@pytest.mark.parametrize("pos_norm", ["paper", "khosla"])
@pytest.mark.parametrize(
    "labels",
    [[], [3], [0, 1, 2, 3], [-100, -100, -100], [0, -100], [5, -100, -100, 6]],
    ids=["empty", "one row", "all singletons", "all ignored", "one kept", "two kept, no pair"],
)
def test_a_batch_without_a_pair_gives_zero_and_a_gradient_of_zeros(labels, pos_norm):
    h, _ = random_batch(len(labels), 1, dtype=torch.float32)
    loss, gradient = value_and_gradient(
        lambda x: supcon_loss(x, torch.tensor(labels, dtype=torch.int64), pos_norm=pos_norm), h
    )
    assert loss.item() == 0.0
    assert torch.equal(gradient, torch.zeros_like(h))


@pytest.mark.parametrize("pos_norm", ["paper", "khosla"])
def test_an_ignored_row_counts_for_nothing_even_when_it_holds_nan(pos_norm):
    h, labels = random_batch(9, 3)
    keep = torch.tensor([True, True, False, True, True, True, False, True, True])
    dirty = h.masked_fill(~keep[:, None], float("nan"))
    marked = labels.masked_fill(~keep, -100)
    loss, gradient = value_and_gradient(lambda x: supcon_loss(x, marked, pos_norm=pos_norm), dirty)
    expected, expected_gradient = value_and_gradient(
        lambda x: supcon_loss(x, labels[keep], pos_norm=pos_norm), h[keep]
    )
    # The sums run over more zeros, in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[keep], expected_gradient, rtol=1e-11, atol=1e-13)
    assert not gradient[~keep].any()


def test_identical_and_zero_rows_have_a_finite_gradient():
    h = torch.zeros(4, 3)
    h[:2] = 1.0
    for pos_norm in ("paper", "khosla"):
        loss, gradient = value_and_gradient(
            lambda x, p=pos_norm: supcon_loss(x, torch.tensor([0, 0, 1, 1]), pos_norm=p), h
        )
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_compared_in_float32(dtype):
    h, labels = random_batch(12, 3, dtype=torch.float32)
    half = h.to(dtype)
    assert torch.equal(supcon_loss(half, labels), supcon_loss(half.float(), labels))
    assert supcon_loss(half, labels).dtype == torch.float32


def test_autocast_does_not_reach_the_similarities():
    h, labels = random_batch(12, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supcon_loss(h, labels)
    assert torch.equal(loss, supcon_loss(h, labels))


def test_the_same_label_in_any_integer_type_gives_the_same_loss():
    h, labels = random_batch(12, 3)
    for dtype in (torch.int32, torch.uint8, torch.bool):
        expected = supcon_loss(h, labels.to(dtype).long())
        assert torch.equal(supcon_loss(h, labels.to(dtype)), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.zeros(3).long()}, r"\[4, 2\] and labels of shape \[3\]"),
        ({"labels": torch.zeros(4)}, "integer labels, got torch.float32"),
        ({"embeddings": torch.zeros(4, 2, 2)}, r"one vector and one label per row.*\[4, 2, 2\]"),
        ({"embeddings": torch.zeros(4, 2).long()}, "floating point embeddings"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
        ({"pos_norm": "mean"}, "pos_norm must be 'paper' or 'khosla', got 'mean'"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 row, got 0"),
    ],
)
def test_supcon_loss_refuses(change, message):
    arguments = {"embeddings": torch.zeros(4, 2), "labels": torch.zeros(4).long(), **change}
    with pytest.raises(ValueError, match=message):
        supcon_loss(**arguments)


# ------------------------------------------------------------------------------ chunks of anchors


def remembered_rows(rows, *, width=7):
    features, labels = random_batch(rows, 3, seed=99, width=width)
    labels[::4] = -100
    return features, labels


@pytest.mark.parametrize("pos_norm", ["paper", "khosla"])
@pytest.mark.parametrize("remembered", [None, 0, 11])
@pytest.mark.parametrize("rows, chunk_size", [(2, 1), (24, 1), (24, 8), (25, 8), (25, 24), (40, 7)])
def test_chunks_of_anchors_give_the_loss_and_the_gradient_of_one_piece(
    rows, chunk_size, remembered, pos_norm
):
    h, labels = random_batch(rows, 3)
    labels[3::5] = -100
    memory = None if remembered is None else remembered_rows(remembered)
    in_chunks, whole = (
        value_and_gradient(
            lambda x, c=c: supcon_loss(x, labels, pos_norm=pos_norm, memory=memory, chunk_size=c), h
        )
        for c in (chunk_size, rows)
    )
    # Gradients of the chunks are added up in another order.
    torch.testing.assert_close(in_chunks, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_the_gradient_is_that_of_finite_differences(chunk_size):
    h, labels = random_batch(7, 3)
    labels[2] = -100
    memory = remembered_rows(4)
    assert torch.autograd.gradcheck(
        lambda x: supcon_loss(x, labels, temperature=0.5, memory=memory, chunk_size=chunk_size),
        h.requires_grad_(),
    )


def test_autocast_does_not_reach_the_similarities_that_backward_computes_again():
    h, labels = random_batch(12, 3, dtype=torch.float32)
    wanted = value_and_gradient(lambda x: supcon_loss(x, labels, chunk_size=5), h)
    leaf = h.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supcon_loss(leaf, labels, chunk_size=5)
    loss.backward()
    assert torch.equal(loss, wanted[0]) and torch.equal(leaf.grad, wanted[1])


def peak_of(loss_of, embeddings):
    """Bytes alive at once in forward and backward, of what they made."""
    leaf = embeddings.clone().requires_grad_()
    with LiveBytes([leaf]) as tracker:
        loss_of(leaf).backward()
    return tracker.peak


@pytest.mark.parametrize("remembered", [0, 512])
def test_no_more_than_a_few_chunks_of_similarities_live_at_a_time(remembered):
    rows, chunk_size = 1024, 32
    h, labels = random_batch(rows, 3, dtype=torch.float32)
    memory = remembered_rows(remembered)

    def peak(chunk_size):
        return peak_of(lambda x: supcon_loss(x, labels, memory=memory, chunk_size=chunk_size), h)

    matrix = 4 * rows * (rows + remembered)
    assert peak(chunk_size) < 8 * matrix * chunk_size / rows  # of 32 chunks
    assert peak(rows) > 2 * matrix


def test_memory_grows_with_the_rows_and_not_with_their_square():
    def peak(rows):
        h, labels = random_batch(rows, 3, dtype=torch.float32)
        return peak_of(lambda x: supcon_loss(x, labels, chunk_size=16), h)

    assert peak(2048) < 2.2 * peak(1024)


@pytest.mark.slow
def test_sixteen_thousand_rows_fit():
    """One [N, N] matrix of them would take 1 GiB."""
    h, labels = random_batch(16384, 10, dtype=torch.float32, width=128)
    assert peak_of(lambda x: supcon_loss(x, labels), h) < 512 * 2**20


# ------------------------------------------------------------------------------- the objective


def build(*, hidden_size=8, num_labels=3, **options):
    torch.manual_seed(0)
    return SupCon(SupCon.Options(**options), hidden_size=hidden_size, num_labels=num_labels)


def hidden_batch(rows=6, positions=5, width=8):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, positions, width, generator=generator)
    mask = torch.ones(rows, positions, dtype=torch.long)
    mask[0, 3:] = 0
    mask[1, :2] = 0
    return hidden, mask, torch.tensor([0, 0, 1, 1, 2, 2])


def test_the_recipe_name_leads_to_the_class():
    assert registry.resolve("objective", "supcon", where="scpl.objective.name") is SupCon


def test_the_papers_setting_is_the_loss_of_the_masked_means():
    hidden, mask, labels = hidden_batch()
    objective = build(projection="identity", layer_norm=False)
    out = objective(hidden, attention_mask=mask, labels=labels)
    pooled = torch.stack([row[m.bool()].mean(0) for row, m in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(out.loss, supcon_loss(pooled, labels), rtol=1e-6, atol=1e-6)
    assert not list(objective.parameters())


def test_the_recipes_chunk_size_bounds_what_the_objective_takes_and_not_what_it_learns():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(512, 8, generator=generator)
    labels = torch.randint(0, 3, (512,), generator=generator)
    peaks, outputs, gradients = [], [], []
    for chunk_size in (16, 512):
        objective = build(chunk_size=chunk_size, feature_queue=64)
        for _ in range(2):  # the second micro-batch meets a queue that is full
            with LiveBytes([hidden, *objective.parameters(), *objective.buffers()]) as tracker:
                output = objective(hidden, attention_mask=None, labels=labels)
                output.loss.backward()
        peaks.append(tracker.peak)
        outputs.append(output)
        gradients.append([parameter.grad for parameter in objective.parameters()])
    assert 4 * peaks[0] < peaks[1]
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert torch.equal(*(output.metrics["valid_anchor_fraction"] for output in outputs))


def test_every_head_parameter_gets_a_gradient_even_without_a_pair():
    hidden, mask, _ = hidden_batch()
    objective = build()
    out = objective(hidden, attention_mask=mask, labels=torch.arange(6))
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert out.metrics["valid_anchor_fraction"].item() == 0.0
    gradients = {name: p.grad for name, p in objective.named_parameters()}
    assert gradients and all(g is not None and not g.any() for g in gradients.values())


def test_a_fully_padded_row_changes_nothing_but_the_share_of_valid_anchors():
    hidden, mask, labels = hidden_batch()
    objective = build(pos_norm="khosla", pooling="last")
    without = objective(hidden, attention_mask=mask, labels=labels)
    padded = torch.cat([hidden, torch.full_like(hidden[:2], float("nan"))]).requires_grad_()
    out = objective(
        padded,
        attention_mask=torch.cat([mask, torch.zeros_like(mask[:2])]),
        labels=torch.cat([labels, torch.tensor([0, 0])]),
    )
    out.loss.backward()
    torch.testing.assert_close(out.loss, without.loss, rtol=1e-5, atol=1e-6)
    assert without.metrics["valid_anchor_fraction"].item() == 1.0
    assert out.metrics["valid_anchor_fraction"].item() == pytest.approx(6 / 8)
    assert padded.grad is not None and torch.isfinite(padded.grad).all()
    assert not padded.grad[6:].any()


def test_only_real_positions_get_a_gradient():
    hidden, mask, labels = hidden_batch()
    hidden.requires_grad_()
    build()(hidden, attention_mask=mask, labels=labels).loss.backward()
    assert hidden.grad is not None
    reached = hidden.grad.abs().sum(-1) > 0
    assert torch.equal(reached, mask.bool())


def test_metrics_are_detached_scalars():
    hidden, mask, labels = hidden_batch()
    out = build()(hidden.requires_grad_(), attention_mask=mask, labels=labels)
    assert out.loss.requires_grad
    assert all(m.ndim == 0 and not m.requires_grad for m in out.metrics.values())


@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_is_float32_whatever_backend_and_model_use(hidden_dtype, head_dtype):
    hidden, mask, labels = hidden_batch()
    objective = build().to(head_dtype)
    out = objective(hidden.to(hidden_dtype), attention_mask=mask, labels=labels)
    assert out.loss.dtype == torch.float32 and torch.isfinite(out.loss)


def test_the_same_seed_draws_the_same_head():
    first, second = build(), build()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_layer_norm_makes_the_loss_blind_to_the_scale_of_single_samples():
    hidden, mask, labels = hidden_batch()
    scaled = hidden * torch.tensor([1.0, 50, 1, 200, 1, 1])[:, None, None]
    objective = build()
    before = objective(hidden, attention_mask=mask, labels=labels).loss
    after = objective(scaled, attention_mask=mask, labels=labels).loss
    # LayerNorm's own epsilon keeps this from being exact.
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection": "linear", "projection_dim": 5},
        {"projection": "identity"},
        {"hidden_dim": 12, "projection_dim": 3},
    ],
)
def test_flops_are_what_the_flop_counter_counts(options):
    hidden, mask, labels = hidden_batch()
    objective = build(**options)
    with FlopCounterMode(display=False) as counter:
        objective(hidden, attention_mask=mask, labels=labels)
    assert objective.flops(6, 5) == counter.get_total_flops()


@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.rand(6), "regression and multi-label targets have no classes"),
        (torch.rand(6, 3), "regression and multi-label targets have no classes"),
        (torch.zeros(6, 5).long(), "causal-lm.*sequence-classification"),
        (torch.zeros(4).long(), "4 labels for 6 rows"),
        (None, "no 'labels'"),
    ],
)
def test_labels_without_one_class_per_sample_are_refused(labels, message):
    hidden, mask, _ = hidden_batch()
    with pytest.raises(ValueError, match=message):
        build()(hidden, attention_mask=mask, labels=labels)


def test_a_regression_task_is_refused_when_the_objective_is_built():
    with pytest.raises(RecipeError, match=r"num_labels is 1, which means regression"):
        build(num_labels=1)


def test_a_head_without_a_known_width_is_refused_and_one_without_parameters_is_not():
    with pytest.raises(RecipeError, match=r"needs the hidden size.*projection: identity"):
        build(hidden_size=None)
    build(hidden_size=None, projection="identity", layer_norm=False)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": float("inf")}, "finite"),
        ({"temprature": 0.1}, "Extra inputs"),
        ({"pooling": "max"}, "'mean', 'cls' or 'last'"),
        ({"projection": "identity", "projection_dim": 4}, "projection_dim: 4 needs a head"),
        ({"projection": "linear", "hidden_dim": 4}, "hidden_dim: 4 is the hidden layer of an mlp"),
        ({"projection_dim": 0}, "greater than 0"),
        ({"chunk_size": 0}, "greater than 0"),
    ],
)
def test_options_refuse(options, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        SupCon.Options(**options)
