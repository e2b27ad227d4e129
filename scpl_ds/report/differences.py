"""What tells runs apart: the settings in which their recipes differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scpl_ds.report.reading import RunFiles

UNSET = "not set"
_ELSEWHERE = ("train.output_dir", "train.run_name", "train.export_dir", "trackers")
"""Where a run lies and what it is called is said by its name."""
_NAMED, _LONGEST = 3, 60


class Difference(NamedTuple):
    """One setting, and its value in each run."""

    key: str
    values: list[str]


def differences(runs: Sequence[RunFiles]) -> list[Difference]:
    """In the order of the recipes; nothing where they are alike."""
    flat = [dict(_flat(run.recipe)) | _ranks(run) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    found = [Difference(key, [each.get(key, UNSET) for each in flat]) for key in keys]
    return [each for each in found if len(set(each.values)) > 1]


def in_words(found: Sequence[Difference]) -> list[str]:
    """Of each run the settings that most of the others do not share: ``polish 0.1, seed 3``. Where
    no value is that of the majority, all say theirs."""
    if not found:
        return []
    last = [each.key.rpartition(".")[2] for each in found]
    words: list[list[str]] = [[] for _ in found[0].values]
    for each, name in zip(found, last, strict=True):
        short = name if last.count(name) == 1 else each.key
        value, count = Counter(each.values).most_common(1)[0]
        common = value if 2 * count > len(each.values) else None
        for own, said in zip(each.values, words, strict=True):
            if own != common:
                said.append(f"{short} {_cut(own)}")
    return [", ".join(s[:_NAMED]) + (", ..." if len(s) > _NAMED else "") for s in words]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if key in _ELSEWHERE:
        return
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, bool):
        yield key, str(value).lower()  # as YAML has it
    else:
        yield key, str(value)


def _ranks(run: RunFiles) -> dict[str, str]:
    ranks = run.about.get("ranks")
    return {} if ranks is None else {"ranks": str(ranks)}


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST else value[: _LONGEST - 3] + "..."
