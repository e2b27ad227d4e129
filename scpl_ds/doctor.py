"""``scpl-ds doctor``: can this machine, and can these ranks, train? What is to be mended?

Everything is tried, not looked up: a product on the GPU, a compiled program, a file written, a sum
over the ranks, a message to each neighbour, a step of every sharding backend.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scpl_ds import registry
from scpl_ds.build import PipelineModule, initialize
from scpl_ds.distributed import reach
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.world import RankEnv, init_world, pick_device
from scpl_ds.doctor_accounts import check_hub, check_wandb
from scpl_ds.doctor_findings import Finding, Grouped, grouped, ok, problem, warning
from scpl_ds.doctor_machine import (
    check_accelerator,
    check_compiler,
    check_folder,
    check_limits,
    nearest,
)
from scpl_ds.doctor_packages import check_packages
from scpl_ds.run_folder import versions

_SLOW_MS, _SLOW_MIB = 5.0, 50.0
_CLOCK_S, _WRONG_CLOCK_S = 1.0, 300.0


@dataclasses.dataclass
class Report:
    """What was found on all ranks, as far as they could be asked."""

    found: list[Grouped]
    world_size: int
    measured: dict[str, Any]
    """``links``, ``all_reduce`` and ``clock_ahead_s``, where there are several ranks."""
    complete: bool = False
    """It has the findings of all ranks; else of this one alone."""

    @property
    def exit_code(self) -> int:
        return int(any(one.finding.level == "problem" for one in self.found))

    def as_json(self) -> dict[str, Any]:
        count = {
            level + "s": sum(one.finding.level == level for one in self.found)
            for level in ("problem", "warning")
        }
        findings = [
            {**dataclasses.asdict(one.finding), "ranks": list(one.ranks)} for one in self.found
        ]
        return {"ranks": self.world_size, **count, "findings": findings, **self.measured}


def examine(output_dir: Path, *, timeout_s: float) -> Report:
    """Look at everything; called by every rank of a launcher, or by one process alone.

    Args:
        output_dir: Where runs are going to be written.
        timeout_s: Longest wait for other ranks, in seconds.
    """
    env = RankEnv.current()
    own = list(check_machine(env, output_dir))
    measured: dict[str, Any] = {}
    try:
        device = pick_device(env)
        init_world(env, device, timeout_s=timeout_s)
        # All ranks in one row, so that every one has a neighbour.
        mesh = Mesh(1, env.world_size, device, timeout_s=timeout_s)
    except Exception as error:  # torch's are of many classes
        own.append(_unreachable(env, error))
        return Report([Grouped(one, (env.rank,)) for one in own], env.world_size, measured)
    try:
        own += check_ranks(mesh, output_dir, measured)
        own += check_backends(mesh, timeout_s=timeout_s)
        by_rank = gather_objects(mesh, [dataclasses.asdict(one) for one in own])
    except Exception as error:
        own.append(_unreachable(env, error))
        return Report([Grouped(one, (env.rank,)) for one in own], env.world_size, measured)
    found = grouped([[Finding(**one) for one in part] for part in by_rank])
    return Report(found, env.world_size, measured, complete=True)


def check_machine(env: RankEnv, output_dir: Path) -> Iterator[Finding]:
    """What this rank sees alone; what is the machine's, its first rank says."""
    yield from check_packages()
    yield from check_accelerator(env)
    if env.local_rank != 0:
        return
    from huggingface_hub import constants

    yield from check_compiler()
    yield from check_folder("run folder", output_dir, needs_gib=10, key="train.output_dir")
    cache = Path(constants.HF_HUB_CACHE)
    yield from check_folder("hub cache", cache, needs_gib=5, key="HF_HOME")
    yield from check_limits(env)
    yield from check_interfaces(os.environ)
    yield from check_wandb()
    yield from check_hub()


def check_interfaces(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Network interfaces that somebody asked for by name."""
    there = [name for _, name in socket.if_nameindex()]
    for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        asked = environ.get(key, "")
        names = [name.lstrip("^=").strip() for name in asked.split(",") if name]
        exact = key.startswith("GLOO") or asked.startswith("=")
        for name in names if not asked.startswith("^") else ():
            if not any(one == name if exact else one.startswith(name) for one in there):
                yield problem(
                    "network", f"{key} is {asked}, but the interfaces are {', '.join(there)}",
                    f"set it to one of them on every machine, or unset {key}",
                )  # fmt: skip


# -- several ranks ---------------------------------------------------------------------------


def check_ranks(mesh: Mesh, output_dir: Path, measured: dict[str, Any]) -> Iterator[Finding]:
    """What ranks can say to each other, and whether they agree. All ranks call it together; what is
    of all is said by rank 0.

    Raises:
        RuntimeError: One cannot be reached.
    """
    total = reach.all_reduce(mesh)
    sums = [total, reach.all_reduce(mesh, cuda=True)] if mesh.has_nccl else [total]
    if mesh.world_size == 1:
        yield ok(
            "ranks", "gloo works in this process. To try several: torchrun --nproc-per-node 2 -m "
            "scpl_ds doctor",
        )  # fmt: skip
        return
    links, clocks = reach.neighbours(mesh), reach.clock_differences(mesh)
    hosts = gather_objects(mesh, socket.gethostname())
    installed = gather_objects(mesh, {"python": platform.python_version(), **versions()})
    seen = gather_objects(mesh, _sees_file_of_rank_0(mesh, output_dir))
    measured["all_reduce"] = [dataclasses.asdict(one) for one in sums]
    measured["links"] = [dataclasses.asdict(one) for one in links]
    measured["clock_ahead_s"] = clocks
    if mesh.rank == 0:
        machines = len(set(hosts))
        yield ok(
            "ranks",
            f"{mesh.world_size} on {machines} machine{'s' * (machines > 1)}; a sum of 4 MiB takes "
            + ", ".join(f"{one.milliseconds:.1f} ms over {one.backend}" for one in sums),
        )
        yield from judge_links(links)
        yield from judge_versions(installed)
        yield from judge_clocks(clocks, hosts)
        yield from judge_shared(seen, hosts, nearest(output_dir))


def judge_links(links: Sequence[reach.Link]) -> Iterator[Finding]:
    slow = [k for k in links if k.latency_us > 1e3 * _SLOW_MS or k.mib_per_s < _SLOW_MIB]
    for link in slow[:8]:
        yield warning(
            "network", f"ranks {link.source} and {link.target}: {_figures([link])}",
            "a boundary between them will be waited for: look at the interface "
            "(GLOO_SOCKET_IFNAME) and at what else the machines do",
        )  # fmt: skip
    if links and not slow:
        yield ok("network", f"messages between neighbours: {_figures(links)}")


def _figures(links: Sequence[reach.Link]) -> str:
    latency, width = max(k.latency_us for k in links), min(k.mib_per_s for k in links)
    of = "" if len(links) == 1 else "up to "
    least = "" if len(links) == 1 else "at least "
    return f"{of}{latency:.0f} us, {least}{width:.0f} MiB/s"


def judge_versions(installed: Sequence[Mapping[str, str]]) -> Iterator[Finding]:
    """Ranks of other versions than rank 0 would compute other numbers, or not understand it."""
    differs = False
    for name in sorted(set().union(*installed)):
        there = [one.get(name, "none") for one in installed]
        if others := [rank for rank, version in enumerate(there) if version != there[0]]:
            differs = True
            yield problem(
                "versions", f"{name}: rank 0 has {there[0]}, rank {others[0]} has "
                f"{there[others[0]]}",
                "install the same on every machine: pip install -c constraints.txt .",
            )  # fmt: skip
    if not differs:
        yield ok("versions", f"{len(installed[0])} packages and Python are equal on all ranks")


def judge_clocks(ahead_s: Sequence[float], hosts: Sequence[str]) -> Iterator[Finding]:
    far = max(range(len(ahead_s)), key=lambda rank: abs(ahead_s[rank]))
    most = abs(ahead_s[far])
    if most <= _CLOCK_S:
        yield ok("clock", f"ranks differ by at most {1e3 * most:.1f} ms")
        return
    level = problem if most > _WRONG_CLOCK_S else warning
    yield level(
        "clock", f"rank {far} ({hosts[far]}) is {ahead_s[far]:+.1f} s from rank 0 ({hosts[0]}): "
        "logs cannot be laid beside each other, and certificates may be refused",
        f"switch on NTP on {hosts[far]} (timedatectl set-ntp true)",
    )  # fmt: skip


def _sees_file_of_rank_0(mesh: Mesh, output_dir: Path) -> bool | None:
    """None: rank 0 could not write one, which it says elsewhere."""
    place = nearest(output_dir)
    path, written = place / f".scpl-ds-doctor-{uuid.uuid4().hex}", False
    if mesh.rank == 0:
        try:
            path.touch()
            written = True
        except OSError:
            pass
    name, there = broadcast_object(mesh, (str(path), written))
    found = Path(name).exists() if there else None
    gather_objects(mesh, None)  # all have looked
    if mesh.rank == 0 and written:
        path.unlink(missing_ok=True)
    return found


def judge_shared(
    seen: Sequence[bool | None], hosts: Sequence[str], place: Path
) -> Iterator[Finding]:
    blind = [rank for rank, one in enumerate(seen) if one is False]
    if blind:
        yield problem(
            "run folder", f"rank {blind[0]} ({hosts[blind[0]]}) does not see what rank 0 "
            f"({hosts[0]}) writes in {place}",
            "every stage writes its part of a checkpoint there: set train.output_dir to a folder "
            "that all machines share",
        )  # fmt: skip
    elif len(set(hosts)) > 1 and seen[0]:
        yield ok("run folder", f"all {len(set(hosts))} machines share {place}")


# -- backends --------------------------------------------------------------------------------


def check_backends(mesh: Mesh, *, timeout_s: float) -> Iterator[Finding]:
    """One step of a few numbers under every sharding backend, on all ranks as one stage."""
    good: list[str] = []
    for name in registry.names("sharding"):
        trouble = None
        try:
            _one_step(name, mesh.world_size, timeout_s)
        # Not narrower: a library that is half there may raise anything while it is imported.
        except Exception as error:
            trouble = f"{type(error).__name__}: {_first(str(error))}"
        if trouble is None:
            good.append(name)
        else:
            yield problem(
                "sharding", f"scpl.sharding: {name} cannot be used: {trouble}",
                "install what is missing above, or choose one of the others",
            )  # fmt: skip
        gather_objects(mesh, trouble is None)  # the next one begins on all ranks together
    if good:
        yield ok("sharding", f"{', '.join(good)}: each has taken a step")


def _one_step(sharding: str, world_size: int, timeout_s: float) -> None:
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        example = torch.randn(4, 8)
    net = PipelineModule(
        layers=layers, num_stages=1, loss_fn=nn.functional.cross_entropy, input_example=example
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4 * world_size,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": {"deepspeed": 1, "fsdp": 3}.get(sharding, 0)},
        "scpl": {
            "stages": 1, "pipeline_ranks": 1, "sharding": sharding, "timeout_s": timeout_s,
        },
    }  # fmt: skip
    engine = initialize(model=net, config=config).engine
    loss = engine.train_batch(iter([(example, torch.tensor([0, 1, 0, 1]))]))
    if loss is None or not float(loss) > 0:
        raise RuntimeError(f"a step gave the loss {loss}")


def _unreachable(env: RankEnv, error: BaseException) -> Finding:
    if env.world_size == 1:
        return problem(
            "ranks", f"gloo does not work in this process: {_first(str(error))}",
            f"give {socket.gethostname()} an address in /etc/hosts, or set GLOO_SOCKET_IFNAME=lo",
        )  # fmt: skip
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return problem(
        "ranks", f"rank {env.rank} on {socket.gethostname()} did not reach all {env.world_size} "
        f"ranks, whose meeting place is {address}: {_first(str(error))}",
        "look whether all ranks were started with that address, whether it can be reached (ping, "
        "firewall: all ports between the machines), and set GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME to the interface between them (`ip addr`)",
    )  # fmt: skip


def _first(text: str) -> str:
    return next(iter(text.strip().splitlines()), "no reason given")[:300]
