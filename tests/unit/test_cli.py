"""The commands themselves: what they cost to start, what they print, how they are reached."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import scpl_ds
from scpl_ds.cli import main
from scpl_ds.schedules import Backward, Forward
from tests.support import tiny
from tests.support.tiny import put, write_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with tiny.own_world():
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return put(tiny.make(tmp_path_factory.mktemp("tiny")), {"train.max_steps": 1})


def test_help_and_version_import_nothing_but_the_standard_library():
    """They answer at once; torch alone would take seconds."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import scpl_ds.cli\n"
        "try: scpl_ds.cli.main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "more = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "more -= {'scpl_ds', *sys.stdlib_module_names}\n"
        "assert not more, more"
    )
    for argv in (["--help"], ["--version"], ["train", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "scpl-ds" in done.stdout


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"scpl-ds {scpl_ds.__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for command in ("train", "eval", "plan", "export", "schema"):
        assert f"\n    {command} " in said


def test_python_m_scpl_ds_is_scpl_ds():
    done = subprocess.run(
        [sys.executable, "-m", "scpl_ds", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"scpl-ds {scpl_ds.__version__}\n"


def test_schema_prints_the_committed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["schema"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((ROOT / "recipes/recipe.schema.json").read_text())
    assert main(["schema", "--out", str(tmp_path / "schema.json")]) == 0
    assert (tmp_path / "schema.json").read_text() == printed


def test_a_recipe_alone_means_train(
    recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_recipe(tmp_path / "mine.json", recipe)
    assert main([str(path), f"train.output_dir={tmp_path / 'run'}", "train.eval_strategy=no"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 1 and result == json.loads((tmp_path / "run/result.json").read_text())


def test_train_prints_nothing_but_the_result_on_stdout(recipe: dict, tmp_path: Path):
    """DeepSpeed, imported by transformers, used to print its look-out for an accelerator there."""
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    argv = [sys.executable, "-m", "scpl_ds", "train", str(path)]
    argv.append(f"train.output_dir={tmp_path / 'run'}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stages"] == 2
    assert "Traceback" not in done.stderr


def test_without_an_output_dir_a_run_is_named_after_its_recipe(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path / "mine.yaml", put(recipe, {"train.output_dir": tiny.DROP}))
    assert main(["train", str(path)]) == 0
    assert (tmp_path / "runs" / "mine" / "result.json").is_file()


def test_plan_prints_the_table_and_the_schedule_and_makes_nothing(
    recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", str(path), "scpl.stages=4", "--ranks", "2"]) == 0
    said = capsys.readouterr().out
    table = said.split("schedule 'stream'")[0].splitlines()
    assert table[0].startswith("bert: 4 layers in 4 stages, cut by flops")
    assert [line.split()[0] for line in table[2:6]] == ["0", "1", "2", "3"]
    assert [line.split()[-1] for line in table[2:6]] == ["0", "0", "1", "1"]
    assert "stage 3 |         F0 B0 == F1" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_of_one_rank_draws_no_schedule_and_names_the_method(
    recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """One rank works on one stage after the other: the drawing of one rank a stage is not its."""
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    assert main(["plan", str(path), "--ranks", "1", "scpl.polish=0.5"]) == 0
    said = capsys.readouterr().out
    assert "stage 0 |" not in said and "schedule '" not in said
    assert "method scpl: supcon, polish 0.5" in said
    assert "On top of each peak: about 0.5 GiB a rank of Python and libraries comes." in said


def test_plan_takes_as_many_ranks_as_the_recipe_asks_for(
    recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """It made up one rank a stage: "need 2 ranks, but WORLD_SIZE is 3"."""
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    assert main(["plan", str(path), "scpl.stages=3", "scpl.pipeline_ranks=2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in table[2:5]] == ["0", "0", "1"]


def last_first(local_stages: list[int], num_stages: int, num_micro_batches: int):
    """All forwards before all backwards."""
    for action in (Forward, Backward):
        for n in range(num_micro_batches):
            yield from (action(k, n) for k in local_stages)


def test_plan_draws_the_schedule_that_is_named(
    recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    assert main(["plan", str(path), f"scpl.schedule={__name__}:last_first"]) == 0
    said = capsys.readouterr().out
    assert f"schedule '{__name__}:last_first'" in said
    assert "stage 0 |F0 F1 F2 F3 B0 == B1" in said


def test_plan_reads_no_weights(recipe: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model"
    tiny.save_model(model)
    (model / "model.safetensors").unlink()
    changed = put(recipe, {"model.name_or_path": str(model), "model.task": "causal-lm"})
    assert main(["plan", str(write_recipe(tmp_path / "mine.yaml", changed))]) == 0
    assert "4 layers in 2 stages" in capsys.readouterr().out


@pytest.mark.demo
@pytest.mark.parametrize("name", ["quickstart"])
def test_plan_of_a_recipe_that_needs_no_hub(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(ROOT / "recipes" / f"{name}.yaml")]) == 0
    assert "bert: 6 layers in 2 stages" in capsys.readouterr().out


def test_bench_predict_reads_the_times_that_it_printed(tmp_path, capsys):
    inputs = {
        "layers": 4, "forward": [0.001, 0.002], "backward": [0.001, 0.004], "head": [0.001, 0.0],
        "step": 0.001, "parameter_bytes": 1e6, "boundary_bytes": 1e4, "bandwidth": 1e9,
        "latency": 1e-5, "global_batch": 16, "micro_batch": 4,
    }  # fmt: skip
    given, out = tmp_path / "inputs.json", tmp_path / "rows.json"
    given.write_text(json.dumps(inputs))
    assert main(["bench", "predict", f"--inputs={given}", f"--json={out}"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text.partition("\n")[0]) == inputs
    rows = json.loads(out.read_text())["rows"]
    assert [row["gpus"] for row in rows] == [2**n for n in range(1, 11)]
    assert rows[0]["methods"]["scpl stream"]["measured"] is False
    given.write_text("{}")
    assert main(["bench", "predict", f"--inputs={given}"]) == 2
    assert "layers" in capsys.readouterr().err


def test_bench_head_prints_a_line_for_each_micro_batch_size(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = ["--micro-batches=2,3", "--hidden-size=64", "--layers=2", "--seq=8", f"--json={out}"]
    assert main(["bench", "head", *words]) == 0
    assert "| 64 | 1 | 3 x 8 |" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["rows"]) == 2
