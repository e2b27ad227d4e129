"""`scpl-ds doctor` on one machine: what it finds is so, and it says what to do."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scpl_ds import doctor_accounts
from scpl_ds.distributed.reach import Link
from scpl_ds.distributed.world import RankEnv
from scpl_ds.doctor import (
    check_interfaces,
    judge_clocks,
    judge_links,
    judge_shared,
    judge_versions,
)
from scpl_ds.doctor_accounts import check_hub, check_wandb
from scpl_ds.doctor_findings import Finding, grouped, ok, problem, render, warning
from scpl_ds.doctor_machine import check_compiler, check_folder, check_limits
from scpl_ds.doctor_packages import Asked, asked, check_packages

SECRET = "s3cr3t-marker-4711"


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


# -- packages --------------------------------------------------------------------------------


def test_the_packages_this_project_asks_for_are_all_looked_at():
    names = {requirement.name for requirement in asked().packages}
    assert {"torch", "deepspeed", "transformers", "safetensors", "packaging"} <= names
    said = " ".join(finding.found for finding in check_packages())
    assert all(name in said for name in names)


def test_a_package_that_is_too_old_or_missing_is_a_problem_with_the_command_that_mends_it():
    wanted = Asked(">=3.11", [Requirement("torch>=999"), Requirement("no-such-package>=1")], {})
    python, old, missing, _ = check_packages(wanted)
    assert python.level == "ok"
    assert old.level == missing.level == "problem"
    assert ">=999" in old.found and "pip install 'torch>=999'" in old.do
    assert "missing" in missing.found


def test_another_python_than_needed_is_a_problem():
    found = next(iter(check_packages(Asked("<3", [], {}))))
    assert (found.level, found.check) == ("problem", "python")


# -- machine ---------------------------------------------------------------------------------


def test_a_stale_build_lock_is_a_problem_and_a_fresh_one_a_warning(tmp_path: Path):
    for name, age in (("cpu_adam", 7200), ("fused_adam", 5)):
        lock = tmp_path / "py311_cpu" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    stale, fresh = [f for f in check_compiler(tmp_path) if "lock" in f.found]
    assert stale.level == "problem" and "120 minutes" in stale.found
    assert stale.do.endswith(f"rm {tmp_path}/py311_cpu/cpu_adam/lock")
    assert fresh.level == "warning" and "fused_adam" in fresh.found


def test_a_compiler_that_does_not_compile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "broken-c++"
    fake.write_text("#!/bin/sh\necho 'no space for cc1plus' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    found = next(iter(check_compiler(tmp_path / "none")))
    assert found.level == "warning" and "no space for cc1plus" in found.found and "CXX" in found.do


def test_a_folder_that_cannot_be_written_is_a_problem_and_leaves_nothing_behind(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    (found,) = check_folder("run folder", blocked / "runs", needs_gib=0, key="train.output_dir")
    assert found.level == "problem" and "train.output_dir" in found.do
    assert levels(check_folder("x", tmp_path / "a" / "b", needs_gib=0, key="k")) == ["ok"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_too_little_room_is_a_warning_or_a_problem(tmp_path: Path):
    assert levels(check_folder("x", tmp_path, needs_gib=1e7, key="k")) == ["problem"]
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 2**30
    assert levels(check_folder("x", tmp_path, needs_gib=2 * free, key="k")) == ["warning"]


def test_a_folder_that_all_may_write_to_is_a_warning(tmp_path: Path):
    tmp_path.chmod(0o777)
    found = list(check_folder("run folder", tmp_path, needs_gib=0, key="k"))
    assert levels(found) == ["ok", "warning"] and f"chmod o-w {tmp_path}" == found[1].do


def test_more_ranks_than_open_files_allow_is_said():
    found = {one.check: one for one in check_limits(RankEnv(0, 10**7, 0, 1))}
    assert found["open files"].level == "problem" and "ulimit -n" in found["open files"].do
    assert {"shared memory", "memory"} <= found.keys()


def test_an_interface_that_is_not_there_is_named():
    own = socket.if_nameindex()[0][1]
    assert list(check_interfaces({"GLOO_SOCKET_IFNAME": own})) == []
    assert list(check_interfaces({"NCCL_SOCKET_IFNAME": f"^{own}"})) == []
    (found,) = check_interfaces({"GLOO_SOCKET_IFNAME": "nope0"})
    assert found.level == "problem" and "nope0" in found.found and own in found.found


# -- accounts --------------------------------------------------------------------------------


def test_keys_are_found_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    found = [*check_wandb(), *check_hub()]
    text = render(grouped([found]), 1) + json.dumps([vars(one) for one in found])
    assert "a key is there (WANDB_API_KEY)" in text and "a token is there" in text
    assert SECRET not in text


def test_a_key_in_a_file_that_others_may_read_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {SECRET}\n")
    file.chmod(0o644)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(file))
    found = list(check_wandb())
    assert levels(found) == ["ok", "warning"] and f"chmod 600 {file}" == found[1].do
    file.chmod(stat.S_IRUSR)
    assert levels(check_wandb()) == ["ok"]
    assert doctor_accounts._wandb_key() == str(file)


def test_online_without_a_key_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "online")
    assert [(f.level, f.do) for f in check_wandb()] == [("warning", "wandb login")]
    monkeypatch.setenv("WANDB_MODE", "onlin")
    assert levels(check_wandb())[0] == "warning"


# -- several ranks ---------------------------------------------------------------------------


def test_ranks_with_other_versions_are_a_problem():
    same = [{"torch": "2.13.0", "python": "3.11.7"}] * 2
    assert levels(judge_versions(same)) == ["ok"]
    (found,) = judge_versions([*same, {"torch": "2.12.0", "python": "3.11.7"}])
    assert found.level == "problem"
    assert "torch: rank 0 has 2.13.0, rank 2 has 2.12.0" in found.found
    (found,) = judge_versions([{"wandb": "1"}, {}])
    assert "rank 1 has none" in found.found


@pytest.mark.parametrize(
    ("ahead", "level"), [([0.0, 0.2], "ok"), ([0.0, -2.0], "warning"), ([0.0, 900.0], "problem")]
)
def test_clocks_that_differ_are_said(ahead: list[float], level: str):
    (found,) = judge_clocks(ahead, ["a", "b"])
    assert found.level == level
    assert level == "ok" or "rank 1 (b)" in found.found


def test_a_slow_link_is_named_by_its_ranks():
    links = [Link(0, 1, 30.0, 900.0), Link(1, 2, 9000.0, 900.0), Link(2, 3, 30.0, 2.0)]
    assert ["ranks 1 and 2" in f.found for f in judge_links(links)] == [True, False]
    assert levels(judge_links(links)) == ["warning"] * 2
    assert levels(judge_links(links[:1])) == ["ok"]


def test_a_machine_that_does_not_see_the_run_folder_is_a_problem():
    (found,) = judge_shared([True, False], ["a", "b"], Path("/runs"))
    assert found.level == "problem" and "rank 1 (b)" in found.found
    assert levels(judge_shared([True, True], ["a", "b"], Path("/runs"))) == ["ok"]
    assert list(judge_shared([None, None], ["a", "b"], Path("/runs"))) == []


# -- the report ------------------------------------------------------------------------------


def test_equal_findings_of_several_ranks_are_one_line():
    found = grouped([[ok("python", "3.11"), ok("gpu", "H100")], [ok("python", "3.11")]])
    assert [(one.finding.check, one.ranks) for one in found] == [("python", (0, 1)), ("gpu", (0,))]
    text = render(found, 2)
    assert "3.11\n" in text and "H100 [rank 0]" in text


def test_the_report_ends_with_what_was_found():
    bad = [problem("a", "x", "mend"), warning("b", "y", "try"), Finding("c", "ok", "z")]
    lines = render(grouped([bad]), 1).splitlines()
    assert lines[1].split() == ["->", "mend"]
    assert lines[-1] == "1 problem, 1 warning: a run would fail or be wrong."
