"""``scpl-ds bench pipeline``: throughput of stages with local objectives beside backprop pipelines.

Every system has its own processes, on the same cores, with the same model and data. They run in
turn, one at a time, each repeat in another order, whole optimizer steps by the wall clock, fill and
drain of the pipeline included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from scpl_ds.bench import hosts, systems
from scpl_ds.bench.emulate import Lengths
from scpl_ds.bench.machine import Processor
from scpl_ds.bench.pipeline_rows import (
    Run,
    add_ratios,
    error_row,
    measured_row,
    render,
    render_summary,
    simulated_row,
    summarise,
)
from scpl_ds.bench.ranks import World, in_a_fork
from scpl_ds.bench.systems import Entry, Task
from scpl_ds.errors import RecipeError, ScplError
from scpl_ds.meter_machine import describe_machine
from scpl_ds.setup import Model

log = logging.getLogger(__name__)

MICRO_BATCHES = 48
FLUSHED_MICRO_BATCHES = 16
"""Of a run by default: where every step ends before the next begins, a longer run is no faster."""
EMULATED_MICRO_BATCHES = 800
EMULATED_FLUSHED_MICRO_BATCHES = 40
_LEAST_STEPS = 4
_IMPORTED = (
    "deepspeed",
    "torch.distributed.pipelining",
    "functorch.compile",
    "torch._inductor.compile_fx",
)
"""What systems import at first use, the last two DeepSpeed's ZeRO: before the fork it costs them
neither seconds nor memory. None starts a thread."""
LIMIT_S = 300.0
"""A system that is not built, or has not run, after so many seconds is ended; a run that must take
long gets more."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for, as ``scpl-ds bench pipeline --help`` says it."""

    ranks: int = 2
    data_parallel: int = 1
    """Of the ranks with the same stage; they share the samples of a micro-batch."""
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    model: str = "bert-8l"
    seq: int = 64
    micro_batch_size: int = 4
    repeats: int = 5
    steps: int | None = None
    threads: int = 1
    systems: tuple[str, ...] | None = None
    namespaces: tuple[str, ...] = ()
    """As many ranks in each; empty: all ranks are in this process's."""
    emulate: tuple[float, float] | None = None
    """Milliseconds of a forward and of a backward of one micro-batch."""

    @property
    def stages(self) -> int:
        return self.ranks // self.data_parallel

    @property
    def lengths(self) -> Lengths | None:
        """Of one sample, in seconds."""
        if self.emulate is None:
            return None
        return Lengths(*(ms / 1e3 / self.micro_batch_size for ms in self.emulate))

    def steps_of(self, entry: Entry, num_micro_batches: int) -> int:
        """Optimizer steps of one run of a system."""
        if self.steps is not None:
            return self.steps
        wanted = FLUSHED_MICRO_BATCHES if entry.flushed else MICRO_BATCHES
        if self.emulate is not None:
            wanted = EMULATED_FLUSHED_MICRO_BATCHES if entry.flushed else EMULATED_MICRO_BATCHES
        return max(_LEAST_STEPS, -(-wanted // num_micro_batches))

    def limit_s(self, num_micro_batches: int) -> float:
        if self.emulate is None:
            return LIMIT_S + 10.0 * (self.steps or 0) * num_micro_batches
        one_after_the_other = sum(self.emulate) / 1e3 * self.ranks * num_micro_batches
        steps = max(self.steps_of(entry, num_micro_batches) for entry in systems.entries().values())
        return LIMIT_S + 2 * steps * one_after_the_other


def main(args: argparse.Namespace, save: Callable[[Any], None]) -> str:
    """The command: the tables."""
    names = [field.name for field in dataclasses.fields(Options)]
    figures = run(Options(**{name: getattr(args, name) for name in names}), on_figures=save)
    return f"{render(figures['rows'])}\n\n{render_summary(figures['summary'])}"


def run(
    options: Options,
    *,
    entries: Mapping[str, Entry] | None = None,
    on_figures: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure; progress goes to the log.

    Args:
        options: What to measure.
        entries: Other systems than ``systems.entries()``, by name.
        on_figures: Called with everything so far after each number of micro-batches.

    Returns:
        ``machine``, ``settings``, ``rows`` (a row a system and number of micro-batches) and
        ``summary`` (a row a number of micro-batches).

    Raises:
        RecipeError: Something that cannot be measured as asked, before anything is.
    """
    known = dict(entries or systems.entries())
    chosen = systems.choose(options.systems, known, emulated=options.emulate is not None)
    hosts.check(options.namespaces, options.ranks)
    _check_data_parallel(options)
    pinning = pin(options)
    figures: dict[str, Any] = {
        "machine": describe_machine()
        | {"device": "cpu", "threads": options.threads, "pinning": pinning},
        "settings": dataclasses.asdict(options) | {"systems": list(chosen)},
        "rows": [],
        "summary": [],
    }
    if len(options.namespaces) > 1:
        first, last = options.namespaces[0], options.namespaces[-1]
        seconds = in_a_fork(lambda: hosts.round_trip_s(first, last))
        figures["machine"]["round_trip_ms"] = round(1e3 * seconds, 3)
        log.info("%s to %s and back: %.1f ms", first, last, 1e3 * seconds)
    with tempfile.TemporaryDirectory(prefix="scpl-bench-") as folder, _one_thread():
        model = _prepare(options, Path(folder) / "model")
        for number in options.micro_batches:
            task = Task(
                model,
                options.stages,
                number,
                options.micro_batch_size,
                options.seq,
                options.lengths,
                options.data_parallel,
            )
            rows = _cell(task, options, {name: known[name] for name in chosen}, pinning)
            figures["rows"] += rows
            figures["summary"].append(summarise(rows))
            if on_figures is not None:
                on_figures(figures)
    return figures


def pin(options: Options) -> list[list[int]] | None:
    """The cores of each rank, each its own; where there are too few, those of its host, if each
    namespace can have one of its own; else None."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores, each = sorted(os.sched_getaffinity(0)), options.threads
    if options.ranks * each > len(cores):
        count = len(options.namespaces)
        if not count or len(cores) < count:
            return None
        of_a_host, ranks = len(cores) // count, options.ranks // count
        starts = [rank // ranks * of_a_host for rank in range(options.ranks)]
        return [cores[start : start + of_a_host] for start in starts]
    return [cores[rank * each : (rank + 1) * each] for rank in range(options.ranks)]


def _check_data_parallel(options: Options) -> None:
    share = options.data_parallel
    for name, value in (
        ("--ranks", options.ranks),
        ("--micro-batch-size", options.micro_batch_size),
    ):
        if value % share:
            raise RecipeError(
                f"--data-parallel {share}: {name} {value} is no multiple of it. Use one that is."
            )


def _prepare(options: Options, folder: Path) -> Model:
    """Cut the model and import what ranks use, once, so that a fork has it."""
    path = in_a_fork(lambda: systems.model_folder(options.model, folder))
    model = systems.cut(path, 1)
    if options.emulate is None:
        layers = model.anatomy.num_layers
        if options.stages > layers:
            raise RecipeError(
                f"--ranks {options.ranks}: every stage needs a layer and --model {options.model} "
                f"has {layers}. Use at most {layers} stages, or --emulate 5,10 for stages that "
                "sleep."
            )
        model = systems.cut(path, options.stages)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if options.emulate is None and positions is not None and options.seq > positions:
        raise RecipeError(
            f"--seq {options.seq}: --model {options.model} has {positions} positions. Use at most "
            f"--seq {positions}."
        )
    for name in _IMPORTED:
        importlib.import_module(name)
    return model


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP's threads would not be in a fork, their locks would."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cell(
    task: Task,
    options: Options,
    entries: Mapping[str, Entry],
    pinning: list[list[int]] | None,
) -> list[dict[str, Any]]:
    """All systems at one number of micro-batches."""
    number = task.num_micro_batches
    errors: dict[str, str] = {}
    runs: dict[str, list[Run]] = {}
    with contextlib.ExitStack() as stack:
        worlds: dict[str, World] = {}
        for name, entry in entries.items():
            log.info("%s, %d micro-batches: building", name, number)
            try:
                worlds[name] = stack.enter_context(_world(name, entry, task, options, pinning))
                runs[name] = []
            except ScplError as error:
                errors[name] = str(error)
                log.warning("%s, %d micro-batches: %s", name, number, error)
        for repeat in range(options.repeats):
            for name in _rotated(list(worlds), repeat):
                try:
                    steps = options.steps_of(entries[name], number)
                    runs[name].append(_measure(worlds[name], steps))
                except ScplError as error:
                    errors[name] = str(error)
                    worlds.pop(name)  # ended by itself
                    log.warning("%s, %d micro-batches: %s", name, number, error)
            log.info("%d micro-batches: repeat %d of %d", number, repeat + 1, options.repeats)
    rows = [
        error_row(name, number, errors[name])
        if name in errors
        else measured_row(name, entries[name], task, runs[name])
        for name in entries
    ]
    rows = [simulated_row(row, task) for row in rows]
    add_ratios(rows)
    return rows


def _world(
    name: str,
    entry: Entry,
    task: Task,
    options: Options,
    pinning: list[list[int]] | None,
) -> World:
    return World(
        name,
        lambda mesh, device: entry.build(task, mesh, device),
        ranks=options.ranks,
        data_parallel=options.data_parallel,
        threads=options.threads,
        cores=pinning,
        namespaces=options.namespaces,
        limit_s=options.limit_s(task.num_micro_batches),
    )


def _measure(world: World, steps: int) -> Run:
    processor, began = Processor.now(), time.monotonic()
    reports = world.run(steps)
    seconds = time.monotonic() - began
    others = processor.others_since(sum(report.cpu_s for report in reports), seconds)
    return Run(steps, reports, others)


def _rotated(names: Sequence[str], by: int) -> list[str]:
    at = by % len(names) if names else 0
    return [*names[at:], *names[:at]]
