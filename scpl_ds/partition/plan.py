"""Which stage gets which layers, and which pipeline rank gets which stages. Pure arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import Anatomy
from scpl_ds.registry import did_you_mean

METHODS = ("flops", "parameters", "uniform", "time")


class Timing(NamedTuple):
    """Seconds of one micro-batch."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class LayerTimes:
    """What a micro-batch takes in the parts of a model, as ``partition/timing.py`` measures it."""

    layers: tuple[Timing, ...]
    prologue: Timing
    epilogue: Timing
    heads: tuple[Timing, ...]
    """Of a local head on top of each layer."""
    setting: str
    """Shape of the micro-batch, device and type of the numbers: ``8 x 128 on cpu, float32``."""

    def stage(self, first: int, end: int, *, head_on_last: bool) -> float:
        """Seconds of a stage of the layers ``[first, end)``."""
        is_last = end == len(self.layers)
        parts = [
            *self.layers[first:end],
            *([self.prologue] if first == 0 else []),
            *([self.epilogue] if is_last else []),
            *([self.heads[end - 1]] if head_on_last or not is_last else []),
        ]
        return sum(part.total for part in parts)


@dataclasses.dataclass(frozen=True)
class PartitionPlan:
    """A cut of a model's layers into consecutive stages, none of them empty."""

    bounds: tuple[int, ...]
    """K + 1 numbers: stage k owns the layers ``[bounds[k], bounds[k + 1])``."""
    method: str
    """``flops``, ``parameters``, ``uniform``, ``time`` or ``explicit``."""
    head_flops: float = 0.0
    """What a local head costs on every stage that has one; the cost of the cut counts it."""
    head_on_last: bool = False
    """Whether the last stage has a local head too, beside the epilogue."""
    times: LayerTimes | None = None
    """What was measured, where it was."""

    @property
    def num_stages(self) -> int:
        return len(self.bounds) - 1

    def span(self, stage: int) -> tuple[int, int]:
        """First layer of a stage, and one past its last."""
        return self.bounds[stage], self.bounds[stage + 1]

    def stage_flops(self, anatomy: Anatomy) -> list[float]:
        """Forward FLOPs of each stage for one sample of ``anatomy.sequence_length`` tokens."""
        costs = _flop_costs(anatomy, self.num_stages, self.head_flops, self.head_on_last)
        return [costs(k, *self.span(k)) for k in range(self.num_stages)]

    def stage_parameters(self, anatomy: Anatomy) -> list[int]:
        """Parameters that each stage holds, heads of local objectives not counted."""
        costs = _parameter_costs(anatomy, self.num_stages)
        return [int(costs(k, *self.span(k))) for k in range(self.num_stages)]

    def stage_seconds(self) -> list[float] | None:
        """Forward and local backward of one micro-batch on each stage, where it was measured."""
        if self.times is None:
            return None
        spans = itertools.pairwise(self.bounds)
        return [self.times.stage(*span, head_on_last=self.head_on_last) for span in spans]

    def rows(
        self, anatomy: Anatomy, *, pipeline_ranks: int | None = None, data_parallel: int = 1
    ) -> list[dict[str, Any]]:
        """One mapping per stage: ``stage, layers, holds, parameters, flops, flops_share, ranks``,
        and ``seconds`` where they were measured.

        Args:
            anatomy: The model that was cut.
            pipeline_ranks: Ranks along the pipeline; None is one per stage.
            data_parallel: Ranks that share a stage; rank = pipeline coordinate x this + dp rank.
        """
        owners = stages_of_rank(self.num_stages, pipeline_ranks or self.num_stages)
        flops, parameters = self.stage_flops(anatomy), self.stage_parameters(anatomy)
        seconds = self.stage_seconds()
        total = sum(flops) or 1.0
        rows: list[dict[str, Any]] = []
        for k in range(self.num_stages):
            start, end = self.span(k)
            pp = next(i for i, stages in enumerate(owners) if k in stages)
            first, last = pp * data_parallel, (pp + 1) * data_parallel - 1
            holds = [*(["prologue"] if k == 0 else []), _count(end - start, "layer")]
            holds += ["epilogue"] if k == self.num_stages - 1 else []
            rows.append(
                {
                    "stage": k,
                    "layers": f"{start}-{end - 1}" if end - start > 1 else f"{start}",
                    "holds": " + ".join(holds),
                    "parameters": parameters[k],
                    "flops": flops[k],
                    "flops_share": flops[k] / total,
                    "ranks": f"{first}-{last}" if last > first else f"{first}",
                    **({} if seconds is None else {"seconds": seconds[k]}),
                }
            )
        return rows


def make_plan(
    anatomy: Anatomy,
    num_stages: int,
    method: str | Sequence[Sequence[int]] = "flops",
    head_flops: float = 0.0,
    head_on_last: bool = False,
    times: LayerTimes | None = None,
) -> PartitionPlan:
    """Cut a model into ``num_stages`` consecutive, non-empty stages.

    ``flops`` and ``parameters`` make the most expensive stage as cheap as possible (and among those
    cuts take the evenest one), prologue and epilogue counted; ``time`` does so with ``times``;
    ``uniform`` gives every stage the same number of layers, the first ones one more. An embedding
    costs parameters but no FLOPs.

    Args:
        anatomy: The model.
        num_stages: K.
        method: One of the four, or a list of ``[first, one past last]`` per stage.
        head_flops: Forward FLOPs of a local head, for one sample of ``anatomy.sequence_length``
            tokens. Counted for every stage but the last, whose head is the epilogue.
        head_on_last: Count it for the last stage too (``scpl.head.detach_features`` is not false).
        times: What ``time`` cuts by.

    Raises:
        PartitionError: More stages than layers, fewer than one, an unknown method, ``time`` without
            times, or a list that does not cover the layers in order.
    """
    layers = anatomy.num_layers
    if num_stages < 1:
        raise PartitionError(f"scpl.stages must be at least 1, got {num_stages}.")
    if num_stages > layers:
        raise PartitionError(
            f"'{anatomy.model_type}' has {layers} layers, fewer than scpl.stages: {num_stages}. "
            f"Use at most {layers} stages (`scpl-ds plan RECIPE scpl.stages={layers}` shows the "
            "split)."
        )
    if not isinstance(method, str):
        bounds = explicit_bounds(layers, num_stages, method)
        return PartitionPlan(bounds, "explicit", head_flops, head_on_last)
    if method == "uniform":
        each, more = divmod(layers, num_stages)
        bounds = tuple(k * each + min(k, more) for k in range(num_stages + 1))
    elif method == "flops":
        costs = _flop_costs(anatomy, num_stages, head_flops, head_on_last)
        bounds = min_max_cut(layers, num_stages, costs)
    elif method == "parameters":
        bounds = min_max_cut(layers, num_stages, _parameter_costs(anatomy, num_stages))
    elif method == "time":
        if times is None:
            raise PartitionError(
                "scpl.partition: time cuts by times that are measured on the run's own device, and "
                "here are none. Use flops, parameters, uniform or ranges such as [[0, 3], [3, 6]]."
            )
        bounds = time_cut(times, num_stages, head_on_last=head_on_last)
    else:
        raise PartitionError(
            f"scpl.partition: unknown method '{method}'{did_you_mean(method, METHODS) or '.'} "
            f"Known: {', '.join(METHODS)}; or a list such as [[0, 3], [3, 6]]."
        )
    return PartitionPlan(bounds, method, head_flops, head_on_last, times)


def time_cut(
    times: LayerTimes,
    num_stages: int,
    *,
    head_on_last: bool,
    learns: Sequence[bool] | None = None,
) -> tuple[int, ...]:
    """Bounds that make the slowest stage as fast as can be.

    ``learns`` says which layers have something to train; every stage gets one of those.
    """

    def cost(_: int, start: int, end: int) -> float:
        if learns is not None and not any(learns[start:end]):
            return math.inf
        return times.stage(start, end, head_on_last=head_on_last)

    return min_max_cut(len(times.layers), num_stages, cost)


def min_max_cut(
    num_layers: int, num_stages: int, cost: Callable[[int, int, int], float]
) -> tuple[int, ...]:
    """Bounds of the cut whose dearest stage is cheapest; among those, the least sum of squares.

    Args:
        num_layers: L, at least ``num_stages``.
        num_stages: K.
        cost: ``cost(stage, start, end)`` of the layers ``[start, end)`` on that stage.

    Returns:
        K + 1 numbers from 0 to L, rising. O(K L^2).
    """

    def best(
        combine: Callable[[float, float], float], limit: float
    ) -> tuple[float, tuple[int, ...]]:
        table: list[tuple[float, tuple[int, ...]] | None] = [None] * (num_layers + 1)
        table[0] = (0.0, (0,))
        for stage in range(num_stages):
            row: list[tuple[float, tuple[int, ...]] | None] = [None] * (num_layers + 1)
            for end in range(stage + 1, num_layers - (num_stages - stage - 1) + 1):
                for start in range(stage, end):
                    before, price = table[start], cost(stage, start, end)
                    if before is None or price > limit:
                        continue
                    value = combine(before[0], price)
                    # <=: among equals the latest cut, so that earlier stages get the extra layers
                    if (old := row[end]) is None or value <= old[0]:
                        row[end] = (value, (*before[1], end))
            table = row
        found = table[num_layers]
        assert found is not None
        return found

    worst, _ = best(max, float("inf"))
    return best(lambda total, price: total + float(price) ** 2, worst)[1]


def stages_of_rank(num_stages: int, pipeline_ranks: int) -> list[range]:
    """The consecutive stages of each pipeline rank: as many for each, the first ranks one more.

    Raises:
        PartitionError: More ranks than stages, or fewer than one.
    """
    if not 1 <= pipeline_ranks <= num_stages:
        raise PartitionError(
            f"scpl.pipeline_ranks: {pipeline_ranks} does not fit scpl.stages: {num_stages}. "
            f"Use 1 to {num_stages}; several stages may share a rank, one stage cannot be on two."
        )
    each, more = divmod(num_stages, pipeline_ranks)
    starts = [r * each + min(r, more) for r in range(pipeline_ranks + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def render_plan(
    plan: PartitionPlan,
    anatomy: Anatomy,
    *,
    pipeline_ranks: int | None = None,
    data_parallel: int = 1,
) -> str:
    """The table that ``scpl-ds plan`` prints, without a final newline."""
    rows = plan.rows(anatomy, pipeline_ranks=pipeline_ranks, data_parallel=data_parallel)
    total = sum(row["parameters"] for row in rows)
    header = ["stage", "layers", "holds", "parameters", "forward FLOPs", "share", "ranks"]
    timed = plan.times is not None
    cells = [header + (["time"] if timed else [])] + [
        [
            str(row["stage"]),
            row["layers"],
            row["holds"],
            _short(row["parameters"]),
            _short(row["flops"]),
            f"{row['flops_share']:.1%}",
            row["ranks"],
            *([f"{row['seconds'] * 1e3:.3g} ms"] if timed else []),
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    right = {3, 4, 5, 7}
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    title = (
        f"{anatomy.model_type}: {_count(anatomy.num_layers, 'layer')} in "
        f"{_count(plan.num_stages, 'stage')}, cut by {plan.method}, {_short(total)} parameters, "
        f"FLOPs of {anatomy.sequence_length} tokens"
    )
    if plan.times is not None:
        spans = [list(plan.span(k)) for k in range(plan.num_stages)]
        lines.append(f"time: forward and backward of {plan.times.setting}; this cut: {spans}")
    return "\n".join([title, *(line.rstrip() for line in lines)])


def _flop_costs(
    anatomy: Anatomy, num_stages: int, head: float, head_on_last: bool
) -> Callable[[int, int, int], float]:
    epilogue = anatomy.epilogue_flops + (head if head_on_last else 0.0)
    return _costs(anatomy.layer_flops, anatomy.prologue_flops, epilogue, num_stages, head)


def _parameter_costs(anatomy: Anatomy, num_stages: int) -> Callable[[int, int, int], float]:
    epilogue = anatomy.epilogue_parameters - (anatomy.tied_parameters if num_stages == 1 else 0)
    return _costs(anatomy.layer_parameters, anatomy.prologue_parameters, epilogue, num_stages, 0.0)


def _costs(
    layers: Sequence[int], prologue: float, epilogue: float, num_stages: int, head: float
) -> Callable[[int, int, int], float]:
    sums = [0]
    for layer in layers:
        sums.append(sums[-1] + layer)

    def cost(stage: int, start: int, end: int) -> float:
        first, last = stage == 0, stage == num_stages - 1
        return sums[end] - sums[start] + (prologue if first else 0) + (epilogue if last else head)

    return cost


def explicit_bounds(
    layers: int, num_stages: int, spans: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    written = [list(span) for span in spans]
    if len(written) != num_stages:
        raise PartitionError(
            f"scpl.partition lists {len(written)} stages, but scpl.stages is {num_stages}. "
            f"Set scpl.stages: {len(written)}, or list {num_stages} spans."
        )
    at = 0
    for k, span in enumerate(written):
        if len(span) != 2 or span[0] != at or span[1] <= at:
            raise PartitionError(
                f"scpl.partition: stage {k} is {span}, but it must be [{at}, n] with n > {at}: "
                f"spans [first, one past last] must cover layers 0 to {layers} in order, without "
                "gaps."
            )
        at = span[1]
    if at != layers:
        raise PartitionError(
            f"scpl.partition ends at layer {at}, but the model has {layers} layers. "
            f"End the last span at {layers}."
        )
    return (0, *(span[1] for span in written))


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _short(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"
