"""A recipe's training method in a few words: the same in the banner, the report and the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ONE_STAGE = "backpropagation (one stage)"


def method_in_words(scpl: Mapping[str, Any]) -> str:
    """``scpl: supcon, lookahead 1``, of the ``scpl`` section as ``recipe.yaml`` has it.

    The section may be of strangers, and needs no objective to be imported: of one stage whose
    objective is somebody's own class it is not known whether that trains the stage's layers, and
    then the objective is named.
    """
    method, stages = str(scpl.get("method") or "scpl"), scpl.get("stages")
    names, frozen = _objectives(scpl.get("objective")), scpl.get("freeze_stages")
    if method == "bp":
        return "backpropagation" if stages != 1 else ONE_STAGE
    if method == "scpl" and stages == 1 and _task_alone(scpl, names):
        return ONE_STAGE
    only_last = isinstance(frozen, int) and frozen > 0 and frozen + 1 == stages
    if method == "scpl" and only_last and _task_alone(scpl, names):
        return "backpropagation of the last stage, the others frozen"
    words = [f"{method}: {' + '.join(names)}" if names else method]
    if frozen:
        words.append(f"first {frozen} stages frozen" if frozen != 1 else "first stage frozen")
    if ahead := scpl.get("lookahead"):
        words.append(f"lookahead {ahead}")
    if last := scpl.get("polish"):
        share = f"{last:.3g}" if isinstance(last, float) else f"{last}"
        words.append(f"polish {share} (that part of the steps, the last ones, end to end)")
    return ", ".join(words)


def _objectives(objective: Any) -> list[str]:
    parts = objective
    if isinstance(objective, Mapping):
        found = objective.get("parts")
        parts = found if isinstance(found, list) and found else objective
    parts = parts if isinstance(parts, list) else [parts]
    return [str(p.get("name") if isinstance(p, Mapping) else p) for p in parts if p]


def _task_alone(scpl: Mapping[str, Any], names: list[str]) -> bool:
    """Whether the last stage's layers learn from nothing but the task loss."""
    head = scpl.get("head")
    detached = head.get("detach_features") if isinstance(head, Mapping) else None
    if detached is not None:
        return detached is False
    return not any(name == "associated" or ":" in name for name in names)
