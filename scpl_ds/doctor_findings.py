"""What ``scpl-ds doctor`` says of one thing it looked at, and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

Level = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    level: Level
    found: str
    do: str = ""
    """What mends it; empty where nothing has to be done."""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, do: str) -> Finding:
    """A run works, but slower, or not with everything."""
    return Finding(check, "warning", found, do)


def problem(check: str, found: str, do: str) -> Finding:
    """A run would fail, or be wrong."""
    return Finding(check, "problem", found, do)


@dataclasses.dataclass(frozen=True)
class Grouped:
    """A finding and the ranks that have it."""

    finding: Finding
    ranks: tuple[int, ...]


def grouped(by_rank: Sequence[Iterable[Finding]]) -> list[Grouped]:
    """Findings of all ranks, equal ones once, in the order of the checks."""
    ranks: dict[Finding, list[int]] = {}
    order: dict[str, int] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
            order.setdefault(finding.check, len(order))
    found = [Grouped(finding, tuple(where)) for finding, where in ranks.items()]
    return sorted(found, key=lambda one: (order[one.finding.check], one.ranks))


def render(found: Sequence[Grouped], world_size: int) -> str:
    """A line for each finding, and what to do below it; the sum at the end."""
    width = max((len(one.finding.check) for one in found), default=0)
    lines = []
    for one in found:
        finding = one.finding
        where = "" if len(one.ranks) == world_size else f" [{_ranks(one.ranks)}]"
        lines.append(f"{finding.level:<8} {finding.check:<{width}}  {finding.found}{where}")
        if finding.do:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.do}")
    counts = {level: sum(one.finding.level == level for one in found) for level in LEVELS}
    words = [f"{number} {level}{'s' * (number != 1)}" for level, number in counts.items() if number]
    if counts["problem"]:
        end = "a run would fail or be wrong"
    else:
        end = "nothing that keeps a run from working"
    return "\n".join([*lines, "", f"{', '.join(words) or 'all ok'}: {end}."])


LEVELS: tuple[Level, ...] = ("problem", "warning")


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    whole = list(range(ranks[0], ranks[-1] + 1)) == list(ranks)
    return f"ranks {ranks[0]}-{ranks[-1]}" if whole else f"ranks {', '.join(map(str, ranks))}"
