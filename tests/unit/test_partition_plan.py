"""The cut: literal tables, and a brute-force comparison."""

from __future__ import annotations

import itertools
import random
from textwrap import dedent

import pytest

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import Anatomy
from scpl_ds.partition.plan import (
    PartitionPlan,
    make_plan,
    min_max_cut,
    render_plan,
    stages_of_rank,
)


def anatomy(layers: int = 12, *, layer: int = 100, embed: int = 0, head: int = 0) -> Anatomy:
    return Anatomy(
        layers="model.layers",
        num_layers=layers,
        prologue={"model.embed_tokens": "full"},
        epilogue=("model.norm", "lm_head"),
        free=(),
        layer_arity=0,
        forward_keys=("input_ids",),
        hidden_size=8,
        model_type="llama",
        sequence_length=128,
        layer_flops=(layer,) * layers,
        prologue_flops=0,
        epilogue_flops=head,
        layer_parameters=(10,) * layers,
        prologue_parameters=embed,
        epilogue_parameters=embed,
        tied={"lm_head.weight": "model.embed_tokens.weight"},
        tied_parameters=embed,
    )


@pytest.mark.parametrize(
    ("head", "stages", "bounds"),
    [
        (0, 4, (0, 3, 6, 9, 12)),
        (189, 4, (0, 4, 7, 10, 12)),
        (491, 4, (0, 4, 8, 11, 12)),
        (0, 5, (0, 3, 6, 8, 10, 12)),
        (0, 1, (0, 12)),
        (0, 12, tuple(range(13))),
    ],
)
def test_flops_cut_gives_the_stage_with_the_head_fewer_layers(
    head: int, stages: int, bounds: tuple[int, ...]
) -> None:
    assert make_plan(anatomy(head=head), stages).bounds == bounds


def test_a_local_head_as_dear_as_the_last_one_makes_the_cut_even_again() -> None:
    assert make_plan(anatomy(head=400), 4, "flops", head_flops=400).bounds == (0, 3, 6, 9, 12)


def test_a_last_stage_with_a_local_head_pays_for_it_too() -> None:
    one = make_plan(anatomy(), 4, "flops", head_flops=200)
    both = make_plan(anatomy(), 4, "flops", head_flops=200, head_on_last=True)
    assert (one.bounds, both.bounds) == ((0, 3, 6, 8, 12), (0, 3, 6, 9, 12))
    assert one.stage_flops(anatomy()) == [500, 500, 400, 400]
    assert both.stage_flops(anatomy()) == [500, 500, 500, 500]


def test_parameters_cut_counts_the_embedding_on_both_ends() -> None:
    assert make_plan(anatomy(embed=20), 4, "parameters").bounds == (0, 2, 6, 10, 12)


def test_uniform_cut_gives_the_first_stages_one_layer_more() -> None:
    assert make_plan(anatomy(layers=7), 3, "uniform").bounds == (0, 3, 5, 7)


def test_explicit_cut_is_taken_as_written() -> None:
    plan = make_plan(anatomy(layers=6), 2, [[0, 1], [1, 6]])
    assert plan == PartitionPlan((0, 1, 6), "explicit")
    assert [plan.span(k) for k in range(plan.num_stages)] == [(0, 1), (1, 6)]


@pytest.mark.parametrize(
    ("stages", "method", "message"),
    [
        (7, "flops", r"'llama' has 6 layers, fewer than scpl.stages: 7. Use at most 6 stages"),
        (0, "flops", r"scpl.stages must be at least 1, got 0"),
        (2, "flop", r"unknown method 'flop'; did you mean 'flops'\?"),
        (2, [[0, 3]], r"lists 1 stages, but scpl.stages is 2"),
        (2, [[0, 3], [4, 6]], r"stage 1 is \[4, 6\], but it must be \[3, n\]"),
        (2, [[0, 3], [2, 6]], r"stage 1 is \[2, 6\], but it must be \[3, n\]"),
        (2, [[0, 0], [0, 6]], r"stage 0 is \[0, 0\], but it must be \[0, n\] with n > 0"),
        (2, [[0, 3], [3, 5]], r"ends at layer 5, but the model has 6 layers"),
        (2, [[0, 3], [3, 7]], r"ends at layer 7, but the model has 6 layers"),
        (2, [[0], [3, 6]], r"stage 0 is \[0\]"),
    ],
)
def test_a_cut_that_cannot_be_is_refused_with_what_to_do(stages, method, message) -> None:
    with pytest.raises(PartitionError, match=message):
        make_plan(anatomy(layers=6), stages, method)


def test_min_max_cut_equals_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(150):
        layers, stages = rng.randint(1, 9), rng.randint(1, 5)
        if stages > layers:
            continue
        costs = [rng.randint(1, 20) for _ in range(layers)]
        ends = (rng.randint(0, 30), rng.randint(0, 30))

        def cost(stage: int, start: int, end: int, costs=costs, ends=ends, last=stages - 1) -> int:
            extra = (ends[0] if stage == 0 else 0) + (ends[1] if stage == last else 0)
            return sum(costs[start:end]) + extra

        def score(bounds: tuple[int, ...], cost=cost) -> tuple[int, int]:
            spans = [cost(k, a, b) for k, (a, b) in enumerate(itertools.pairwise(bounds))]
            return max(spans), sum(s * s for s in spans)

        cuts = [(0, *c, layers) for c in itertools.combinations(range(1, layers), stages - 1)]
        assert score(min_max_cut(layers, stages, cost)) == min(map(score, cuts))


def test_ranks_take_consecutive_stages_the_first_ones_more() -> None:
    assert stages_of_rank(5, 2) == [range(0, 3), range(3, 5)]
    assert stages_of_rank(4, 4) == [range(k, k + 1) for k in range(4)]
    assert stages_of_rank(3, 1) == [range(0, 3)]


@pytest.mark.parametrize("ranks", [0, 4])
def test_more_ranks_than_stages_are_refused(ranks: int) -> None:
    with pytest.raises(
        PartitionError, match=r"scpl.pipeline_ranks: \d does not fit scpl.stages: 3"
    ):
        stages_of_rank(3, ranks)


def test_the_table_shows_what_every_stage_holds_and_where() -> None:
    model = anatomy(layers=6, embed=1000, head=100)
    plan = make_plan(model, 3)
    drawn = render_plan(plan, model, pipeline_ranks=2, data_parallel=2)
    assert drawn == dedent("""\
        llama: 6 layers in 3 stages, cut by flops, 2.06 k parameters, FLOPs of 128 tokens
        stage  layers  holds                parameters  forward FLOPs  share  ranks
        0      0-2     prologue + 3 layers      1.03 k            300  42.9%  0-1
        1      3-4     2 layers                     20            200  28.6%  0-1
        2      5       1 layer + epilogue       1.01 k            200  28.6%  2-3""")


def test_one_stage_counts_a_tied_matrix_once() -> None:
    plan = make_plan(anatomy(layers=6, embed=1000), 1)
    assert plan.stage_parameters(anatomy(layers=6, embed=1000)) == [1060]
