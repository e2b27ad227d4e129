"""``scpl-ds bench quality``: the grid, what is selected, and that it goes on where it stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from scpl_ds.bench import quality
from scpl_ds.bench.quality_table import render, selected
from scpl_ds.cli import main
from scpl_ds.errors import RecipeError
from scpl_ds.recipe import recipe_from_mapping
from tests.support import tiny, tiny_lm

pytestmark = pytest.mark.forks

METHODS = ("bp", "early_exit", "freeze")


def recipe(folder: Path) -> Any:
    return recipe_from_mapping(tiny.make(folder))


def test_every_method_has_a_selected_row_for_each_number_of_stages_and_seed(tmp_path: Path):
    seen: list[int] = []
    figures = quality.run(
        recipe(tmp_path),
        methods=METHODS,
        stages=(4,),
        seeds=2,
        learning_rates=(1e-6, 3e-3),
        validation=0.25,
        jobs=2,
        on_figures=lambda found: seen.append(len(found["rows"]) + len(found["trials"])),
    )
    cells = {(row["method"], row["stages"], row["seed"]) for row in figures["rows"]}
    wanted = {("bp", 1)} | {(m, 4) for m in METHODS[1:]}
    assert cells == {(m, k, 42 + s) for m, k in wanted for s in range(2)}
    assert len(figures["rows"]) == len(cells)
    for row in figures["rows"]:
        assert 0 <= row["validation_accuracy"] <= 1 and 0 <= row["test_accuracy"] <= 1
        assert row["samples_per_s"] > 0 and row["validation_samples"] == 16
    # Two rates were tried with the first seed only.
    assert len(figures["trials"]) == len(wanted)
    assert seen == list(range(1, len(cells) + len(wanted) + 1))
    early = [row for row in figures["rows"] if row["method"] == "early_exit"]
    assert set(early[0]["exit_accuracies"]) == {"0", "1", "2"}
    table = render(figures["rows"])
    assert "| bp | 1 |" in table and "+" in table

    def must_not_run(*_: Any, **__: Any) -> Any:
        raise AssertionError("everything is done already")

    before = json.loads(json.dumps(figures))
    again = quality.run(
        recipe(tmp_path), methods=METHODS, stages=(4,), seeds=2, learning_rates=(1e-6, 3e-3),
        validation=0.25, before=before, on_figures=must_not_run,
    )  # fmt: skip
    assert again["rows"] == figures["rows"]


def test_the_same_seed_gives_the_same_figures_alone_and_beside_others(tmp_path: Path):
    asked: dict[str, Any] = {"stages": (2,), "seeds": 1}
    both = quality.run(recipe(tmp_path), methods=("default", "freeze"), jobs=2, **asked)
    alone = quality.run(recipe(tmp_path), methods=("freeze",), jobs=1, **asked)
    found = [row for row in both["rows"] if row["method"] == "freeze"]
    for key in ("validation_accuracy", "test_accuracy"):
        assert found[0][key] == alone["rows"][0][key]


def test_figures_of_other_settings_are_refused(tmp_path: Path):
    mapping = tiny.make(tmp_path)
    first = quality.run(recipe_from_mapping(mapping), methods=("bp",), stages=(2,), seeds=1)
    mapping["train"]["num_train_epochs"] = 2
    with pytest.raises(RecipeError, match="another recipe"):
        quality.run(
            recipe_from_mapping(mapping), methods=("bp",), stages=(2,), seeds=1, before=first
        )


def test_figures_of_a_version_without_a_key_that_is_at_its_default_are_gone_on_with(
    tmp_path: Path,
):
    asked = recipe_from_mapping(tiny.make(tmp_path))
    first = quality.run(asked, methods=("bp",), stages=(2,), seeds=1)
    for section, key in (("data", "streaming"), ("data", "packing"), ("train", "sample_prompts")):
        del first["settings"]["recipe"][section][key]
    again = quality.run(asked, methods=("bp",), stages=(2,), seeds=1, before=first)
    assert again["rows"] == first["rows"]
    assert not again["trials"]


def test_a_variant_keeps_its_meaning_over_calls_that_do_not_ask_for_it(tmp_path: Path):
    asked: dict[str, Any] = {"stages": (2,), "seeds": 1}
    sharp = {"objective": {"name": "supcon", "temperature": 0.05}}
    one = recipe(tmp_path)
    figures = quality.run(one, methods=("sharp",), variants={"sharp": sharp}, **asked)
    figures = quality.run(one, methods=("freeze",), before=figures, **asked)
    assert {row["method"] for row in figures["rows"]} == {"sharp", "freeze"}
    with pytest.raises(RecipeError, match="another variant sharp"):
        other = {"sharp": {"objective": "early_exit"}}
        quality.run(one, methods=("sharp",), variants=other, before=figures, **asked)


def test_what_could_not_mean_what_it_says_is_refused_before_anything_is_trained(tmp_path: Path):
    mapping = tiny.make(tmp_path)
    with pytest.raises(RecipeError, match="--variants: supcon is a method already"):
        quality.run(
            recipe_from_mapping(mapping), methods=("supcon",), stages=(2,), seeds=1,
            variants={"supcon": {"lookahead": 1}},
        )  # fmt: skip
    params = {"warmup_max_lr": 1e-3, "warmup_num_steps": 2}
    mapping["deepspeed"]["scheduler"] = {"type": "WarmupLR", "params": params}
    for key in ("lr_scheduler_type", "warmup_ratio", "warmup_steps"):
        mapping["train"].pop(key, None)
    with pytest.raises(RecipeError, match=r"warmup_max_lr: 0\.001 is what every training"):
        quality.run(
            recipe_from_mapping(mapping), methods=("bp",), stages=(2,), seeds=1,
            learning_rates=(1e-4,),
        )  # fmt: skip


def test_keys_of_the_recipe_that_no_method_says_hold_for_all_of_them(tmp_path: Path):
    mapping = tiny.make(tmp_path)
    mapping["scpl"] |= {"head_lr": 2.0, "objective": {"name": "supcon", "temperature": 0.5}}
    asked = quality.Trial("default", 2, 42, 1e-3)
    own = quality.recipe_of(recipe_from_mapping(mapping), asked, {}).scpl
    assert own.head_lr == 2.0 and own.objective.options.temperature == 0.1


def test_a_method_that_fails_is_a_trial_with_its_error(tmp_path: Path):
    figures = quality.run(recipe(tmp_path), methods=("supcon", "bp"), stages=(9,), seeds=1)
    assert [row["method"] for row in figures["rows"]] == ["bp"]
    (failed,) = figures["trials"]
    assert failed["stages"] == 9 and "PartitionError" in failed["error"]


def test_an_unknown_method_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"unknown method 'bpp'; did you mean 'bp'\?"):
        quality.run(recipe(tmp_path), methods=("bpp",), stages=(2,), seeds=1)


def test_the_command_reads_variants_and_goes_on_with_its_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mapping = tiny.make(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping))
    variants = {"sharp": {"objective": {"name": "supcon", "temperature": 0.05}}}
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(variants))
    out = tmp_path / "q.json"
    words = [
        "bench", "quality", str(tmp_path / "r.yaml"), "train.num_train_epochs=0.5", "--methods",
        "bp,sharp", "--seeds", "1", "--variants", str(tmp_path / "v.yaml"), "--json", str(out),
    ]  # fmt: skip
    assert main(words) == 0
    first = json.loads(out.read_text())
    assert {row["method"] for row in first["rows"]} == {"bp", "sharp"}
    assert "| sharp | 2 |" in capsys.readouterr().out
    picture = tmp_path / "q.png"
    assert main([*words, "--plot", str(picture)]) == 0
    assert json.loads(out.read_text())["rows"] == first["rows"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_learning_rate_is_selected_by_validation_and_never_by_test():
    def row(rate: float, seed: int, validation: float, test: float) -> dict[str, Any]:
        return {
            "method": "a", "stages": 2, "seed": seed, "learning_rate": rate,
            "validation_accuracy": validation, "test_accuracy": test,
        }  # fmt: skip

    tried = [row(1, 0, 0.8, 0.9), row(2, 0, 0.9, 0.7), row(2, 1, 0.5, 0.5)]
    chosen, others = selected(tried)
    assert chosen == [tried[1], tried[2]] and others == [tried[0]]
    plateau = [row(rate, 0, 0.9, rate / 9) for rate in (3, 1, 2)]
    assert selected([*plateau, row(4, 0, 0.8, 1.0)])[0] == [plateau[2]]


def test_a_rate_that_diverged_is_never_the_best_one():
    rows = [
        {"method": "bp", "stages": 1, "seed": 0, "learning_rate": rate, "validation_perplexity": p}
        for rate, p in ((1e-4, math.nan), (2e-4, 9.0), (4e-4, math.inf))
    ]
    assert [row["learning_rate"] for row in selected(rows)[0]] == [2e-4]


def test_a_language_model_is_scored_on_other_texts_before_and_after(tmp_path: Path):
    tiny_lm.save(tmp_path / "model")
    for name, text in (("a", "the cat sat on the mat. "), ("other", "a red dog ran far. ")):
        (tmp_path / f"{name}.txt").write_text(text * 40)
    other = tmp_path / "other.txt"
    recipe = recipe_from_mapping(
        {
            "model": {"name_or_path": str(tmp_path / "model"), "task": "causal-lm"},
            "scpl": {"stages": 2, "sharding": "none"},
            "deepspeed": {
                "train_micro_batch_size_per_gpu": 4,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            },
            "data": {
                "name": "text", "train": str(tmp_path / "a.txt"), "eval": str(tmp_path / "a.txt"),
                "max_length": 16, "document": "file",
            },
            "train": {"max_steps": 5, "output_dir": str(tmp_path / "run")},
        }
    )  # fmt: skip
    asked: dict[str, Any] = {"methods": ("untrained", "bp"), "stages": (2,), "seeds": 1}
    asked |= {"learning_rates": (1e-3, 1e-2), "validation": 0.25, "also": [other]}
    figures = quality.run(recipe, **asked)
    by_method = {row["method"]: row for row in figures["rows"]}
    before, after = by_method["untrained"], by_method["bp"]
    assert before["steps"] == 0 < after["steps"] and len(figures["trials"]) == 1
    for row in (before, after):
        assert row["also_perplexity"].keys() == {"other"} and row["also_perplexity"]["other"] > 1
    assert before["also_perplexity"] != after["also_perplexity"]
    table = render(figures["rows"])
    assert "other: perplexity" in table.splitlines()[0] and "| untrained | 1 |" in table
    with pytest.raises(RecipeError, match="list of further texts"):
        quality.run(recipe, **{**asked, "also": ()}, before=figures)


def test_other_texts_are_for_language_models_and_must_exist(tmp_path: Path):
    asked: dict[str, Any] = {"methods": ("bp",), "stages": (2,), "seeds": 1}
    with pytest.raises(RecipeError, match="--also: the perplexity of a text is a language model's"):
        quality.run(recipe(tmp_path), **asked, also=[tmp_path / "none.txt"])
