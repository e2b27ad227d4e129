"""Two hosts on one machine: network namespaces with addresses of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scpl_ds import cli
from scpl_ds.bench import hosts
from scpl_ds.bench.ranks import in_a_fork
from scpl_ds.errors import RecipeError
from tests.support import tiny
from tests.support.tiny import put, tensors_of, write_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "namespaces.sh"


def script(prefix: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HOSTS": prefix}
    command = ["bash", str(SCRIPT), *words]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


@pytest.fixture(scope="module")
def prefix() -> Iterator[str]:
    """Of the names of two hosts with links of 100 Mbit/s."""
    name = f"scpl-test-{os.getpid()}-"
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("needs root and iproute2")
    made = script(name, "up", "2", "100mbit")
    try:
        if made.returncode != 0:
            pytest.skip(f"no namespaces can be made here: {made.stderr.strip()[-200:]}")
        yield name
    finally:
        script(name, "down")


def test_a_namespace_that_is_not_there_is_refused_by_name():
    with pytest.raises(RecipeError, match=r"--namespaces nowhere: there is no network namespace"):
        hosts.check(("nowhere",), 1)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "a", "b")])
def test_hosts_with_unequal_numbers_of_ranks_are_refused(names: tuple[str, ...]):
    with pytest.raises(RecipeError, match="2 namespaces for 3 ranks"):
        hosts.check(names, 3)


def test_the_bytes_of_an_interface_are_those_it_has_sent():
    table = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes packets\n"
        "    lo:  11      2    0    0    0     0          0         0       22       3\n"
        " scpl0: 333      4    0    0    0     0          0         0      444       5\n"
    )
    assert (hosts.bytes_out("lo", table), hosts.bytes_out("scpl0", table)) == (22, 444)


@pytest.mark.forks
def test_a_packet_takes_as_long_as_was_asked_and_without_a_delay_as_before(prefix: str):
    def round_trip_ms() -> float:
        return 1e3 * in_a_fork(lambda: hosts.round_trip_s(f"{prefix}0", f"{prefix}1"))

    try:
        for asked in (5, 20, 0):
            said = script(prefix, "delay", "2", str(asked))
            assert said.returncode == 0, said.stderr
            # Twice through the switch; the rest is what other processes on the cores cost.
            assert 2 * asked <= round_trip_ms() < 2 * asked + 5
    finally:
        script(prefix, "delay", "2", "0")


@pytest.mark.forks
def test_copies_of_a_stage_on_one_host_send_nothing_of_their_gradients_over_the_link(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    out = tmp_path / "rows.json"
    config = tiny.bert_config(hidden_size=128, intermediate_size=512)
    model = tiny.save_model(tmp_path / "model", config)
    words = ["--ranks=4", "--data-parallel=2", "--micro-batches=1", "--seq=8", "--repeats=1"]
    words += [f"--model={model}", "--steps=4", "--systems=scpl-stream,ddp", f"--json={out}"]
    words += [f"--namespaces={prefix}0,{prefix}1"]
    assert cli.main(["bench", "pipeline", *words]) == 0
    figures = json.loads(out.read_text())
    stages, whole = (row["bytes_sent"] for row in figures["rows"])
    weights = (model / "model.safetensors").stat().st_size
    # A ring over four ranks sends 6 times the gradients in all, half of it between the hosts.
    assert whole > 2 * weights
    assert 4 * 8 * 128 * 4 < stages < weights / 2
    assert figures["machine"]["round_trip_ms"] < 5


@pytest.mark.forks
def test_ranks_on_two_hosts_send_over_their_link_what_the_engine_counts(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    model = tiny.save_model(tmp_path / "model")
    sent: dict[str, Any] = {}
    for name, more in (("here", []), ("hosts", [f"--namespaces={prefix}0,{prefix}1"])):
        out = tmp_path / f"{name}.json"
        words = ["--micro-batches=2", "--seq=32", "--micro-batch-size=64", "--repeats=1"]
        words += [f"--model={model}", "--steps=8", "--systems=scpl-stream", f"--json={out}"]
        assert cli.main(["bench", "pipeline", *words, *more]) == 0
        (row,) = json.loads(out.read_text())["rows"]
        sent[name] = row["bytes_sent"]
    assert sent["here"] > 2 * 64 * 32 * 16 * 4  # the hidden states of a step
    # Headers, acknowledgements and barriers come to it.
    assert sent["here"] < sent["hosts"] < 1.5 * sent["here"]


def launched(prefix: str, recipe: dict[str, Any], launcher: str, nodes: int) -> Path:
    """The run folder of ``recipe`` under a launcher, four ranks on one host or on two."""
    run = Path(recipe["train"]["output_dir"])
    file = write_recipe(run.with_suffix(".yaml"), recipe)
    hostfile = run.with_suffix(".txt")
    hostfile.write_text("10.77.0.1 slots=2\n10.77.0.2 slots=2\n")
    common = {
        "HOSTS": prefix, "RANKS": str(4 // nodes), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT), "SCPL_DS_VENV": sys.prefix,
    }  # fmt: skip
    if nodes > 1:
        common |= {"NODES": str(nodes), "HOSTFILE": str(hostfile)}
        common |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    script = str(ROOT / "launch" / f"{launcher}.sh")
    processes = [
        subprocess.Popen(
            ["bash", str(SCRIPT), "run", str(node), "bash", script, str(file)],
            env={**os.environ, **common, **({"NODE_RANK": str(node)} if nodes > 1 else {})},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=run.parent,
        )
        for node in range(nodes)
    ]
    try:
        said = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * nodes, "\n".join(said)[-3000:]
    return run


@pytest.fixture(scope="module")
def two_by_two(base: dict[str, Any]) -> dict[str, Any]:
    """Two stages, two data-parallel ranks each."""
    changes = {"train.max_steps": 3, "train.save_steps": 3, "train.export": False}
    return put(base, {**changes, "scpl.pipeline_ranks": 2, "scpl.sharding": "ddp"})


@pytest.fixture(scope="module")
def reference(
    prefix: str, two_by_two: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a checkpoint holds after it ran under torchrun on one host."""
    run = tmp_path_factory.mktemp("hosts") / "reference"
    recipe = put(two_by_two, {"train.output_dir": str(run)})
    return tensors_of(launched(prefix, recipe, "torchrun", 1) / "checkpoint-3")


@pytest.mark.parametrize(
    ("launcher", "nodes"), [("torchrun", 2), ("deepspeed", 1), ("deepspeed", 2), ("accelerate", 1)]
)
def test_two_stages_by_two_end_alike_under_every_launcher(
    prefix: str,
    reference: dict[str, Any],
    two_by_two: dict[str, Any],
    tmp_path: Path,
    launcher: str,
    nodes: int,
):
    recipe = put(two_by_two, {"train.output_dir": str(tmp_path / "run")})
    run = launched(prefix, recipe, launcher, nodes)
    assert "data-parallel 2" in (run / "plan.txt").read_text()
    tiny.assert_same(tensors_of(run / "checkpoint-3"), reference)
