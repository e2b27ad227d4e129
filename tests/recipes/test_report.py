"""The start banner of a run, and the page that ``scpl-ds report`` makes of what it left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from scpl_ds.memory_sizes import show_size
from scpl_ds.report import page
from scpl_ds.report.charts import show
from scpl_ds.report.reading import RunFiles
from scpl_ds.sharding.none import NoneBackend
from tests.support import browser, tiny
from tests.support.html_page import Page
from tests.support.tiny import Bomb, put, train

STEPS = 8


class Asked(Bomb):
    """Asks its process to stop, the way a queue does."""

    def tick(self, step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


class Silent(NoneBackend):
    """Says nothing about its memory."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("report")
    changes = {
        "train.logging_steps": 1, "train.eval_strategy": "steps", "train.eval_steps": 4,
        "train.save_strategy": "steps", "train.save_steps": 2, "train.profile": True,
        "train.sample_predictions": 3,
        "deepspeed.gradient_accumulation_steps": 1,
    }  # fmt: skip
    return put(tiny.make(folder), changes)


@pytest.fixture(scope="module")
def run(base: dict[str, Any]) -> Path:
    folder = Path(base["train"]["output_dir"])
    assert train(base) == 0
    return folder


@pytest.fixture(scope="module")
def found(run: Path) -> Page:
    return Page(page.one(RunFiles.open(run)))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_curve_has_the_points_of_metrics_jsonl(run: Path, found: Page):
    rows, curves = rows_of(run), found.curves()
    wanted = {
        "stage 0": "stage0/loss", "training (stage 1)": "head/loss", "learning rate": "lr",
        "tokens/s": "perf/tokens_per_s", "rank 0": "perf/rank0/bubble_fraction",
        "the rank with most": "perf/peak_memory_gib", "perf/samples_per_s": "perf/samples_per_s",
    }  # fmt: skip
    for name, metric in wanted.items():
        points = [[row["step"], row[metric]] for row in rows if metric in row]
        assert len(points) == STEPS and curves[name] == points, name
    for metric in ("val/loss", "val/accuracy"):
        points = [[row["step"], row[metric]] for row in rows if metric in row]
        assert [step for step, _ in points] == [4, 8]
        figures = [json.loads(f.attributes["data-series"] or "") for f in found.named("figure")]
        assert points in [series["points"] for figure in figures for series in figure]


def test_its_numbers_are_those_of_result_json(run: Path, found: Page):
    result, about = (json.loads((run / f"{name}.json").read_text()) for name in ("result", "about"))
    (share,) = result["time_shares"]
    predicted = about["predicted"]
    shown = [
        f"{result['eval_accuracy']:.1%}", f"majority class {result['majority_accuracy']:.1%}",
        f"{result['bubble_fraction']:.1%}", f"predicted {predicted['bubble_fraction']:.1%}",
        f"{share['busy']:.1%}", show_size(result["peak_memory_bytes"][0]),
        f"predicted {show_size(predicted['memory']['ranks'][0]['peak'])}", "finished",
        f"step {STEPS} of {STEPS}", "checkpoint-8latest", result["export_dir"],
    ]  # fmt: skip
    for words in shown:
        assert words in found.words, words
    assert found.loads() == [] and found.open == []


def test_it_has_the_timeline_the_stages_the_recipe_and_the_environment(run: Path, found: Page):
    about = json.loads((run / "about.json").read_text())
    template = next(tag for tag in found.tags if tag.name == "template")
    assert template.attributes["shadowrootmode"] == "open"
    picture = (run / "profile" / "timeline.svg").read_text()
    boxes = [tag for tag in found.named("rect")]
    assert len(boxes) == picture.count("<rect ") > STEPS
    for row in about["partition"]:
        assert f"{row['stage']}{row['layers']}{row['holds']}" in found.words
    for words in (
        about["fingerprint"],
        about["versions"]["torch"],
        "name_or_path",
        "schedule 'stream'",
    ):
        assert words in found.words


def test_the_predictions_that_were_tracked_are_shown_and_the_partition_once(run: Path, found: Page):
    lines = [json.loads(line) for line in (run / "tables.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["name"] == "predictions"]
    assert [row["step"] for row in rows] == [4] * 3 + [8] * 3
    assert len(lines) > len(rows), "the partition is a table too"
    for row in rows:
        cells = (row["label"], row["prediction"], show(row["probability"]))
        assert f"{row['step']}{row['text']}{''.join(cells)}" in found.words
    titles = [found.words.count(word) for word in ("steptextlabel", "stagelayersholds")]
    assert titles == [1, 1]


@pytest.mark.skipif(browser.executable() is None, reason="no chromium on PATH")
@pytest.mark.parametrize("runs", [1, 2])
def test_a_browser_draws_it_loads_nothing_and_has_no_sideways_scrolling(
    run: Path, tmp_path: Path, runs: int
):
    """In light, dark and 400 pixels wide."""
    target = page.write([run] * runs, tmp_path / "page.html")
    assert browser.look(target, tmp_path / "pictures") == []


@pytest.mark.skipif(browser.executable() is None, reason="no chromium on PATH")
def test_the_browser_finds_what_is_wrong_with_a_page(run: Path, tmp_path: Path):
    source = page.one(RunFiles.open(run))
    wrong = source.replace("</main>", "<img src='beside.png'><p style='width:3000px'>.</p></main>")
    (tmp_path / "page.html").write_text(wrong.replace('class="line', 'class="lin'))
    found = "\n".join(browser.look(tmp_path / "page.html", tmp_path / "pictures"))
    for words in ("beside.png", "pixels wide in a window of 400", "charts are not drawn"):
        assert words in found


def test_a_run_that_was_asked_to_stop_says_by_what_and_where(base: dict[str, Any], tmp_path: Path):
    asked = {"name": "tests.recipes.test_report:Asked"}
    assert train(put(base, {"train.output_dir": str(tmp_path), "trackers": [asked]})) == 0
    status, why = RunFiles.open(tmp_path).status
    assert status == "stopped" and why.startswith("Stopped by SIGTERM on rank 0 after step")


def test_a_run_that_was_killed_and_gone_on_with_has_a_page_at_both_times(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Bomb, "at", 5)
    bomb = {"name": "tests.support.tiny:Bomb"}
    recipe = put(base, {"train.output_dir": str(tmp_path / "run"), "trackers": [bomb]})
    assert train(recipe) == 130
    run = tmp_path / "run"
    killed = Page(page.one(RunFiles.open(run)))
    status, why = RunFiles.open(run).status
    assert status == "failed" and "KeyboardInterrupt" in why
    assert len(killed.curves()["stage 0"]) == 4
    for missing in ("come with the end of the run", "was not profiled"):
        assert missing in killed.words
    monkeypatch.setattr(Bomb, "at", 0)
    assert train(recipe, "train.resume_from_checkpoint=true") == 0
    whole = RunFiles.open(run)
    assert [start["step"] for start in whole.starts] == [0, 4]
    assert whole.status[0] == "finished"
    told = Page(page.one(whole))
    assert told.curves()["stage 0"] == [
        [row["step"], row["stage0/loss"]] for row in rows_of(run) if "stage0/loss" in row
    ]
    assert "gone on with after step 4" in told.words


def test_the_banner_predicts_and_fits_on_a_screen(run: Path):
    about = json.loads((run / "about.json").read_text())
    log = (run / "logs" / "rank0.log").read_text()
    lines = log[: log.index("run      ")].splitlines()
    assert len(lines) < 24
    peak = show_size(about["predicted"]["memory"]["ranks"][0]["peak"])
    for words in (
        "2 stages", "schedule 'stream': one rank", "method   scpl: supcon",
        f"memory   rank 0 {peak} predicted at the peak, on top of", "bubble   0.0% pred",
        "train_batch_size 8 = micro-batch 8 x accumulation 1 x data-parallel 1",
    ):  # fmt: skip
        assert words in "\n".join(lines), words
        assert words in (run / "plan.txt").read_text(), words
    assert "between steps" in (run / "plan.txt").read_text(), "all parts of the prediction"
    assert "stage 0 |" not in (run / "plan.txt").read_text(), "one rank has no pipeline to draw"


def test_what_python_takes_is_said_beside_predicted_and_measured_memory(run: Path, found: Page):
    """Half a GiB used to lie between them without a word."""
    about = json.loads((run / "about.json").read_text())
    before = show_size(about["memory_before_model_bytes"])
    result = json.loads((run / "result.json").read_text())
    rows = [r["perf/peak_memory_gib"] * 2**30 for r in rows_of(run) if "perf/peak_memory_gib" in r]
    whole = about["memory_before_model_bytes"] + result["peak_memory_bytes"][0]
    assert whole == pytest.approx(max(rows), abs=2**24), "a page here and there"
    assert f"Neither has the {before}" in found.words
    assert f"Neither has the {before}" in (run / "logs" / "rank0.log").read_text()
    assert "On top of each peak: about 0.5 GiB" in (run / "plan.txt").read_text()


def test_a_backend_that_does_not_say_what_it_needs_is_named_in_the_banner(
    base: dict[str, Any], tmp_path: Path
):
    changes = {
        "train.output_dir": str(tmp_path / "run"), "train.max_steps": 1,
        "train.eval_strategy": "no", "train.eval_steps": None, "train.export": False,
        "train.save_strategy": "no", "train.save_steps": None, "train.sample_predictions": 0,
        "scpl.sharding": "tests.recipes.test_report:Silent",
    }  # fmt: skip
    assert train(put(base, changes)) == 0
    assert "memory   not predicted: scpl.sharding" in (tmp_path / "run" / "plan.txt").read_text()
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert "does not say how much memory" in about["predicted"]["memory"]["note"]
    words = Page(page.one(RunFiles.open(tmp_path / "run"))).words
    assert "rank 0 measured" in words and "rank 0 predicted" not in words
