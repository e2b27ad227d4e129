"""Timelines of all ranks as a Chrome trace, as a picture and as a table. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from scpl_ds.timeline import ON_DEVICE, Kind, Span

SHARES = (
    "busy", "optimizer", "wait_input", "wait_send", "wait_sync", "data", "other", "bubble_fraction",
)  # fmt: skip


class RankTimeline(NamedTuple):
    """What one rank did, with times of rank 0's clock."""

    rank: int
    stages: tuple[int, ...]
    layers: str
    """``0-2``: of all its stages."""
    next_rank: int | None
    """Whom it sends to."""
    shares: dict[str, float]
    """Of the whole run, from ``timeline.shares``."""
    spans: list[Span]

    @property
    def label(self) -> str:
        word = "stage" if len(self.stages) == 1 else "stages"
        return f"{word} {', '.join(map(str, self.stages))} (layers {self.layers})"


def clock_offsets(
    entered: Sequence[Sequence[float]], left: Sequence[Sequence[float]]
) -> list[tuple[float, float]]:
    """(offset, error) of every rank's clock to rank 0's, seconds, from a few barriers.

    Nobody leaves a barrier before everybody has entered it. On rank 0's clock rank r left at
    ``left[r] - offset``, so ``entered[r] - left[0] <= offset <= left[r] - entered[0]``: every
    barrier gives an interval, all of them the narrowest. The error is half its width, a bound as
    long as the clocks do not drift meanwhile.

    Args:
        entered: Of every rank, its own clock before each barrier.
        left: The same, after each barrier.
    """
    result: list[tuple[float, float]] = []
    for mine_in, mine_out in zip(entered, left, strict=True):
        low = max(a - b for a, b in zip(mine_in, left[0], strict=True))
        high = min(b - a for b, a in zip(mine_out, entered[0], strict=True))
        result.append(((low + high) / 2, abs(high - low) / 2))
    return result


# -- Chrome trace ----------------------------------------------------------------------------

_LETTER: dict[Kind, str] = {
    "data": "load", "receive": "receive", "forward": "F", "send": "send", "backward": "B",
    "step": "step", "sync": "sync",
}  # fmt: skip
# Chrome's own palette; Perfetto colours by the name without its digits.
_CHROME: dict[Kind, str] = {
    "data": "grey", "receive": "terrible", "forward": "rail_response", "send": "bad",
    "backward": "good", "step": "rail_animation", "sync": "terrible",
}  # fmt: skip
_HOST = 0


def name_of(span: Span) -> str:
    """``F 3.0``: forward of micro-batch 0 of the third step (steps count from 1 as in the log)."""
    number = f"{span.step + 1}" if span.micro_batch < 0 else f"{span.step + 1}.{span.micro_batch}"
    return f"{_LETTER[span.kind]} {number}"


def trace(ranks: Sequence[RankTimeline]) -> dict[str, Any]:
    """Trace Event Format: one process a rank; one thread a stage, and one for data and messages.

    Source:
        "Trace Event Format" of Chromium's tracing (github.com/catapult-project/catapult).
    """
    zero = min((span.start for rank in ranks for span in rank.spans), default=0.0)
    events: list[dict[str, Any]] = []
    for each in ranks:
        common = {"ph": "M", "pid": each.rank}
        title = f"rank {each.rank}: {each.label}"
        events.append({**common, "name": "process_name", "args": {"name": title}})
        events.append({**common, "name": "process_sort_index", "args": {"sort_index": each.rank}})
        threads = {_HOST: "data and messages", **{k + 1: f"stage {k}" for k in each.stages}}
        for thread, name in threads.items():
            events.append({**common, "tid": thread, "name": "thread_name", "args": {"name": name}})
        events += [_event(each.rank, span, zero) for span in each.spans]
    return {
        "traceEvents": events + list(_flows(ranks, zero)),
        "displayTimeUnit": "ms",
        "otherData": {str(each.rank): each.shares for each in ranks},
    }


def _event(rank: int, span: Span, zero: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "pid": rank,
        "tid": _thread(span),
        "name": name_of(span),
        "cat": span.kind,
        "cname": _CHROME[span.kind],
        "ts": _microseconds(span.start - zero),
        "dur": _microseconds(span.end - span.start),
        "args": {"step": span.step + 1, "micro_batch": span.micro_batch, "stage": span.stage},
    }


def _flows(ranks: Sequence[RankTimeline], zero: float) -> Iterable[dict[str, Any]]:
    """An arrow from every send to the receive it ended in, where both were kept."""
    received = {
        (each.rank, span.step, span.micro_batch): span
        for each in ranks
        for span in each.spans
        if span.kind == "receive"
    }
    number = 0
    for each in ranks:
        for sent in each.spans:
            taken = received.get((each.next_rank or 0, sent.step, sent.micro_batch))
            if sent.kind != "send" or each.next_rank is None or taken is None:
                continue
            # Inside both slices, or the viewer finds nothing to tie the arrow to.
            arrived = taken.end - min(1e-6, (taken.end - taken.start) / 2)
            common = {"name": "boundary", "cat": "boundary", "id": number, "tid": _HOST}
            yield {
                **common, "ph": "s", "pid": each.rank, "ts": _microseconds(sent.start - zero),
            }  # fmt: skip
            yield {
                **common, "ph": "f", "bp": "e", "pid": each.next_rank,
                "ts": _microseconds(arrived - zero),
            }  # fmt: skip
            number += 1


def _thread(span: Span) -> int:
    """-1 is the rank's own."""
    return span.stage + 1 if span.kind in ON_DEVICE else _HOST


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


# -- picture ---------------------------------------------------------------------------------

_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 190, 110, 64
_LANE, _BOX = 38, 26
_BOXES_WIDE = 10
"""About so many micro-batches are shown: more would be too narrow for their numbers."""
_CHARACTER = 6.2
_KINDS: dict[Kind, tuple[str, str]] = {
    "forward": ("forward", "#3b82f6"),
    "backward": ("backward", "#16a34a"),
    "step": ("optimizer step", "#a855f7"),
    "receive": ("waiting for input", "#ef4444"),
    "sync": ("waiting for all", "#be123c"),
    "send": ("packing, waiting to send", "#f59e0b"),
    "data": ("data", "#64748b"),
}
_STYLE = """
  text { font: 11px system-ui, sans-serif; fill: #24292f; }
  .in { fill: #ffffff; text-anchor: middle; }
  .right { text-anchor: end; }
  .title { font-size: 14px; font-weight: 600; }
  .grid { stroke: #8b949e; stroke-opacity: .35; }
  .lane { fill: #8b949e; fill-opacity: .14; }
  @media (prefers-color-scheme: dark) { text { fill: #d1d7e0; } .in { fill: #ffffff; } }
""" + "".join(f"  .{kind} {{ fill: {colour}; }}\n" for kind, (_, colour) in _KINDS.items())


def svg(ranks: Sequence[RankTimeline], *, title: str = "") -> str:
    """A few steps from the middle of what was kept, one lane a stage (a rank's own, if several
    ranks share the stage), and at the right what each rank's bubble was over the whole run."""
    begin, end, first, last = _window(ranks)
    several = any(span.micro_batch > 0 for each in ranks for span in each.spans)
    scale = (_WIDTH - _LEFT - _RIGHT) / ((end - begin) or 1.0)
    shared = len({k for each in ranks for k in each.stages}) < sum(len(r.stages) for r in ranks)
    lanes = sorted((k, each.rank) for each in ranks for k in each.stages)
    row = {lane: _TOP + _LANE * number for number, lane in enumerate(lanes)}
    bottom = _TOP + _LANE * len(lanes)
    shown = f"step {first + 1}" if first == last else f"steps {first + 1} to {last + 1}"
    heading = f"{title}: {shown}" if title else shown
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + 34}" '
        f'width="{_WIDTH}" height="{bottom + 34}" role="img">',
        f"<title>{escape(heading)}</title>",
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="10" y="22">{escape(heading)}</text>',
        f'<text class="right" x="{_WIDTH - 10}" y="{_TOP - 10}">bubble, whole run</text>',
        *_legend(),
        *_axis(begin, end, scale, bottom),
    ]
    for each in ranks:
        for k in each.stages:
            y = row[k, each.rank]
            label = f"stage {k}, rank {each.rank}" if shared else f"stage {k}"
            layers = f" (layers {each.layers})" if len(each.stages) == 1 else ""
            parts.append(
                f'<rect class="lane" x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - _RIGHT}" '
                f'height="{_BOX}"/><text x="10" y="{y + 17}">{escape(label + layers)}</text>'
            )
        bubble = f"{100 * each.shares['bubble_fraction']:.1f} %"
        y = row[each.stages[0], each.rank] + 17
        parts.append(f'<text class="right bubble" x="{_WIDTH - 10}" y="{y}">{bubble}</text>')
        for span in each.spans:
            if span.end > begin and span.start < end:
                y = row[_lane(span, each), each.rank]
                parts += _box(span, y, begin, end, scale, several=several)
    return "\n".join([*parts, "</svg>", ""])


def _window(ranks: Sequence[RankTimeline]) -> tuple[float, float, int, int]:
    """From when to when, and the steps that lie in it, 0-based, first and last."""
    computed = [s for each in ranks for s in each.spans if s.kind in ON_DEVICE]
    if not computed:
        return 0.0, 1.0, 0, 0
    steps = sorted({span.step for span in computed})
    micro_batches = 1 + max(span.micro_batch for span in computed)
    count = min(len(steps), max(1, _BOXES_WIDE // micro_batches))
    at = (len(steps) - count) // 2
    first, last = steps[at], steps[at + count - 1]
    inside = [span for span in computed if first <= span.step <= last]
    return min(s.start for s in inside), max(s.end for s in inside), first, last


def _lane(span: Span, rank: RankTimeline) -> int:
    """The stage whose lane shows it: what a rank sends comes from its last stage."""
    if span.stage in rank.stages:
        return span.stage
    return rank.stages[-1] if span.kind == "send" else rank.stages[0]


def _box(span: Span, y: int, begin: float, end: float, scale: float, *, several: bool) -> list[str]:
    """``several``: there is more than one micro-batch a step, so a number must say which."""
    x = _LEFT + (max(span.start, begin) - begin) * scale
    width = (min(span.end, end) - max(span.start, begin)) * scale
    thin = span.kind not in ON_DEVICE  # a CUDA rank's host may wait while its device computes
    top, height = (y + 8, _BOX - 16) if thin else (y, _BOX)
    words = f"{name_of(span)}, {1e3 * (span.end - span.start):.2f} ms"
    box = (
        f'<rect class="{span.kind}" x="{x:.2f}" y="{top}" width="{max(width, 0.4):.2f}" '
        f'height="{height}"><title>{words}</title></rect>'
    )
    if thin or span.kind == "step":
        return [box]
    step, micro_batch = str(span.step + 1), str(span.micro_batch)
    choice = (f"{step}.{micro_batch}", micro_batch) if several else (step,)
    text = next((t for t in choice if _CHARACTER * len(t) + 4 < width), "")
    if not text:
        return [box]
    return [box, f'<text class="in" x="{x + width / 2:.2f}" y="{y + 17}">{text}</text>']


def _legend() -> Iterable[str]:
    x = _LEFT
    for kind, (words, _) in _KINDS.items():
        yield f'<rect class="{kind}" x="{x}" y="34" width="12" height="12"/>'
        yield f'<text x="{x + 17}" y="44">{words}</text>'
        x += 34 + round(_CHARACTER * len(words))


def _axis(begin: float, end: float, scale: float, bottom: int) -> Iterable[str]:
    """Ticks of 1, 2 or 5 times a power of ten, in ms from the left edge."""
    width_ms = 1e3 * (end - begin) or 1.0
    power = 10.0 ** math.floor(math.log10(width_ms / 8))
    tick = next(m * power for m in (1, 2, 5, 10) if m * power >= width_ms / 8)
    for number in range(int(width_ms / tick) + 1):
        x = _LEFT + number * tick / 1e3 * scale
        yield f'<line class="grid" x1="{x:.1f}" y1="{_TOP - 4}" x2="{x:.1f}" y2="{bottom}"/>'
        yield f'<text x="{x:.1f}" y="{bottom + 16}">{number * tick:g} ms</text>'


# -- table -----------------------------------------------------------------------------------


def render_shares(ranks: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """(name, shares) of every rank as lines of percentages."""
    names = ["rank", *(name for name, _ in ranks)]
    wide = max(len(name) for name in names)
    columns = [*SHARES[:-1], "bubble"]
    lines = [f"{'rank':<{wide}}  " + "  ".join(f"{c:>10}" for c in columns)]
    for name, share in ranks:
        cells = (f"{100 * share[key]:>9.1f}%" for key in SHARES)
        lines.append(f"{name:<{wide}}  " + "  ".join(cells))
    return "\n".join(lines)
