"""``scpl-ds bench pipeline``: systems in processes of their own, that run in turn."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from scpl_ds import cli
from scpl_ds.bench import pipeline, systems
from scpl_ds.bench.emulate import EmulatedBody, Lengths
from scpl_ds.bench.pipeline import Options
from scpl_ds.bench.pipeline_rows import add_ratios, render, summarise
from scpl_ds.bench.ranks import System, World
from scpl_ds.bench.systems import Entry, Task
from scpl_ds.errors import ScplError
from scpl_ds.schedules import length, one_f_one_b, simulate
from scpl_ds.timeline import Timeline
from tests.support import tiny

pytestmark = pytest.mark.forks

MEASURED = {
    "system", "kind", "micro_batches", "samples_per_s", "tokens_per_s", "spread", "repeats",
    "steps", "bubble", "peak_memory_bytes", "bytes_sent", "other_cpu_cores", "ratio_to_1f1b",
    "ratio_to_stage_alone", "measured",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, 32 positions."""
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def words(folder: Path, **options: Any) -> list[str]:
    """The command line of a short run on two ranks."""
    given = {
        "model": folder,
        "seq": 16,
        "micro-batches": "1,2",
        "repeats": 2,
        "steps": 3,
        **options,
    }
    return ["bench", "pipeline", *(f"--{key}={value}" for key, value in given.items())]


def test_a_system_that_fails_is_a_row_with_its_reason_and_the_others_are_measured(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    names = "scpl-stream,torch-1f1b,scpl-step,stage-alone"
    assert cli.main(words(model, systems=names, json=file)) == 0
    figures = json.loads(file.read_text())
    assert figures.keys() == {"machine", "settings", "rows", "summary"}
    assert figures["machine"].keys() >= {"cpu", "cores", "memory_bytes", "torch", "pinning", "date"}
    rows = {(row["system"], row["micro_batches"]): row for row in figures["rows"]}
    assert list(rows) == [(name, number) for number in (1, 2) for name in names.split(",")]

    failed = rows.pop(("torch-1f1b", 1))  # torch wants as many micro-batches as stages
    assert failed.keys() == {"system", "micro_batches", "error"}
    assert "1 micro-batches over 2 stages" in failed["error"]
    for row in rows.values():
        assert row.keys() >= MEASURED
        assert row["measured"] and len(row["repeats"]) == 2 and row["steps"] == 3
        assert 0 < row["bubble"] < 1
        assert row["peak_memory_bytes"] > 0

    # Hidden states [4, 16, 16] in fp32, ids and mask [4, 16] and labels [4] in int64.
    message = 4 * 16 * 16 * 4 + 2 * 4 * 16 * 8 + 4 * 8
    assert rows["scpl-stream", 1]["bytes_sent"] == message
    assert rows["scpl-step", 2]["bytes_sent"] == 2 * message
    assert rows["stage-alone", 2]["bytes_sent"] == 0
    assert rows["stage-alone", 1]["ratio_to_stage_alone"] == 1.0
    assert [len(row["shares_by_rank"]) for row in rows.values() if row["kind"] == "ours"] == [2] * 6

    table = capsys.readouterr().out
    assert "| torch-1f1b | 1 | failed |" in table
    assert [row["best_pipeline"] for row in figures["summary"]] == [None, "torch-1f1b"]


ALL = {
    "scpl-stream", "scpl-step", "authors", "stage-alone", "single", "naive", "ddp", "zero", "zero3",
    "deepspeed-1f1b", "deepspeed-1f1b-zero1", "torch-gpipe", "torch-1f1b",
    "torch-interleaved-1f1b", "torch-looped-bfs", "torch-interleaved-zero-bubble", "torch-zbv",
    "torch-dualpipev",
}  # fmt: skip


def test_every_system_runs_beside_the_others(model: Path) -> None:
    """Four micro-batches over four virtual stages: what every schedule can do."""
    options = Options(model=str(model), seq=16, micro_batches=(4,), repeats=1, steps=1)
    figures = pipeline.run(options)
    rows = {row["system"]: row for row in figures["rows"]}
    assert set(rows) == ALL == set(systems.entries())
    assert [row.get("error") for row in rows.values()] == [None] * len(ALL)
    backprop = [name for name, row in rows.items() if row["kind"] == "pipeline"]
    assert all(rows[name]["bytes_sent"] > rows["scpl-stream"]["bytes_sent"] for name in backprop)
    assert figures["summary"][0]["best_whole"] in ("single", "ddp", "zero", "zero3")


def test_two_ranks_of_a_stage_share_the_samples_of_a_micro_batch(model: Path) -> None:
    options = Options(
        ranks=4, data_parallel=2, model=str(model), seq=16, micro_batches=(2,), repeats=1,
        steps=2, systems=("stage-alone", "scpl-stream", "deepspeed-1f1b", "ddp"),
    )  # fmt: skip
    rows = {row["system"]: row for row in pipeline.run(options)["rows"]}
    assert [row.get("error") for row in rows.values()] == [None] * 4
    assert len(rows["scpl-stream"]["shares_by_rank"]) == 4
    # Of both copies: hidden states [2, 16, 16] in fp32, ids and mask [2, 16], labels [2].
    message = 2 * 16 * 16 * 4 + 2 * 2 * 16 * 8 + 2 * 8
    assert rows["scpl-stream"]["bytes_sent"] == 2 * 2 * message


def test_the_file_is_written_anew_after_every_number_of_micro_batches(model: Path) -> None:
    seen: list[list[int]] = []
    options = Options(
        model=str(model), seq=16, micro_batches=(2, 1), repeats=1, steps=1, systems=("authors",)
    )
    figures = pipeline.run(
        options, on_figures=lambda f: seen.append([row["micro_batches"] for row in f["rows"]])
    )
    assert seen == [[2], [2, 1]]
    # One message of all rows of the step, whatever the number of micro-batches.
    sent = [row["bytes_sent"] for row in figures["rows"]]
    assert sent[0] == 2 * sent[1]


def test_an_emulated_pipeline_of_four_ranks_beats_the_drawing_of_1f1b(model: Path) -> None:
    options = Options(
        ranks=4, model=str(model), seq=16, micro_batches=(1,), repeats=2, steps=20,
        systems=("scpl-stream", "scpl-step", "torch-1f1b"), emulate=(5.0, 10.0),
    )  # fmt: skip
    stream, step, rival = pipeline.run(options)["rows"]
    drawn = simulate(one_f_one_b, 4, 1, forward=5e-3, backward=10e-3, gradients_travel_back=True)
    assert rival["measured"] is False
    assert rival["samples_per_s"] == pytest.approx(4 / length(drawn))
    assert stream["measured"] and stream["samples_per_s"] > rival["samples_per_s"]
    # A stage that sleeps 15 ms for each of 4 samples cannot do more; a step ends on all stages.
    assert stream["samples_per_s"] <= 4 / 15e-3
    assert step["samples_per_s"] <= 4 / (3 * 5e-3 + 15e-3)


def test_torch_runs_emulated_stages(model: Path) -> None:
    options = Options(
        model=str(model), seq=16, micro_batches=(2,), repeats=1, steps=2,
        systems=("torch-gpipe", "torch-1f1b"), emulate=(2.0, 4.0),
    )  # fmt: skip
    for row in pipeline.run(options)["rows"]:
        assert row["measured"] is True
        # Two forwards and two backwards of the last stage, one of the first before and after.
        assert row["samples_per_s"] <= 8 / (3 * 2e-3 + 3 * 4e-3)


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"systems": "scpl-strem"}, "unknown system 'scpl-strem'; did you mean 'scpl-stream'?"),
        ({"ranks": 5, "systems": "scpl-stream"}, "--ranks 5: every stage needs a layer and"),
        ({"ranks": 5, "systems": "scpl-stream"}, "has 4. Use at most 4 stages"),
        ({"ranks": 3, "data-parallel": 2}, "--data-parallel 2: --ranks 3 is no multiple of it"),
        ({"seq": 64}, "--seq 64: --model"),
        ({"emulate": "1,2", "systems": "ddp"}, "--systems ddp: its stages cannot sleep"),
        ({"model": "/no/such/folder"}, "'/no/such/folder' gives no model config"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(
    model: Path, options: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(model, **options)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [("emulate", "5"), ("emulate", "5,0"), ("micro-batches", "1,0"), ("ranks", "two")],
)
def test_an_option_that_is_no_number_is_refused_by_name(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "pipeline", f"--{option}", value])
    assert end.value.code == 2
    assert f"--{option}" in capsys.readouterr().err


def test_a_run_is_as_long_as_its_system_needs() -> None:
    known = systems.entries()
    assert Options().steps_of(known["scpl-stream"], 8) == 6
    assert Options(steps=7).steps_of(known["ddp"], 8) == 7
    emulated = Options(emulate=(1.0, 2.0))
    assert emulated.steps_of(known["scpl-stream"], 8) == 100
    assert emulated.steps_of(known["torch-1f1b"], 8) == 5
    assert Options().steps_of(known["ddp"], 8) == 4


# -- processes -------------------------------------------------------------------------------


class Idle:
    """A system without work."""

    timeline = Timeline()
    bytes_sent = 0

    def run(self, steps: int) -> None:
        pass


class Busy(Idle):
    """Takes a hundredth of a second of processor time a step."""

    def run(self, steps: int) -> None:
        end = time.process_time() + 0.01 * steps
        while time.process_time() < end:
            pass


def processor_time(pid: int) -> int:
    """Ticks that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_while_one_system_runs_the_processes_of_another_take_no_processor_time() -> None:
    with (
        World("idle", lambda mesh, device: Idle(), ranks=2) as idle,
        World("busy", lambda mesh, device: Busy(), ranks=1) as busy,
    ):
        before = [processor_time(pid) for pid in idle.pids]
        (report,) = busy.run(30)
        after = [processor_time(pid) for pid in idle.pids]
    assert report.cpu_s >= 0.3
    assert all(b - a <= 1 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("ranks", "said"), [(1, "rank 0 said nothing for 4 s"), (2, "rank 1: BoundaryError.* is stuck")]
)
def test_a_rank_that_hangs_is_ended_and_so_are_its_peers(ranks: int, said: str) -> None:
    def build(mesh: Any, device: torch.device) -> System:
        if mesh.rank == 0:
            signal.pause()
        return Idle()

    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    with pytest.raises(ScplError, match=said):
        World("sleepy", build, ranks=ranks, limit_s=4)
    assert children.read_text() == before


def test_a_rank_that_dies_is_named() -> None:
    def build(mesh: Any, device: torch.device) -> System:
        os.write(2, b"out of luck")
        os._exit(3)

    with pytest.raises(ScplError, match=r"its process ended without a word: \.\.\.out of luck"):
        World("mortal", build, ranks=1)


def test_the_first_rank_that_fails_speaks_and_all_are_ended() -> None:
    class Fails(Idle):
        def run(self, steps: int) -> None:
            if steps == 5:
                raise ValueError("five")

    with World("fails", lambda mesh, device: Fails(), ranks=2) as world:
        pids = world.pids
        with pytest.raises(ScplError, match="ValueError: five"):
            world.run(5)
        assert world.pids == []
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_system_that_fails_while_it_runs_is_a_row_and_the_others_go_on(model: Path) -> None:
    class Fails(Idle):
        def run(self, steps: int) -> None:
            if steps == 3:
                raise RuntimeError("no third step")

    def build(task: Task, mesh: Any, device: torch.device) -> System:
        return Fails()

    entries = {**systems.OURS, "mine": Entry(build, "pipeline")}
    options = Options(
        model=str(model), seq=16, micro_batches=(1,), repeats=2, steps=3,
        systems=("mine", "scpl-stream"),
    )  # fmt: skip
    mine, stream = pipeline.run(options, entries=entries)["rows"]
    assert "no third step" in mine["error"]
    assert len(stream["repeats"]) == 2


# -- figures ---------------------------------------------------------------------------------


def row(system: str, *repeats: float, kind: str = "pipeline") -> dict[str, Any]:
    return {
        "system": system, "kind": kind, "micro_batches": 2, "samples_per_s": sorted(repeats)[1],
        "tokens_per_s": 1.0, "repeats": list(repeats), "measured": True,
    }  # fmt: skip


def test_ratios_are_of_runs_of_the_same_repeat() -> None:
    """Another load in each repeat: the medians alone would say 40 / 20."""
    rows = [row("scpl-stream", 60, 20, 40, kind="ours"), row("deepspeed-1f1b", 20, 10, 40)]
    add_ratios(rows)
    assert rows[0]["ratio_to_1f1b"] == 2.0
    rows[1]["repeats"] = [10, 20, 40]
    add_ratios(rows)
    assert rows[0]["ratio_to_1f1b"] == 1.0
    assert rows[0]["ratio_to_stage_alone"] is None


def test_the_summary_compares_with_the_better_setting_and_the_best_pipeline() -> None:
    rows = [
        row("scpl-stream", 40, 40, 40, kind="ours"),
        row("stage-alone", 50, 50, 50, kind="ours"),
        row("deepspeed-1f1b", 10, 10, 10),
        row("deepspeed-1f1b-zero1", 20, 20, 20),
        row("torch-zbv", 32, 32, 32),
        row("ddp", 99, 99, 99, kind="whole"),
        {"system": "authors", "micro_batches": 2, "error": "gone"},
    ]
    assert summarise(rows) == {
        "micro_batches": 2,
        "scpl_stream": 40,
        "to_stage_alone": 0.8,
        "to_deepspeed_1f1b": 2.0,
        "deepspeed_1f1b": "deepspeed-1f1b-zero1",
        "to_best_pipeline": 1.25,
        "best_pipeline": "torch-zbv",
        "to_best_whole": 40 / 99,
        "best_whole": "ddp",
        "to_authors": None,
    }
    add_ratios(rows)
    assert "- authors, M=2: gone" in render(rows)


def test_an_emulated_stage_takes_its_time_in_forward_and_in_backward() -> None:
    body = EmulatedBody(0, 1, 1, 8, Lengths(0.02, 0.03), local_loss=True)
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.tensor([1, 1])}
    began = time.monotonic()
    loss = body(inputs, None).loss
    between = time.monotonic()
    assert loss is not None and between - began >= 2 * 0.02
    loss.backward()
    assert time.monotonic() - between >= 2 * 0.03
    assert body.shift.grad is not None and body.shift.grad.abs().sum() > 0
