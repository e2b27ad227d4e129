"""What the local objective costs is timed on a real stage."""

from __future__ import annotations

import pytest
import torch

from scpl_ds.bench.head import Size, measure, render
from scpl_ds.errors import RecipeError


def test_each_micro_batch_size_is_a_row_with_the_heads_share_of_the_stage():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    size = Size(hidden_size=64, layers=2, sequence_length=8, vocab_size=50)
    rows = measure((2, 3), size=size, repeats=3)
    assert [(row["micro_batch"], row["layers"], row["threads"]) for row in rows] == [
        (2, 1, 1),
        (3, 1, 1),
    ]
    for row in rows:
        assert row["head_share"] == pytest.approx(row["head_s"] / row["stage_s"])
        assert min(row["stage_s"], row["layers_s"], row["head_s"]) > 0
    table = render(rows).splitlines()
    assert len(table) == 4 and table[3].startswith("| supcon | 64 | 1 | 3 x 8 |")
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_objectives_of_language_models_are_timed_on_a_language_models_stage():
    size = Size("causal-lm", hidden_size=64, layers=2, sequence_length=8, vocab_size=50)
    rows = measure((2,), size=size, objectives=("prototype", "logit_lens"), repeats=2)
    assert [row["objective"] for row in rows] == ["prototype", "logit_lens"]
    assert min(row["head_s"] for row in rows) > 0


def test_an_unknown_objective_is_named_before_anything_is_measured():
    with pytest.raises(RecipeError, match=r"--objectives: .*'prototyp'.*prototype"):
        measure((2,), objectives=("supcon", "prototyp"))
