"""Collecting everything that is wrong with a recipe, to say it all at once.

A problem is ``(path, message)``: the dotted recipe key and what is the matter with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import pydantic
from pydantic_core import ErrorDetails, PydanticCustomError

from scpl_ds.errors import RecipeError
from scpl_ds.registry import did_you_mean


class Problem(NamedTuple):
    path: str
    """Dotted recipe key, or an empty string for the recipe as a whole."""
    message: str

    def under(self, *prefix: str | int) -> Problem:
        """The same problem seen from further up: ``name`` -> ``scpl.objective.name``."""
        return Problem(dotted(*prefix, *([self.path] if self.path else [])), self.message)


def dotted(*parts: str | int) -> str:
    return ".".join(str(part) for part in parts if part != "")


def recipe_error(problems: Sequence[Problem], where: str) -> RecipeError:
    """One error that lists all ``problems``, each once and in order, of the recipe ``where``."""
    unique = list(dict.fromkeys(problems))
    count = f"{len(unique)} problem{'s' if len(unique) > 1 else ''}"
    lines = [f"  {p.path}: {p.message}" if p.path else f"  {p.message}" for p in unique]
    return RecipeError(f"{count} in {where}:\n" + "\n".join(lines))


def nested(problems: Iterable[Problem]) -> PydanticCustomError:
    """What a pydantic validator raises to report several problems below its own key."""
    found = list(problems)
    text = "; ".join(f"{p.path}: {p.message}" if p.path else p.message for p in found)
    return PydanticCustomError(
        "problems", "{text}", {"text": text, "problems": [tuple(p) for p in found]}
    )


def problems_of(
    error: pydantic.ValidationError,
    model: type[pydantic.BaseModel],
    homes: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Pydantic's errors in this project's words.

    Args:
        error: What validating ``model`` raised.
        model: Says which keys exist where, for "did you mean".
        homes: Key -> dotted key where it belongs, for keys written into the wrong section.
    """
    problems: list[Problem] = []
    for detail in error.errors(include_url=False):
        loc = detail["loc"]
        if detail["type"] == "problems":
            inner = detail["ctx"]["problems"]  # type: ignore[typeddict-item]
            problems += [Problem(*item).under(*loc) for item in inner]
        else:
            problems.append(Problem(dotted(*loc), _message(detail, model, homes or {})))
    return problems


def unknown_key(key: str, known: Iterable[str], home: str | None = None) -> str:
    """The message for a key that does not exist here, naming where or what it probably is."""
    if home is not None:
        return f"unknown key; it belongs in '{home}'"
    return f"unknown key{did_you_mean(key, known)}"


def show(value: Any) -> str:
    """``value`` as it may stand in a message: short, strings in quotes."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _message(
    detail: ErrorDetails, model: type[pydantic.BaseModel], homes: Mapping[str, str]
) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        parent = _model_at(model, detail["loc"][:-1])
        known = list(parent.model_fields) if parent else []
        key = str(detail["loc"][-1])
        return unknown_key(key, known, homes.get(key))
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(detail.get("ctx", {}).get("error", detail["msg"]))
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be a mapping, got {show(value)}"
    message = detail["msg"].replace("Input should be", "must be", 1)
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        expected = detail.get("ctx", {}).get("expected", "")
        hint = did_you_mean(value, [word.strip("'") for word in _words(str(expected))])
    return f"{message}, got {show(value)}{hint}"


def _words(expected: str) -> list[str]:
    return expected.replace(" or ", ", ").split(", ")


def _model_at(
    model: type[pydantic.BaseModel], loc: Sequence[str | int]
) -> type[pydantic.BaseModel] | None:
    """The pydantic model that validated the mapping at ``loc``, if it is one of ours."""
    current: Any = model
    for part in loc:
        field = current.model_fields.get(str(part))
        if field is None:
            return None
        candidates = [field.annotation, *get_args(field.annotation)]
        models = [
            c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)
        ]
        if not models:
            return None
        current = models[0]
    return current
