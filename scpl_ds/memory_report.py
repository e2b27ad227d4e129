"""Predicted memory as text: a table of ranks, what fits a device, predicted beside measured."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scpl_ds.build_plan import plan_stages
from scpl_ds.ds_checks import put
from scpl_ds.ds_config import DeepSpeedSection, unsupported
from scpl_ds.ds_limits import base_limits
from scpl_ds.errors import ScplError
from scpl_ds.memory import Prediction, RankMemory, Workload, predict
from scpl_ds.memory_sizes import show_size
from scpl_ds.problems import Problem
from scpl_ds.recipe import ScplSection

_TRIED: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("ddp", 0, ()),
    ("deepspeed", 0, ()),
    *(("deepspeed", stage, offload) for stage in (1, 2, 3) for offload in ((), ("optimizer",))),
    ("deepspeed", 3, ("optimizer", "param")),
    *(("fsdp", stage, offload) for stage in (2, 3) for offload in ((), ("optimizer", "param"))),
)
"""What ``fitting`` tries: backend, ZeRO stage, what is offloaded."""


def render_ranks(ranks: Sequence[RankMemory], workload: Workload) -> str:
    """The table of ``scpl-ds plan``, a line per pipeline rank."""
    columns = ["parameters", "gradients", "optimizer", "activations", "head", "boundary", "buffers"]
    if any(rank.host for rank in ranks):
        columns.append("host")
    lines = [["rank", "stages", *columns, "between steps", "peak"]]
    for rank in ranks:
        names = "-".join(map(str, dict.fromkeys((min(rank.stages), max(rank.stages)))))
        parts = [getattr(rank, column) for column in columns]
        sizes = [show_size(size) for size in (*parts, rank.resident, rank.peak)]
        lines.append([str(rank.rank), names, *sizes])
    checkpointing = ", gradient checkpointing" if workload.gradient_checkpointing else ""
    title = (
        f"memory of each rank with {_backend(workload.scpl, workload.section)}, "
        f"{_precision(workload.section)}{checkpointing}: "
        f"{workload.section.micro_batch_size} samples of the longest length, "
        f"{workload.sequence_length} tokens, on {workload.device_type}"
    )
    more = (
        "about 0.5 GiB a rank of Python and libraries comes"
        if workload.device_type == "cpu"
        else "the context and libraries of the GPU come"
    )
    return "\n".join([title, *_aligned(lines), f"On top of each peak: {more}."])


class Choice(NamedTuple):
    """One way to shard, and what it takes."""

    name: str
    peak: int
    """Of the rank that needs most."""
    rank: int
    host: int


def fitting(workload: Workload, *, pipeline_ranks: int, dp_size: int) -> list[Choice]:
    """What each backend and ZeRO stage would take on these ranks, with and without offloading;
    without those that the recipe's own keys exclude.

    Raises:
        ScplError: As ``predict``.
    """
    prediction, choices = Prediction(workload), []
    for scpl, section in _variants(workload):
        if not _refused(workload, scpl, section):
            other = prediction.with_section(scpl, section)
            ranks = other.ranks(pipeline_ranks=pipeline_ranks, dp_size=dp_size)
            worst = max(ranks, key=lambda rank: rank.peak)
            name, host = _backend(scpl, section), max(rank.host for rank in ranks)
            choices.append(Choice(name, worst.peak, worst.rank, host))
    return choices


def _excluded(workload: Workload) -> Iterator[str]:
    """What ``fitting`` leaves out, a line each, with the key that is why."""
    for scpl, section in _variants(workload):
        for problem in _refused(workload, scpl, section)[:1]:
            yield f"  {_backend(scpl, section)}: {problem.path}: {problem.message}"


def _refused(workload: Workload, scpl: ScplSection, section: DeepSpeedSection) -> list[Problem]:
    held = None if workload.adapters is None else workload.adapters.base_dtype
    return [*unsupported(section, scpl.sharding), *base_limits(held, section, scpl.sharding)]


def _variants(workload: Workload) -> Iterator[tuple[ScplSection, DeepSpeedSection]]:
    for sharding, stage, offloaded in _TRIED:
        raw = copy.deepcopy(workload.section.raw)
        put(raw, "zero_optimization.stage", stage)
        for what in ("optimizer", "param"):
            device = "cpu" if what in offloaded else "none"
            put(raw, f"zero_optimization.offload_{what}", {"device": device})
        scpl = workload.scpl.model_copy(update={"sharding": sharding, "zero_stages": None})
        yield scpl, DeepSpeedSection(raw, workload.section.train)


def render_fitting(
    choices: Sequence[Choice], workload: Workload, *, memory: int, pipeline_ranks: int, dp_size: int
) -> str:
    """Which choices fit into ``memory`` bytes a rank, and what to change when none does."""
    lines = [["sharding", "peak", "of rank", "on the host", f"fits {show_size(memory)}"]]
    for choice in choices:
        host = show_size(choice.host) if choice.host else "-"
        verdict = "yes" if choice.peak <= memory else f"no, {show_size(choice.peak - memory)} over"
        lines.append([choice.name, show_size(choice.peak), str(choice.rank), host, verdict])
    text = _aligned(lines)
    if excluded := list(_excluded(workload)):
        text += ["Not with the other keys of this recipe:", *excluded]
    least = min((choice.peak for choice in choices), default=None)
    if least is None or least > memory:
        text += ["", "Nothing fits."]
        changes = [
            f"  {change}: {show_size(peak)}, {'fits' if peak <= memory else 'does not fit'}"
            for change, peak in _changes(workload, pipeline_ranks, dp_size)
            if least is None or peak < least
        ]
        text += ["What would take less, each at its best:", *changes] if changes else []
    return "\n".join(text)


def _changes(workload: Workload, pipeline_ranks: int, dp_size: int) -> Iterator[tuple[str, int]]:
    """What could be changed, one thing at a time, and the least that each would take."""
    for change, changed, ranks in _changed(workload, pipeline_ranks, dp_size):
        with contextlib.suppress(ScplError):  # this one is not possible, others may be
            choices = fitting(changed(), pipeline_ranks=ranks, dp_size=dp_size)
            if choices:
                yield change, min(choice.peak for choice in choices)


def _changed(
    workload: Workload, pipeline_ranks: int, dp_size: int
) -> Iterator[tuple[str, Callable[[], Workload], int]]:
    if not workload.gradient_checkpointing:
        with_it = functools.partial(dataclasses.replace, workload, gradient_checkpointing=True)
        yield "train.gradient_checkpointing: true", with_it, pipeline_ranks
    micro = workload.section.micro_batch_size
    if micro > 1:
        raw = copy.deepcopy(workload.section.raw)
        put(raw, "train_micro_batch_size_per_gpu", micro // 2)
        raw.pop("train_batch_size", None)
        section = DeepSpeedSection(raw, workload.section.train)
        halved = functools.partial(dataclasses.replace, workload, section=section)
        name = f"deepspeed.train_micro_batch_size_per_gpu: {micro // 2}"
        yield f"{name} (another objective: fewer rows are compared)", halved, pipeline_ranks
    stages = 2 * workload.plan.num_stages
    if stages <= workload.anatomy.num_layers:

        def deeper() -> Workload:
            scpl = workload.scpl.model_copy(update={"stages": stages, "partition": "parameters"})
            plan = plan_stages(workload.anatomy, scpl, workload.config)
            return dataclasses.replace(workload, scpl=scpl, plan=plan)

        yield f"scpl.stages: {stages} on as many ranks", deeper, pipeline_ranks
        more = 2 * pipeline_ranks
        yield f"scpl.stages: {stages} on {more * dp_size} ranks", deeper, more


def describe(
    workload: Workload, *, pipeline_ranks: int, dp_size: int, memory: int | None = None
) -> str:
    """What ``scpl-ds plan`` says about memory: the ranks and, given the memory of a device, what
    fits. A workload that cannot be predicted is said to be so, and is no error."""
    ranks = {"pipeline_ranks": pipeline_ranks, "dp_size": dp_size}
    try:
        text = render_ranks(predict(workload, **ranks), workload)
    except ScplError as error:
        return f"memory is not predicted: {error}"
    if memory is not None:
        try:
            choices = fitting(workload, **ranks)
            text += "\n\n" + render_fitting(choices, workload, memory=memory, **ranks)
        except ScplError as error:
            text += f"\n\nwhat fits is not predicted: {error}"
    return text


def predicted(workload: Workload, pipeline_ranks: int, dp_size: int) -> list[RankMemory] | str:
    """``predict``, or why it cannot: never an error, because a run can do without."""
    try:
        return predict(workload, pipeline_ranks=pipeline_ranks, dp_size=dp_size)
    except Exception as error:
        return f"not predicted: {error}"


def compare(
    ranks: Sequence[RankMemory] | str,
    measured: Sequence[int],
    *,
    dp_size: int,
    device_type: str,
    before: int = 0,
) -> str:
    """Measured peaks beside predicted ones, a line per rank of the run.

    Args:
        ranks: What was predicted, or why it was not.
        measured: Bytes by global rank.
        dp_size: Data-parallel ranks of each stage.
        device_type: What was trained on.
        before: Bytes that rank 0 took before its model, which are in neither.
    """
    if isinstance(ranks, str):
        found = ", ".join(show_size(size) for size in measured)
        return f"peak memory by rank: {found}; {ranks}"
    lines = [["rank", "predicted peak", "measured peak", "measured / predicted"]]
    for number, size in enumerate(measured):
        peak = ranks[number // dp_size].peak
        lines.append([str(number), show_size(peak), show_size(size), f"{size / max(1, peak):.2f}"])
    text = ["memory during training", *_aligned(lines)]
    if device_type == "cpu":
        text.append(
            f"Neither has the {show_size(before)} that Python and libraries took before the model; "
            "the lines of the steps have them. Measured is the resident set, in which "
            "the C library keeps freed blocks; with MALLOC_MMAP_THRESHOLD_=1048576 it is what is "
            "alive, and training is slower."
        )
    return "\n".join(text)


def _backend(scpl: ScplSection, section: DeepSpeedSection) -> str:
    stages = "/".join(map(str, scpl.zero_stages or (section.zero_stage,)))
    name = scpl.sharding
    if name == "fsdp":
        between = "whole from forward to backward" if stages == "2" else "whole only in use"
        name += f", stage {stages} ({between})"
    elif name not in ("none", "ddp"):
        name += f" ZeRO-{stages}"
    offloaded = [what for what in ("optimizer", "param") if section.offload(what)]
    return name + (f" + {' and '.join(offloaded)} offload" if offloaded else "")


def _precision(section: DeepSpeedSection) -> str:
    return f"{section.autocast} autocast" if section.autocast else section.precision


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, all but the first to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
