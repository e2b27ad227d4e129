"""``scpl-ds report`` over run folders made by hand: hostile, broken, unfinished."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from scpl_ds import lock
from scpl_ds.cli import main
from scpl_ds.lock import RunLock
from scpl_ds.recipe_words import method_in_words
from scpl_ds.report import page
from scpl_ds.report.charts import (
    _BOTTOM,
    _HEIGHT,
    _LEFT,
    _RIGHT,
    _TOP,
    _WIDTH,
    MOST_POINTS,
    Chart,
    Series,
    draw,
    show,
    thinned,
)
from scpl_ds.report.markup import el, text
from scpl_ds.report.picture import timeline
from scpl_ds.report.reading import RunFiles
from tests.support.html_page import Page

EVIL = "\"'><img src=x onerror=alert(1)></template></script><script>alert(2)</script>&amp;"
TOKEN = "hf_" + "a" * 30


def run_folder(folder: Path, **files: Any) -> Path:
    """A run of two stages with three logged steps; ``files`` replace or add (None: leave out)."""
    folder.mkdir(parents=True, exist_ok=True)
    row = {"lr": 1e-4, "stage0/loss": 2.5, "stage1/loss": 0.5, "head/loss": 0.5}
    rows = [{"step": n, "time": 1e9 + n, **row, "stage0/loss": 2.5 - n / 10} for n in (1, 2, 3)]
    given: dict[str, Any] = {
        "recipe.yaml": {"model": {"name_or_path": "tiny"}, "scpl": {"stages": 2}},
        "metrics.jsonl": rows,
        **files,
    }
    for name, content in given.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".yaml") and content is not None:
            content = yaml.safe_dump(content)
        elif name.endswith(".jsonl") and not isinstance(content, str | None):
            content = "".join(json.dumps(each) + "\n" for each in content)
        elif not isinstance(content, str | None):
            content = json.dumps(content)
        if content is not None:
            path.write_text(content, encoding="utf-8")
    return folder


def page_of(folder: Path) -> Page:
    return Page(page.one(RunFiles.open(folder)))


def logged(*lines: str) -> str:
    return "".join(f"2026-11-23 20:00:0{n},000 {line}\n" for n, line in enumerate(lines))


# -- what strangers wrote ------------------------------------------------------------------


def test_nothing_of_a_hostile_run_folder_becomes_markup(tmp_path: Path):
    deep: dict[str, Any] = {"name": EVIL, "started": EVIL, "cut_by": EVIL, "model_type": EVIL}
    deep |= {"partition": [{"stage": EVIL, "layers": EVIL, "parameters": EVIL, "ranks": [EVIL]}]}
    deep |= {"machine": {"cpu": EVIL}, "versions": {EVIL: EVIL}, "batch": {"global": EVIL}}
    deep |= {"starts": [{"step": 1, "at": EVIL}], "predicted": {"memory": {"note": EVIL}}}
    shares = [{"rank": EVIL, "stages": [EVIL], "busy": EVIL}]
    folder = run_folder(
        tmp_path / "'><img src=x onerror=alert(1)>",
        **{
            "recipe.yaml": {"model": {"name_or_path": EVIL}, EVIL: EVIL},
            "about.json": deep,
            "result.json": {"export_dir": EVIL, "time_shares": shares, "eval_accuracy": EVIL},
            "metrics.jsonl": [{"step": 1, f"stage0/{EVIL}": 1.0, EVIL: 2.0, "perf/rank0/x": 1}],
            "tables.jsonl": [{"step": 1, "name": "samples", "prompt": EVIL, EVIL: EVIL}],
            "plan.txt": EVIL,
            "logs/rank0.log": logged(f"WARNING scpl_ds.x: {EVIL}"),
        },
    )
    found = page_of(folder)
    assert found.loads() == []
    assert found.scripts == [page._packaged("page.js")]
    assert found.open == [], "every tag is closed"
    for place in (folder.name, f"stage0/{EVIL}".partition("/")[2], "prompt"):
        assert place.lower() in found.words.lower()
    assert found.words.count(EVIL) >= 8


def test_a_picture_keeps_its_boxes_and_loses_what_could_act(tmp_path: Path):
    path = tmp_path / "timeline.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" onload="a()">'
        "<style>@import url(http://x); .F { fill: url(#a); }</style><script>a()</script>"
        '<a href="http://x"><rect x="1"/></a><image href="http://x/y.png"/>'
        '<foreignObject><p>hi</p></foreignObject><rect class="F" x="3" onclick="a()">'
        "<title>F 1.0 &lt;b&gt;</title></rect></svg>"
    )
    found = Page(timeline(path) or "")
    assert [tag.name for tag in found.tags] == ["div", "template", "svg", "style", "rect", "title"]
    assert found.named("rect")[0].attributes == {"class": "F", "x": "3"}
    assert found.words == "F 1.0 <b>" and found.loads() == []


@pytest.mark.parametrize(
    "source",
    [
        "<svg",
        "<html/>",
        '<!DOCTYPE svg [<!ENTITY a "b">]><svg xmlns="http://www.w3.org/2000/svg"/>',
    ],
)
def test_what_is_no_picture_of_ours_is_left_out(tmp_path: Path, source: str):
    (tmp_path / "timeline.svg").write_text(source)
    assert timeline(tmp_path / "timeline.svg") is None
    assert timeline(tmp_path / "nothing.svg") is None


def test_secrets_are_replaced_wherever_they_stand(tmp_path: Path):
    folder = run_folder(
        tmp_path / "run",
        **{
            "recipe.yaml": {"trackers": [{"name": "x", "api_key": "abc123"}], "note": TOKEN},
            "logs/rank0.log": logged(f"WARNING scpl_ds.x: login as {TOKEN}"),
            "tables.jsonl": [{"step": 1, "name": "s", "text": TOKEN}],
            "plan.txt": "https://me:pass@host/",
            "about.json": {"versions": {"x": TOKEN}, "machine": {"cpu": TOKEN}},
        },
    )
    source = page.one(RunFiles.open(folder))
    assert TOKEN not in source and "abc123" not in source and "me:pass" not in source
    assert source.count("&lt;redacted&gt;") >= 6


def test_text_that_no_file_can_hold_is_shown_as_lost(tmp_path: Path):
    lost = '{"step": 1, "name": "s", "text": "a\\ud800b\\u0000c\\u2028d"}\n'
    folder = run_folder(tmp_path / "run", **{"tables.jsonl": lost})
    target = page.write([folder], None)
    assert "a�b�c\u2028d" in Page(target.read_text(encoding="utf-8")).words


def test_markup_escapes_everything_but_markup():
    assert text("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"
    assert el("p", el("b", "<"), "<", class_="a", data_x='"', hidden=True, title=None) == (
        '<p class="a" data-x="&quot;" hidden><b>&lt;</b>&lt;</p>'
    )


# -- what the page holds -------------------------------------------------------------------


def test_the_policy_lets_the_page_load_nothing_and_run_its_own_script_only(tmp_path: Path):
    found = page_of(run_folder(tmp_path / "run"))
    assert found.loads() == []
    policy = next(
        tag.attributes["content"] or ""
        for tag in found.named("meta")
        if tag.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "url(" not in page._packaged("page.css")


def test_a_value_that_was_no_number_breaks_the_line_and_is_named(tmp_path: Path):
    rows = [{"step": n, "stage0/loss": None if n == 3 else n, "head/loss": 1} for n in range(1, 6)]
    found = page_of(run_folder(tmp_path / "run", **{"metrics.jsonl": rows}))
    assert found.curves()["stage 0"] == [[1, 1], [2, 2], [3, None], [4, 4], [5, 5]]
    line = next(t for t in found.named("path") if t.attributes["class"] == "line c0")
    assert (line.attributes["d"] or "").count("M") == 2
    assert "stage 0 is NaN or infinite at step 3" in found.words


def test_broken_files_leave_the_rest_of_the_page(tmp_path: Path):
    folder = run_folder(
        tmp_path / "run",
        **{
            "recipe.yaml": None, "about.json": "[1", "result.json": '["x"]', "latest": "",
            "metrics.jsonl": '{"step": 1, "head/loss": 0.25}\n{"step": "x"}\n[1]\n{"step": 2, "he',
            "profile/timeline.svg": "no picture", "tables.jsonl": "\x00\n",
        },
    )  # fmt: skip
    (folder / "recipe.yaml").write_text("a: [1\n", encoding="utf-8")
    found = page_of(folder)
    assert found.curves()["training"] == [[1, 0.25]]
    for missing in ("recipe.yaml cannot be read", "no about.json", "train.profile=true"):
        assert missing in found.words


@pytest.mark.parametrize(
    "value", [10**400, 10**299, 9.9e299, 1.7e308, -1.7e308, 5e-324, -1e-322, 1e-299]
)
@pytest.mark.parametrize("place", ["metrics", "step", "memory", "about"])
def test_numbers_of_any_size_leave_a_page(tmp_path: Path, place: str, value: float):
    step = value if place == "step" else 2
    names = ("stage0/loss", "stage0/grad_norm", "lr", "val/perplexity", "perf/tokens_per_s")
    rows = [
        {"step": n, **dict.fromkeys(names, number)}
        for n, number in ((1, 1.0), (step, value if place == "metrics" else 2.0), (3, 1.0))
    ]
    shares = [{"rank": 0, "busy": value}] if place == "about" else []
    peaks = [value, 0] if place == "memory" else [0]
    about = dict.fromkeys(("total_steps", "data_parallel", "majority_accuracy"), value)
    files = {
        "metrics.jsonl": rows,
        "result.json": {"peak_memory_bytes": peaks, "time_shares": shares},
        "about.json": {"predicted": {"memory": {"ranks": [{"peak": peaks[0]}]}},
                       **(about if place == "about" else {})},
    }  # fmt: skip
    found = page_of(run_folder(tmp_path / "run", **files))
    assert [1, 1.0] in found.curves()["stage 0"] and [3, 1.0] in found.curves()["stage 0"]
    assert "nan" not in "".join(tag.attributes.get("d") or "" for tag in found.named("path"))


def test_ranks_beyond_what_a_page_can_hold_are_counted(tmp_path: Path):
    about = {"data_parallel": 10**9, "predicted": {"memory": {"ranks": [{"peak": 2**30}]}}}
    words = page_of(run_folder(tmp_path / "run", **{"about.json": about})).words
    assert "rank 255 predicted" in words and "rank 256 predicted" not in words
    assert "999999744 more ranks" in words


def test_names_that_look_like_numbers_but_are_none_are_passed_over(tmp_path: Path):
    rows = [{"step": 1, f"stage{'9' * 5000}/loss": 1.0, f"perf/rank{'9' * 5000}/busy": 1.0}]
    folder = run_folder(
        tmp_path / "run",
        **{
            "metrics.jsonl": [*rows, {"step": 2, "head/loss": 0.5}],
            "logs/rank².log": logged("WARNING scpl_ds.x: careful"),
            "checkpoint-²/manifest.json": {},
        },
    )
    assert page_of(folder).curves()["training"] == [[2, 0.5]]


def test_a_run_before_its_first_step_has_a_page(tmp_path: Path):
    found = page_of(run_folder(tmp_path / "run", **{"metrics.jsonl": None}))
    for missing in ("no metrics.jsonl", "not evaluated", "no throughput", "not known"):
        assert missing in found.words.lower()


def test_a_long_run_is_drawn_by_its_extremes():
    points = [(n, float(n % 7)) for n in range(30_000)]
    points[12_345] = (12_345, 99.0)
    points[20_000] = (20_000, -99.0)
    points[25_000] = (25_000, None)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert {points[12_345], points[20_000], points[25_000]} <= set(kept)
    assert kept == sorted(kept, key=lambda point: point[0])
    figure = draw(Chart("x", [Series("x", points)]))
    assert figure is not None and "30000 points, drawn by the extremes of each 46" in figure


@pytest.mark.parametrize(
    "value, shown",
    [(0, "0"), (0.5, "0.5"), (1e-4, "0.0001"), (5e-5, "5e-5"), (12345, "12.35k"), (2.5e9, "2.5G")],
)
def test_a_number_is_short(value: float, shown: str):
    assert show(value) == shown


@pytest.mark.parametrize(
    "values",
    [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 1e9], [-5.0, -1.0], [0.5, None, 0.25], [None, None]],
)
@pytest.mark.parametrize("more", [{"may_be_log": True}, {"from_zero": True}])
def test_curves_of_any_kind_are_drawn_whole_and_inside_of_the_frame(
    values: list[float | None], more: dict[str, bool]
):
    """One point, equal values, great and negative ones, and nothing but NaN."""
    found = Page(draw(Chart("x", [Series("x", list(enumerate(values)))], **more)) or "")
    (line,) = [path for path in found.named("path") if "line" in (path.attributes["class"] or "")]
    drawn = re.findall(r"([ML])([\d.-]+) ([\d.-]+)", line.attributes["d"] or "")
    finite = [value for value in values if value is not None]
    assert len(drawn) == len(finite)
    heights = [float(y) for _, _, y in drawn]
    circles = [t.attributes for t in found.named("circle")]
    dots = [(float(c["cx"] or ""), float(c["cy"] or "")) for c in circles]
    grid = [t.attributes for t in found.named("line") if t.attributes["class"] == "grid"]
    assert grid and all(_TOP <= float(g["y1"] or "") <= _HEIGHT - _BOTTOM for g in grid)
    for x, y in [*((float(x), float(y)) for _, x, y in drawn), *dots]:
        assert _LEFT <= x <= _WIDTH - _RIGHT and _TOP <= y <= _HEIGHT - _BOTTOM
    # Greater is higher, and what has no neighbour is a dot.
    pairs = zip(pairwise(finite), pairwise(heights), strict=True)
    assert all((a < b) == (y > z) for (a, b), (y, z) in pairs)
    assert len(dots) == (len(finite) if len(values) != 2 else 0)


def test_several_runs_have_a_curve_each_and_all_their_parts(tmp_path: Path):
    folders = [run_folder(tmp_path / name) for name in ("first", "second")]
    found = Page(page.several([RunFiles.open(folder) for folder in folders]))
    curves = found.curves()
    assert curves["first"] == curves["second"] == [[1, 0.5], [2, 0.5], [3, 0.5]]
    assert found.words.count("How it learned") == 2 and found.loads() == []
    ids = [tag.attributes["id"] for tag in found.tags if "id" in tag.attributes]
    assert len(ids) == len(set(ids))


def recipe_of(train: dict[str, Any] | None = None, **scpl: Any) -> dict[str, Any]:
    stages = {"stages": 2, "objective": {"name": "supcon"}, "head": {"detach_features": False}}
    return {"scpl": stages | scpl, "train": {"seed": 0, "output_dir": "x"} | (train or {})}


def several_of(folder: Path, **recipes: dict[str, Any]) -> Page:
    runs = []
    for name, recipe in recipes.items():
        recipe["train"]["output_dir"] = name
        runs.append(RunFiles.open(run_folder(folder / name, **{"recipe.yaml": recipe})))
    return Page(page.several(runs))


def test_runs_of_one_method_are_told_apart_by_the_settings_that_differ(tmp_path: Path):
    found = several_of(
        tmp_path,
        plain=recipe_of(),
        looks=recipe_of(lookahead=2),
        polished=recipe_of(polish=0.1),
        seeded=recipe_of({"seed": 3}),
        other=recipe_of(),
    )
    curves = ["plain", "looks (lookahead 2)", "polished (polish 0.1)", "seeded (seed 3)", "other"]
    assert [name for name in found.curves() if name in curves] == curves
    for row in (
        "scpl.lookaheadnot set2not setnot setnot set", "scpl.polishnot setnot set0.1not setnot set",
        "train.seed00030", "scpl: supcon, lookahead 2",
    ):  # fmt: skip
        assert row in found.words
    assert "train.output_dirplain" not in found.words


def test_two_runs_both_say_what_differs_and_equal_ones_that_nothing_does(tmp_path: Path):
    found = several_of(tmp_path / "a", a=recipe_of({"seed": 1}), b=recipe_of({"seed": 2}))
    assert {"a (seed 1)", "b (seed 2)"} <= set(found.curves())
    found = several_of(tmp_path / "b", a=recipe_of(), b=recipe_of())
    assert "the recipes are the same" in found.words and {"a", "b"} <= set(found.curves())


@pytest.mark.parametrize(
    "scpl, words",
    [
        ({"method": "bp"}, "backpropagation"),
        ({"method": "bp", "stages": 1}, "backpropagation (one stage)"),
        ({"stages": 1}, "backpropagation (one stage)"),
        ({"stages": 1, "head": {}}, "backpropagation (one stage)"),
        ({"stages": 1, "head": {"detach_features": True}}, "scpl: supcon"),
        ({"stages": 1, "head": {}, "objective": {"name": "associated"}}, "scpl: associated"),
        ({"stages": 3, "freeze_stages": 1}, "scpl: supcon, first stage frozen"),
        ({"freeze_stages": 1}, "backpropagation of the last stage, the others frozen"),
        ({"objective": {"name": "sum", "parts": [{"name": "a"}, {"name": "b"}]}}, "scpl: a + b"),
        ({"objective": ["a", "b"], "method": "joint"}, "joint: a + b"),
    ],
)
def test_the_method_is_named_by_what_trains(scpl: dict[str, Any], words: str):
    assert method_in_words(recipe_of(**scpl)["scpl"]) == words


def test_charts_have_titles_in_words_and_the_metric_below(tmp_path: Path):
    names = ("val/accuracy_after_layer_2", "val/accuracy_after_layer_4", "perf/samples_per_s",
             "stage0/valid_anchor_fraction", "stage0/my_own", "head/loss")  # fmt: skip
    rows = [{"step": n, **dict.fromkeys(names, 0.5)} for n in (1, 2)]
    found = page_of(run_folder(tmp_path / "run", **{"metrics.jsonl": rows}))
    for words in (
        "Validation accuracy of the local headsval/accuracy_after_layer_{n}",
        "Samples per secondperf/samples_per_s",
        "Rows with a positive, sharestage{k}/valid_anchor_fraction",
        "My ownstage{k}/my_own", "Task losshead/loss, val/loss",
    ):  # fmt: skip
        assert words in found.words
    assert {"layer 2", "layer 4"} <= set(found.curves())


# -- what became of the run ----------------------------------------------------------------


def status(folder: Path) -> tuple[str, str]:
    return RunFiles.open(folder).status


def test_the_status_is_what_files_lock_and_logs_say(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    assert status(folder)[0] == "unfinished"
    failure = "DEBUG scpl_ds.cli: traceback of the error\nTraceback:\nDivergenceError: loss is nan"
    run_folder(folder, **{"logs/rank1.log": logged(failure)})
    assert status(folder) == ("failed", "DivergenceError: loss is nan")
    stopped = "WARNING scpl_ds.trainer: Stopped by SIGTERM on rank 1 after step 3 of 9, saved as x."
    run_folder(folder, **{"logs/rank0.log": logged("INFO scpl_ds.x: y", stopped)})
    assert status(folder)[0] == "stopped" and "step 3 of 9" in status(folder)[1]
    held = RunLock(folder)
    held.take()
    assert status(folder)[0] == "running"
    held.release()
    run_folder(folder, **{"result.json": {"steps": 9}})
    assert status(folder)[0] == "finished"


def test_a_failure_of_before_the_last_start_is_over(tmp_path: Path):
    about = {"starts": [{"step": 0, "at": "2026-11-23T19:00:00+0000"}]}
    logs = {"logs/rank0.log": logged("ERROR scpl_ds.x: broken")}
    folder = run_folder(tmp_path / "run", **logs, **{"about.json": about})
    assert status(folder) == ("failed", "broken")
    about["starts"].append({"step": 2, "at": "2026-11-23T21:00:00+0000"})
    run_folder(folder, **{"about.json": about})
    assert status(folder)[0] == "unfinished"
    found = page_of(folder)
    assert "gone on with after step 2" in found.words and "broken" in found.words


def test_a_lock_of_a_process_that_has_ended_is_not_in_use(tmp_path: Path):
    held = RunLock(tmp_path)
    held.take()
    assert lock.in_use(tmp_path)
    owner = json.loads((tmp_path / lock.NAME).read_text())
    held.release()
    assert not lock.in_use(tmp_path)
    (tmp_path / lock.NAME).write_text(json.dumps({**owner, "began": "0"}))
    assert not lock.in_use(tmp_path)
    (tmp_path / lock.NAME).write_text(json.dumps({**owner, "host": "elsewhere"}))
    assert lock.in_use(tmp_path), "touched a moment ago, by another machine"


def test_warnings_of_several_ranks_are_one_line(tmp_path: Path):
    said = {f"logs/rank{n}.log": logged("WARNING scpl_ds.x: careful\nmore") for n in (0, 1, 10)}
    run = RunFiles.open(run_folder(tmp_path / "run", **said))
    assert [(each.words, ranks) for each, ranks in run.warnings] == [("careful\nmore", [0, 1, 10])]


# -- the command ---------------------------------------------------------------------------


def test_the_command_writes_into_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = run_folder(tmp_path / "run")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert main(["report", str(folder), "--out", str(tmp_path / "mine.html")]) == 0
    assert (tmp_path / "mine.html").read_text().startswith("<!doctype html>")


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    folder = run_folder(tmp_path / "run")
    assert main(["report", str(folder), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_page_is_put_in_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path):
    """It used to be written in place: who had it open saw half of it."""
    folder = run_folder(tmp_path / "run")
    target = page.write([folder], None)
    before = target.read_text(encoding="utf-8")
    old = target.open(encoding="utf-8")
    page.write([folder], None)
    with old:
        assert old.read() == before, "another file was put in its place"
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.jsonl", "recipe.yaml", "report.html",
    ]  # fmt: skip


def test_a_report_is_made_without_torch(tmp_path: Path):
    code = (
        "import sys\nfrom scpl_ds.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    runs = [str(run_folder(tmp_path / name)) for name in ("run", "other")]
    command = [sys.executable, "-c", code, "report", *runs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
