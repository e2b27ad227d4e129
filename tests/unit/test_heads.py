"""Pooling never sees padding; heads have the shapes and the parameters they say."""

from __future__ import annotations

import pytest
import torch

from scpl_ds.objectives._heads import ProjectionHead, pool

torch.set_num_threads(1)

MASKS = {
    "none": [1, 1, 1, 1],
    "right": [1, 1, 0, 0],
    "left": [0, 0, 1, 1],
    "inside": [1, 0, 1, 0],
    "one": [0, 1, 0, 0],
}


def example(mask):
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return hidden, torch.tensor([mask, [1, 1, 1, 1]])


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("padding", MASKS)
def test_pooling_is_that_of_the_row_without_its_padding(padding, how):
    hidden, mask = example(MASKS[padding])
    real = hidden[0][mask[0].bool()]
    expected = {"mean": real.mean(0), "cls": real[0], "last": real[-1]}[how]
    torch.testing.assert_close(pool(hidden, mask, how)[0], expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("padding", MASKS)
def test_what_stands_at_a_padded_position_neither_counts_nor_learns(padding, how):
    hidden, mask = example(MASKS[padding])
    dirty = hidden.masked_fill(~mask.bool()[..., None], float("nan")).requires_grad_()
    pooled = pool(dirty, mask, how)
    assert torch.equal(pooled, pool(hidden, mask, how))
    (gradient,) = torch.autograd.grad(pooled.sum(), dirty)
    assert torch.isfinite(gradient).all() and not gradient[~mask.bool()].any()


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_a_fully_padded_row_is_zeros_with_no_gradient(how):
    hidden, mask = example([0, 0, 0, 0])
    dirty = hidden.clone()
    dirty[0] = float("nan")
    dirty.requires_grad_()
    pooled = pool(dirty, mask, how)
    (gradient,) = torch.autograd.grad(pooled.sum(), dirty)
    assert not pooled[0].any() and not gradient[0].any()


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_mask_may_have_any_dtype_and_no_mask_means_no_padding(how, dtype):
    hidden, mask = example([1, 1, 1, 1])
    assert torch.equal(pool(hidden, mask.to(dtype), how), pool(hidden, None, how))


def test_pooled_hidden_states_pass_through():
    hidden = torch.randn(3, 4)
    assert torch.equal(pool(hidden, None, "mean"), hidden)
    mask = torch.tensor([[1, 0], [0, 0], [1, 1]])
    assert torch.equal(pool(hidden, mask, "last"), hidden * torch.tensor([[1.0], [0], [1]]))


def test_a_bfloat16_mean_is_summed_in_float32():
    hidden = torch.full((1, 4096, 2), 1.0).bfloat16()  # a bfloat16 sum would stop at 256
    pooled = pool(hidden, None, "mean")
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(1, 2))


@pytest.mark.parametrize(
    "hidden, mask, how, message",
    [
        ((2, 3, 4, 5), None, "mean", r"got \[2, 3, 4, 5\]"),
        ((2, 3, 4), (2, 5), "mean", r"attention_mask has shape \[2, 5\].*\[2, 3, 4\]"),
        ((2, 3, 4), (2, 1, 3, 3), "mean", r"attention_mask has shape \[2, 1, 3, 3\]"),
        ((2, 4), (3, 4), "mean", r"attention_mask has shape \[3, 4\]"),
        ((2, 3, 4), None, "max", "pooling must be 'mean', 'cls' or 'last', got 'max'"),
    ],
)
def test_pool_refuses(hidden, mask, how, message):
    mask = None if mask is None else torch.ones(mask)
    with pytest.raises(ValueError, match=message):
        pool(torch.zeros(hidden), mask, how)


@pytest.mark.parametrize(
    "options, names, output",
    [
        ({"projection": "identity"}, [], 6),
        ({"projection": "identity", "layer_norm": True}, ["norm.bias", "norm.weight"], 6),
        (
            {"projection": "linear", "output_size": 2, "layer_norm": True},
            ["norm.bias", "norm.weight", "projector.bias", "projector.weight"],
            2,
        ),
        (
            {"projection": "mlp", "hidden_size": 9, "output_size": 3},
            [f"projector.{i}.{n}" for i in (0, 2) for n in ("bias", "weight")],
            3,
        ),
        (
            {"projection": "mlp"},
            [f"projector.{i}.{n}" for i in (0, 2) for n in ("bias", "weight")],
            6,
        ),
    ],
)
def test_a_head_has_the_parameters_and_the_width_asked_for(options, names, output):
    head = ProjectionHead(6, **options)
    assert sorted(name for name, _ in head.named_parameters()) == names
    assert head(torch.zeros(4, 6)).shape == (4, output)


def test_an_mlp_is_linear_relu_linear_without_batch_norm():
    head = ProjectionHead(6, projection="mlp")
    first, _, second = head.projector  # type: ignore[misc]
    x = torch.randn(4, 6)
    assert torch.equal(head(x), second(first(x).relu()))


def test_a_head_with_parameters_needs_the_width():
    with pytest.raises(ValueError, match="'mlp' projection with layer_norm has parameters"):
        ProjectionHead(None, projection="mlp", layer_norm=True)
