"""Predicted memory as text: a table of ranks, what fits a device, predicted beside measured."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scpl_ds.build import plan_stages
from scpl_ds.ds_checks import put
from scpl_ds.ds_config import DeepSpeedSection, unsupported
from scpl_ds.errors import ScplError
from scpl_ds.memory import Prediction, RankMemory, Workload, predict

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power
    for power, letter in enumerate("kmgt", start=1)
    for i in ("", "i")
}
_TRIED = (("ddp", (0,)), ("deepspeed", (0, 1, 2, 3)), ("fsdp", (2, 3)))
"""Backends that ``fitting`` tries, with the ZeRO stages of each."""


def parse_size(text: str) -> int:
    """``80GiB``, ``24 GB``, ``512MiB`` or a number of bytes, as bytes.

    Raises:
        ValueError: It is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise ValueError(
            f"must be a size such as 80GiB, 24GB, 512MiB or a number of bytes, got {text!r}"
        )
    return int(float(found[1]) * unit)


def show_size(size: int) -> str:
    """``1.52 GiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size} B"


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
        f"memory of each rank with {_backend(workload)}, "
        f"{_precision(workload.section)}{checkpointing}: "
        f"{workload.section.micro_batch_size} samples of the longest length, "
        f"{workload.sequence_length} tokens, on {workload.device_type}"
    )
    return "\n".join([title, *_aligned(lines)])


class Choice(NamedTuple):
    """One way to shard, and what it takes."""

    name: str
    peak: int
    """Of the rank that needs most."""
    rank: int
    host: int


def fitting(workload: Workload, *, pipeline_ranks: int, dp_size: int) -> list[Choice]:
    """What each backend and ZeRO stage would take on these ranks, with and without offloading."""
    prediction, choices = Prediction(workload), []
    for sharding, section in _variants(workload.section):
        scpl = workload.scpl.model_copy(update={"sharding": sharding, "zero_stages": None})
        other = prediction.with_section(scpl, section)
        ranks = other.ranks(pipeline_ranks=pipeline_ranks, dp_size=dp_size)
        worst = max(ranks, key=lambda rank: rank.peak)
        choices.append(
            Choice(_backend(other.workload), worst.peak, worst.rank, max(r.host for r in ranks))
        )
    return choices


def _variants(section: DeepSpeedSection) -> Iterator[tuple[str, DeepSpeedSection]]:
    for sharding, stages in _TRIED:
        for stage in stages:
            for offload in (False, True):
                raw = copy.deepcopy(section.raw)
                put(raw, "zero_optimization.stage", stage)
                for what in ("optimizer", "param"):
                    device = (
                        "cpu" if offload and (what == "optimizer" or sharding == "fsdp") else None
                    )
                    put(raw, f"zero_optimization.offload_{what}", {"device": device or "none"})
                varied = DeepSpeedSection(raw, section.train)
                if not unsupported(varied, sharding):
                    yield sharding, varied


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
    if not any(choice.peak <= memory for choice in choices):
        text += ["", "Nothing fits. The least that each of these would take:"]
        text += [
            f"  {change}: {show_size(min(c.peak for c in changed))}"
            for change, changed in _changes(workload, pipeline_ranks, dp_size)
        ]
    return "\n".join(text)


def _changes(
    workload: Workload, pipeline_ranks: int, dp_size: int
) -> Iterator[tuple[str, list[Choice]]]:
    """What could be changed, one thing at a time, and what each would take."""

    def tried(changed: Workload, ranks: int = pipeline_ranks) -> list[Choice]:
        return fitting(changed, pipeline_ranks=ranks, dp_size=dp_size)

    if not workload.gradient_checkpointing:
        with_it = dataclasses.replace(workload, gradient_checkpointing=True)
        yield "train.gradient_checkpointing: true", tried(with_it)
    micro = workload.section.micro_batch_size
    if micro > 1:
        raw = copy.deepcopy(workload.section.raw)
        put(raw, "train_micro_batch_size_per_gpu", micro // 2)
        raw.pop("train_batch_size", None)
        section = DeepSpeedSection(raw, workload.section.train)
        halved = dataclasses.replace(workload, section=section)
        yield f"deepspeed.train_micro_batch_size_per_gpu: {micro // 2}", tried(halved)
    stages = 2 * workload.plan.num_stages
    if stages <= workload.anatomy.num_layers:
        scpl = workload.scpl.model_copy(update={"stages": stages, "partition": "parameters"})
        plan = plan_stages(workload.anatomy, scpl, num_labels=workload.config.num_labels)
        deeper = dataclasses.replace(workload, scpl=scpl, plan=plan)
        yield f"scpl.stages: {stages} on as many ranks", tried(deeper)
        more = 2 * pipeline_ranks
        yield f"scpl.stages: {stages} on {more * dp_size} ranks", tried(deeper, more)


def describe(
    workload: Workload, *, pipeline_ranks: int, dp_size: int, memory: int | None = None
) -> str:
    """What ``scpl-ds plan`` says about memory: the ranks and, given the memory of a device, what
    fits. A workload that cannot be predicted is said to be so, and is no error."""
    ranks = {"pipeline_ranks": pipeline_ranks, "dp_size": dp_size}
    try:
        text = render_ranks(predict(workload, **ranks), workload)
        if memory is not None:
            choices = fitting(workload, **ranks)
            text += "\n\n" + render_fitting(choices, workload, memory=memory, **ranks)
    except ScplError as error:
        return f"memory is not predicted: {error}"
    return text


def compare(workload: Workload, measured: Sequence[int], pipeline_ranks: int, dp_size: int) -> str:
    """Measured peaks beside predicted ones, a line per rank of the run.

    Args:
        workload: What was trained.
        measured: Bytes by global rank.
        pipeline_ranks: Ranks along the pipeline.
        dp_size: Data-parallel ranks of each stage.
    """
    try:
        ranks = predict(workload, pipeline_ranks=pipeline_ranks, dp_size=dp_size)
    except ScplError as error:
        found = ", ".join(show_size(size) for size in measured)
        return f"peak memory by rank: {found}; it is not predicted: {error}"
    lines = [["rank", "predicted peak", "measured peak", "measured / predicted"]]
    for number, size in enumerate(measured):
        predicted = ranks[number // dp_size].peak
        lines.append(
            [str(number), show_size(predicted), show_size(size), f"{size / max(1, predicted):.2f}"]
        )
    return "\n".join(["memory during training", *_aligned(lines)])


def _backend(workload: Workload) -> str:
    section, name = workload.section, workload.scpl.sharding
    stages = workload.scpl.zero_stages or (section.zero_stage,)
    zero = f" ZeRO-{'/'.join(map(str, stages))}" if name not in ("none", "ddp") else ""
    offloaded = [what for what in ("optimizer", "param") if section.offload(what)]
    return f"{name}{zero}" + (f" + {' and '.join(offloaded)} offload" if offloaded else "")


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
