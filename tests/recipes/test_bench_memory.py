"""``scpl-ds bench memory``: rows measured in processes of their own, beside what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scpl_ds import cli
from scpl_ds.bench import memory
from scpl_ds.bench.memory import SUITES, Case, Shape, recipe_of, render
from scpl_ds.errors import ScplError
from scpl_ds.recipe import check_world, recipe_from_mapping

KEYS = {
    "system", "stages", "ranks", "zero_stage", "parameter_bytes",
    "activation_and_gradient_bytes", "peak_bytes", "predicted_peak_bytes",
}  # fmt: skip
CASES = [(suite, case) for suite, (cases, _) in SUITES.items() for case in cases]


@pytest.mark.parametrize(("suite", "case"), CASES, ids=str)
def test_every_row_is_a_recipe_that_fits_its_ranks(suite: str, case: Case) -> None:
    recipe = recipe_from_mapping(recipe_of(case, SUITES[suite][1], Path("model")))
    assert check_world(recipe, case.ranks) == (case.pipeline_ranks, case.dp_size)
    assert recipe.deepspeed.zero_stage == case.zero_stage


def test_backprop_is_one_stage_that_learns_from_the_task_loss() -> None:
    recipe = recipe_from_mapping(recipe_of(Case("bp"), SUITES["standard"][1], Path("model")))
    assert recipe.scpl.stages == 1
    assert recipe.scpl.detach_features is False


def rows(cases: list[Case]) -> list[dict[str, Any]]:
    seen: list[int] = []
    shape = Shape("bert-11m", 4, 64)
    found = memory.run("standard", cases=cases, shape=shape, on_row=lambda r: seen.append(len(r)))
    assert seen == [*range(1, len(cases) + 1)]  # after each, so that an interrupted run keeps some
    return found


def test_a_measured_row_has_what_every_rank_held_and_what_was_predicted() -> None:
    one, two = rows([Case("bp"), Case("scpl", 2, 2, 1)])
    for row in (one, two):
        assert row.keys() >= KEYS
        assert len(row["per_rank"]) == row["ranks"]
        # Tens of megabytes: what libraries load on the way is a large part of it.
        assert 0.5 < row["predicted_peak_bytes"] / row["peak_bytes"] < 1.5
    held = [rank["parameter_bytes"] for rank in two["per_rank"]]
    assert max(held) == two["parameter_bytes"] < one["parameter_bytes"] <= sum(held)
    table = render([one, two])
    assert "| scpl | 2 | 2 | none | 0 |" in table


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["bench", "memory", "--json", str(tmp_path / "no" / "rows.json")])
    assert code == 2
    assert "--json" in capsys.readouterr().err


def test_an_existing_file_is_left_alone_until_there_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tmp_path / "rows.json"
    file.write_text("[1]")
    assert cli.main(["bench", "memory", "--suite", "gpu", "--json", str(file)]) == 2
    assert "--suite gpu" in capsys.readouterr().err
    assert file.read_text() == "[1]"


def test_a_case_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_LIMIT_S", 0.5)
    with pytest.raises(ScplError, match="took more than"):
        rows([Case("bp")])


@pytest.mark.slow
def test_four_stages_on_one_rank_need_less_than_half_of_backprops_activations_and_gradients() -> (
    None
):
    bp, scpl = memory.run("standard", cases=[Case("bp"), Case("scpl", stages=4)])
    key = "activation_and_gradient_bytes"
    assert scpl[key] <= 0.45 * bp[key]
    for row in (bp, scpl):
        assert row["predicted_peak_bytes"] == pytest.approx(row["peak_bytes"], rel=0.15)


@pytest.mark.slow
def test_a_llama_of_0_7_b_parameters_trains_in_four_offloaded_stages_as_predicted() -> None:
    (row,) = memory.run("large")
    for rank in row["per_rank"]:
        assert rank["predicted_peak_bytes"] == pytest.approx(rank["peak_bytes"], rel=0.15)
