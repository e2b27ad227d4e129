"""Predicted throughput on 2 to 1024 GPUs, from times that were measured on one device.

Nothing here is measured: each method gets the split of the GPUs (stages x copies, micro-batch) that
is fastest for it, and its step is simulated. ``docs/scaling.md`` says in formulas what is counted
and what is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scpl_ds.bench.systems import model_folder
from scpl_ds.build_times import Stopwatch
from scpl_ds.distributed.world import RankEnv, pick_device
from scpl_ds.errors import RecipeError, ScheduleError
from scpl_ds.meter_machine import describe_machine
from scpl_ds.partition.anatomy import Anatomy, anatomy_of
from scpl_ds.partition.config import load_config
from scpl_ds.partition.timing import REPEATS, now, random_stages
from scpl_ds.recipe import recipe_from_ds_config
from scpl_ds.schedules import (
    Priorities,
    Schedule,
    interleaved,
    looped,
    one_f_one_b,
    simulate,
    stream,
    zero_bubble,
)

GPUS = tuple(2**n for n in range(1, 11))
PIPELINES = ("scpl stream", "1F1B", "interleaved 1F1B", "ZB-H1")
WHOLE = ("DDP or ZeRO-1", "FSDP")
_STEPS = 2
_ENOUGH = 8
"""Micro-batches per stage beyond which more of them are not tried: the bubble is small by then."""


class Cost(NamedTuple):
    """Seconds of one piece of work: ``fixed + each x samples``."""

    fixed: float
    each: float

    def of(self, samples: float) -> float:
        return self.fixed + self.each * samples


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A model of equal layers, one kind of device, one network."""

    layers: int
    forward: Cost
    """Of a layer."""
    backward: Cost
    head: Cost
    """Of a local objective, forward and backward."""
    step: float
    """Seconds of an optimizer step over one layer's parameters."""
    parameter_bytes: float
    """Of one layer, as they are sent: gradients have as many."""
    boundary_bytes: float
    """Of one sample's hidden states."""
    bandwidth: float
    """Bytes per second that a device sends, and receives meanwhile."""
    latency: float
    """Seconds until a message begins to arrive."""
    global_batch: int
    micro_batch: int
    """The most samples that a device computes at once."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Inputs:
        """From JSON, a cost as ``[fixed, each]``."""
        costs = {k: Cost(*values[k]) for k in ("forward", "backward", "head")}
        return cls(**{**values, **costs})


class Prediction(NamedTuple):
    """The fastest split of one method."""

    samples_per_s: float
    stages: int
    copies: int
    micro_batch: int


class Row(NamedTuple):
    """All methods on one number of GPUs; None: the global batch has too few samples for it."""

    gpus: int
    methods: dict[str, Prediction | None]

    @property
    def fsdp_is_better(self) -> bool:
        """Whether data parallelism, sharded or not, is at least as fast as ``scpl stream``."""
        return self._best(WHOLE) >= self._best(PIPELINES[:1])

    def verdict(self) -> str:
        ours, whole = self._best(PIPELINES[:1]), self._best(WHOLE)
        if self.fsdp_is_better:
            name = max(WHOLE, key=lambda name: self._best([name]))
            return f"{name} ({whole / ours:.2f} x scpl)" if ours else name
        return f"scpl ({ours / whole:.2f} x)" if whole else "scpl; no data parallelism"

    def _best(self, names: Sequence[str]) -> float:
        found = [self.methods[name] for name in names]
        return max((p.samples_per_s for p in found if p is not None), default=0.0)


def main(args: argparse.Namespace, save: Callable[[Any], None]) -> str:
    """The command: the inputs as JSON, and the table.

    Raises:
        RecipeError: The file of ``--inputs`` does not hold what is needed.
    """
    inputs = _read(args.inputs) if args.inputs is not None else _measured(args)
    given, rows = dataclasses.asdict(inputs), predict(inputs)
    save({"machine": describe_machine(), "inputs": given, "rows": [_as_data(row) for row in rows]})
    return f"{json.dumps(given)}\n\n{render(rows)}"


def _as_data(row: Row) -> dict[str, Any]:
    methods = {n: p and p._asdict() | {"measured": False} for n, p in row.methods.items()}
    return {"gpus": row.gpus, "verdict": row.verdict(), "methods": methods}


def _read(file: Path) -> Inputs:
    try:
        return Inputs.from_mapping(json.loads(file.expanduser().read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Inputs))
        raise RecipeError(
            f"--inputs {file}: {type(error).__name__}: {error}. It must be a JSON object with "
            f"{fields}, as `scpl-ds bench predict` prints it."
        ) from error


def _measured(args: argparse.Namespace) -> Inputs:
    """Times of one thread or one GPU of this machine."""
    torch.set_num_threads(1)
    scpl, section = recipe_from_ds_config(
        {
            "train_micro_batch_size_per_gpu": args.micro_batch_size,
            "optimizer": {"type": "AdamW"},
            "scpl": {"stages": 1, "sharding": "none"},
        }
    )
    with tempfile.TemporaryDirectory(prefix="scpl-bench-") as folder:
        config = load_config(model_folder(args.model, Path(folder)), num_labels=2)
    return measure(
        config,
        Stopwatch(scpl, section, pick_device(RankEnv())),
        sequence_length=args.seq,
        bandwidth=args.gbit * 1e9 / 8,
        latency=_short(args.latency_us * 1e-6),
        global_batch=args.global_batch,
    )


def predict(inputs: Inputs, gpus: Sequence[int] = GPUS) -> list[Row]:
    """Predicted samples/s of every method on every number of GPUs, the global batch fixed.

    Raises:
        ScheduleError: A number that must be positive is not.
    """
    for field in ("layers", "bandwidth", "global_batch", "micro_batch"):
        if not getattr(inputs, field) > 0:
            raise ScheduleError(f"{field} must be greater than 0, got {getattr(inputs, field)}.")
    return [
        Row(
            n,
            {name: _best(_pipelines(inputs, name, n)) for name in PIPELINES}
            | {name: _best(_data_parallel(inputs, name, n)) for name in WHOLE},
        )
        for n in gpus
    ]


def render(rows: Sequence[Row]) -> str:
    """A Markdown table: samples/s, and in brackets stages x copies at which micro-batch."""
    names = [*PIPELINES, *WHOLE]
    lines = [
        f"| GPUs | {' | '.join(names)} | better of scpl and data parallel |",
        f"|---|{'---|' * (len(names) + 1)}",
    ]
    for row in rows:
        cells = [_cell(row.methods[name]) for name in names]
        lines.append(f"| {row.gpus} | {' | '.join(cells)} | {row.verdict()} |")
    return "\n".join(["Predicted samples/s (stages x copies, micro-batch):", "", *lines])


def _cell(found: Prediction | None) -> str:
    if found is None:
        return "-"
    split = f"{found.stages} x {found.copies}, {found.micro_batch}"
    speed = found.samples_per_s
    return f"{speed:,.0f} ({split})" if speed >= 100 else f"{speed:.3g} ({split})"


def _best(found: Iterator[Prediction]) -> Prediction | None:
    return max(found, key=lambda p: p.samples_per_s, default=None)


def _pipelines(inputs: Inputs, name: str, gpus: int) -> Iterator[Prediction]:
    most = inputs.layers // 2 if name == "interleaved 1F1B" else 1
    for virtual, ranks in itertools.product(range(min(most, 2), most + 1), range(2, gpus + 1)):
        copies, rest = divmod(gpus, ranks)
        if rest or inputs.global_batch % copies or ranks * virtual > inputs.layers:
            continue
        choices = _micro_batches(inputs, inputs.global_batch // copies, ranks)
        if name == "scpl stream":
            choices = [next(choices)]  # it has no bubble that smaller ones could fill
        for micro, count in choices:
            period = max(
                _period(inputs, name, ranks, virtual, copies, micro, count),
                _sending(inputs, name, ranks, virtual, copies),
            )
            yield Prediction(inputs.global_batch / period, ranks, copies, micro)


def _sending(inputs: Inputs, name: str, ranks: int, virtual: int, copies: int) -> float:
    """Seconds that a rank in the middle sends in a step: a link carries one message at a time."""
    ways = 1 if name == "scpl stream" else 2  # to the next rank, and gradients to the one before
    messages = ways * virtual * inputs.global_batch / copies * inputs.boundary_bytes
    parameters = inputs.layers / ranks * inputs.parameter_bytes
    return messages / inputs.bandwidth + _ring(inputs, 2, parameters, copies)


def _micro_batches(inputs: Inputs, samples: int, ranks: int) -> Iterator[tuple[int, int]]:
    """(size, number) that make up ``samples`` of one copy: the largest, and smaller ones as long as
    more of them can fill a pipeline better."""
    sizes = [m for m in range(min(inputs.micro_batch, samples), 0, -1) if samples % m == 0]
    for size in sizes:
        if size == sizes[0] or samples // size <= _ENOUGH * ranks:
            yield size, samples // size


def _period(
    inputs: Inputs, name: str, ranks: int, virtual: int, copies: int, micro: int, count: int
) -> float:
    """Seconds from the end of one step to the end of the next, after the fill.

    Once a pipeline is full, each further group of micro-batches takes as long as the one before.
    """
    if count > 5 * ranks:
        few = 4 * ranks + count % ranks
        short, longer = (
            _period(inputs, name, ranks, virtual, copies, micro, n) for n in (few, few + ranks)
        )
        return short + (count - few) / ranks * (longer - short)
    stages = ranks * virtual
    each, more = divmod(inputs.layers, stages)
    sizes = [each + (k < more) for k in range(stages)]
    backward = inputs.backward.of(micro)
    # Gradients of a stage are averaged over its copies while the last micro-batch goes backward.
    step = [
        n * inputs.step
        + max(0.0, _ring(inputs, 2, n * inputs.parameter_bytes, copies) - n * backward)
        for n in sizes
    ]
    local = name == "scpl stream"
    schedule: Schedule | Priorities = {
        "scpl stream": stream, "1F1B": one_f_one_b,
        "interleaved 1F1B": interleaved, "ZB-H1": zero_bubble,
    }[name]  # fmt: skip
    slots = simulate(
        schedule,
        stages,
        count,
        forward=[n * inputs.forward.of(micro) for n in sizes],
        backward=[n * backward for n in sizes],
        head=[inputs.head.of(micro) if local and k < stages - 1 else 0.0 for k in range(stages)],
        step=step,
        message=inputs.latency + micro * inputs.boundary_bytes / inputs.bandwidth,
        num_steps=_STEPS,
        gradients_travel_back=not local,
        placement=looped(stages, ranks),
    )
    ends = [0.0] * _STEPS
    for slot in slots:
        at = slot.micro_batch // count
        ends[at] = max(ends[at], slot.end)
    return ends[-1] - ends[-2]


def _data_parallel(inputs: Inputs, name: str, gpus: int) -> Iterator[Prediction]:
    """No stages: every GPU computes all layers on its share of the batch."""
    if inputs.global_batch % gpus:
        return
    samples, layers = inputs.global_batch // gpus, inputs.layers
    ring = functools.partial(_ring, inputs, devices=gpus)
    for micro, count in _micro_batches(inputs, samples, 1):
        forward, backward = layers * inputs.forward.of(micro), layers * inputs.backward.of(micro)
        if name != "FSDP":
            # Averaged behind the last backward; or scattered there, and gathered after a step of
            # one share each (ZeRO-1).
            once = ring(1, layers * inputs.parameter_bytes)
            step = layers * inputs.step
            plain = max(0.0, 2 * once - backward) + step
            sharded = max(0.0, once - backward) + step / gpus + once
            period = count * (forward + backward) + min(plain, sharded)
        else:
            gather = layers * ring(1, inputs.parameter_bytes)
            ahead = max(forward, gather)
            back = max(backward, 2 * gather)  # gathered again, and gradients scattered
            ends = 2 * gather / layers  # the first layer's gather and the last one's scatter
            period = count * (ahead + back + ends) + layers * inputs.step / gpus
        yield Prediction(inputs.global_batch / period, 1, gpus, micro)


def _ring(inputs: Inputs, passes: int, size: float, devices: int) -> float:
    """Seconds of a collective: one pass gathers or scatters ``size`` bytes, two average them. Every
    byte goes once through each device; messages are started log2(devices) times, as NCCL's trees
    do."""
    if devices == 1:
        return 0.0
    share = (devices - 1) / devices
    return passes * (share * size / inputs.bandwidth + math.log2(devices) * inputs.latency)


def measure(
    config: Any,
    stopwatch: Stopwatch,
    *,
    sequence_length: int,
    bandwidth: float,
    latency: float,
    global_batch: int,
) -> Inputs:
    """Inputs of a sequence classifier, measured here with random weights.

    A cost is the line through its times at the stopwatch's micro-batch and at a quarter of it. The
    network is not measured: ``bandwidth`` (bytes/s) and ``latency`` (s) are what is assumed.
    """
    task = "sequence-classification"
    anatomy = anatomy_of(config, task)
    most = stopwatch.micro_batch
    rows = (max(1, most // 4), most)
    found = [
        dataclasses.replace(stopwatch, rows=n).config(
            config, task, anatomy, sequence_length=sequence_length
        )
        for n in rows
    ]
    inner = anatomy.num_layers // 2

    def line(seconds: Sequence[float]) -> Cost:
        each = max(0.0, (seconds[1] - seconds[0]) / max(1, rows[1] - rows[0]))
        return Cost(_short(max(0.0, seconds[1] - each * rows[1])), _short(each))

    itemsize = stopwatch.setting.dtype.itemsize
    return Inputs(
        layers=anatomy.num_layers,
        forward=line([times.layers[inner].forward for times in found]),
        backward=line([times.layers[inner].backward for times in found]),
        head=line([times.heads[inner].total for times in found]),
        step=_short(_step_time(config, task, anatomy, stopwatch, inner)),
        parameter_bytes=anatomy.layer_parameters[inner] * itemsize,
        boundary_bytes=sequence_length * anatomy.hidden_size * itemsize,
        bandwidth=bandwidth,
        latency=latency,
        global_batch=global_batch,
        micro_batch=most,
    )


def _short(seconds: float) -> float:
    """No more digits than were measured."""
    return float(f"{seconds:.3g}")


def _step_time(config: Any, task: str, anatomy: Anatomy, stopwatch: Stopwatch, layer: int) -> float:
    make_stage, _ = random_stages(config, task, anatomy, stopwatch.setting)
    parameters = list(make_stage(layer).parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True)  # as optim.build_optimizer
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def one() -> float:
        begin = now(stopwatch.device)
        optimizer.step()
        return now(stopwatch.device) - begin

    one()  # makes the moments
    return min(one() for _ in range(REPEATS))
