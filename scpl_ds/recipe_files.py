"""Reading recipe files (YAML or JSON, no duplicate keys) and applying ``a.b.c=value`` overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scpl_ds.errors import RecipeError
from scpl_ds.problems import Problem, show

_NAME_ONLY = ("data", "scpl.objective")
"""Sections that may be written as a name alone; an override below them makes them a mapping."""

_LONGEST, _DEEPEST, _MOST = 2**18, 32, 100_000
"""Characters of a file, levels and values: what is beyond is no recipe, and would take minutes."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (PyYAML keeps the last in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"key '{key}' is written twice, first in line {seen[key]}",
                        key_node.start_mark,
                    )
                seen[key] = line
        return super().construct_mapping(node, deep=deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML or JSON file holds (JSON is YAML, tabs aside).

    Raises:
        RecipeError: No such file, not readable, broken, empty, or not a mapping; with the place.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path} does not exist (looked in {Path.cwd()}).") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path} is a folder; name a YAML or JSON file.") from error
    except (OSError, ValueError) as error:  # not UTF-8, or no name for a file
        raise RecipeError(f"{path} cannot be read: {error}.") from error
    if len(text) > _LONGEST:
        raise RecipeError(
            f"{path} is no recipe: it has {len(text)} characters, the longest are {_LONGEST}."
        )
    if path.suffix == ".json":
        text = text.expandtabs(2)
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {_place(error)}.") from error
    if value is None:
        raise RecipeError(f"{path} is empty; start from a file in recipes/.")
    if not isinstance(value, dict):
        raise RecipeError(f"{path} must hold a mapping of sections, got {show(value)}.")
    return {str(k): v for k, v in value.items()}


def _parse(text: str) -> Any:
    """
    Raises:
        YAMLError: It is no YAML, or holds what is written in a few lines and takes all memory.
    """
    try:
        value = yaml.load(text, _StrictLoader)
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep") from None
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        # PyYAML lets its constructors' own through: `2026-13-45` is no date, `!!int x` no number.
        raise yaml.YAMLError(f"a value is not what it looks like: {error}") from error
    left, count = [(value, 0)], 0
    while left:
        item, depth = left.pop()
        count += 1
        if depth > _DEEPEST:  # as an alias inside its own anchor is
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST} deep")
        if count > _MOST:
            raise yaml.YAMLError(f"with its aliases written out it has more than {_MOST} values")
        if isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                raise yaml.YAMLError(f"{item!r} holds half of a surrogate pair") from None
        elif isinstance(item, dict):
            left += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set):
            left += [(part, depth + 1) for part in item]
    return value


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> list[Problem]:
    """Set ``a.b.c`` to the YAML value for every ``a.b.c=value``, in order, in place.

    List items are named by number or by their ``name``. Overriding ``train.save_steps`` alone also
    sets ``train.save_strategy: steps``, whatever the file says; the same for ``eval``.

    Returns:
        What could not be applied.
    """
    problems: list[Problem] = []
    keys: set[str] = set()
    for text in overrides:
        key, equals, value_text = text.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not key or not all(key.split(".")):
            message = f"override '{text}': expected key=value, such as scpl.stages=3"
            problems.append(Problem("", message))
            continue
        try:
            value = _parse(value_text)
        except yaml.YAMLError as error:
            problems.append(Problem(key, f"'{value_text}' is not valid YAML: {_place(error)}"))
            continue
        if (problem := _put(raw, key, value)) is not None:
            problems.append(problem)
        keys.add(key)
    train = raw.get("train")
    for what in ("save", "eval"):
        steps, strategy = f"train.{what}_steps", f"{what}_strategy"
        if steps in keys and f"train.{strategy}" not in keys and isinstance(train, dict):
            train.pop(strategy, None)
    return problems


def _put(raw: dict[str, Any], key: str, value: Any) -> Problem | None:
    *parents, last = key.split(".")
    current: Any = raw
    walked: list[str] = []
    for part in parents:
        walked.append(part)
        inner = _child(current, part)
        if inner is None and isinstance(current, dict):
            inner = {}
        elif isinstance(inner, str) and ".".join(walked) in _NAME_ONLY:
            inner = {"name": inner}
        elif isinstance(inner, str) and walked == ["trackers"]:
            inner = [inner]
        elif isinstance(inner, Mapping):
            inner = dict(inner)  # a mapping of the caller's stays as it is
        elif isinstance(inner, list):
            inner = list(inner)
        else:
            found = "nothing" if inner is None else show(inner)
            return Problem(key, f"cannot be set: '{'.'.join(walked)}' is {found}, not a mapping")
        _set(current, part, inner)
        current = inner
    if isinstance(current, list) and _index(current, last) is None:
        return Problem(key, f"cannot be set: the list has no item '{last}'")
    _set(current, last, value)
    return None


def _child(container: Any, part: str) -> Any:
    if isinstance(container, list):
        index = _index(container, part)
        item = None if index is None else container[index]
        return {"name": item} if isinstance(item, str) else item
    return container.get(part)


def _set(container: Any, part: str, value: Any) -> None:
    if isinstance(container, list):
        index = _index(container, part)
        assert index is not None  # the caller has looked
        container[index] = value
    else:
        container[part] = value


def _index(items: list[Any], part: str) -> int | None:
    if part.isdigit():
        return int(part) if int(part) < len(items) else None
    for index, item in enumerate(items):
        if item == part or (isinstance(item, dict) and item.get("name") == part):
            return index
    return None


def _place(error: yaml.YAMLError) -> str:
    """What is wrong and where, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = (
        getattr(error, "problem", None) or (str(error) or type(error).__name__).splitlines()[0]
    )
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark else problem


def write_output(path: Path, text: str, *, key: str, mode: str = "w") -> None:
    """Write what a command was asked for: beside ``path`` first, so that whoever reads or ends this
    meanwhile is not left with half of it.

    Args:
        path: A file, or what is none, such as /dev/stdout.
        text: The whole content.
        key: The argument that named it, for the error.
        mode: ``a`` writes in place.

    Raises:
        RecipeError: It cannot be written.
    """
    target = path.expanduser()
    target = target.resolve() if target.is_symlink() else target
    whole = mode == "w" and (target.is_file() or not target.exists())
    beside = target.with_name(f".{target.name}.new") if whole else target
    try:
        with beside.open(mode, encoding="utf-8") as file:
            file.write(text)
        if beside != target:
            beside.replace(target)
    except OSError as error:
        raise RecipeError(
            f"{key} {path}: cannot be written ({error.strerror}); name a file in a folder that "
            "exists."
        ) from error
