"""What the sections of a recipe are made of: a strict base, numbers, paths, named classes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    model_serializer,
    model_validator,
)

from scpl_ds import registry
from scpl_ds.errors import RecipeError
from scpl_ds.problems import Problem, nested, problems_of, show


class Section(pydantic.BaseModel):
    """Base of all sections: nothing unknown, nothing changed after loading, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {value}")
    return value


Count = Annotated[int, Field(ge=1), BeforeValidator(not_bool)]
Number = Annotated[float, Field(ge=0), BeforeValidator(not_bool)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(not_bool)]


EMBEDDED_MODELS = ("demo", "demo-lm")
"""Names of models that come with the package, ``scpl_ds/data/demo.py`` and ``demo_lm.py``."""


def absolute(path: str | Path) -> Path:
    """A path that means the same in every folder; ``~`` is the home folder."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def name_or_folder(value: str) -> str:
    """A folder that is there becomes :func:`absolute`; an embedded model and all else is a name."""
    here = os.path.expanduser(value)
    is_folder = here != value or (value not in EMBEDDED_MODELS and os.path.isdir(here))
    return str(absolute(here)) if is_folder else value


AbsolutePath = Annotated[Path, AfterValidator(absolute)]
"""What is read: a finished run finds it from any folder."""
HomePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
"""What is written; stays relative, only ``~`` is put in."""
MADE_BY_A_SCRIPT = "(made by a script)"
"""``model.name_or_path`` of a run that was given its model, weights of no known origin."""
NameOrFolder = Annotated[str, Field(min_length=1), AfterValidator(name_or_folder)]
"""As ``from_pretrained`` takes it."""


def compile_backend(value: str) -> str:
    """A backend of ``torch.compile``; those for debugging are accepted, but not listed."""
    import torch._dynamo  # a second, only for who compiles

    if value not in (every := torch._dynamo.list_backends(exclude_tags=())):
        known = ", ".join(torch._dynamo.list_backends())
        near = registry.did_you_mean(value, every)
        raise ValueError(f"torch.compile has no backend '{value}'{near or '.'} Known here: {known}")
    return value


def compile_mode(value: str) -> str:
    """A mode of ``torch.compile``."""
    import torch._inductor

    if value not in (known := tuple(torch._inductor.list_mode_options())):
        near = registry.did_you_mean(value, known)
        raise ValueError(
            f"torch.compile has no mode '{value}'{near or '.'} Known: {', '.join(known)}"
        )
    return value


class Named(pydantic.BaseModel):
    """``{name: ..., <options>}``: a class from the registry and that class's own options.

    A text alone is the name with default options. The options are checked by the class's
    ``Options``, so whatever a new objective, data source or tracker takes is checked as strictly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    kind: ClassVar[str]
    """Table of the registry."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Fields of this class itself, which are written among the options."""

    name: str
    options: SerializeAsAny[pydantic.BaseModel]

    def resolve(self) -> Any:
        """The class itself."""
        return registry.resolve(self.kind, self.name, where="name")

    def create(self, **kwargs: Any) -> Any:
        """``Class(options, **kwargs)``."""
        return self.resolve()(self.options, **kwargs)

    @classmethod
    def in_full(cls, value: Any) -> Any:
        """A mapping in the place of what may be written for short."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        value = cls.in_full(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a name or a mapping with a name, got {show(value)}")
        options = {str(k): v for k, v in value.items()}
        name = options.pop("name", None)
        own = {key: options.pop(key) for key in cls.beside if key in options}
        if not isinstance(name, str):
            known = ", ".join(registry.names(cls.kind))
            message = f"is required, one of {known}" if name is None else "must be a text"
            raise nested([Problem("name", message)])
        if list(options) == ["options"] and isinstance(options["options"], pydantic.BaseModel):
            return {"name": name, **options, **own}
        try:
            target = registry.resolve(cls.kind, name, where="name")
        except RecipeError as error:
            raise nested([Problem(*str(error).split(": ", 1))]) from error
        schema = getattr(target, "Options", None)
        if not (isinstance(schema, type) and issubclass(schema, pydantic.BaseModel)):
            raise nested(
                [
                    Problem(
                        "name", f"'{name}' has no pydantic model `Options`, so it is no {cls.kind}"
                    )
                ]
            )
        try:
            return {"name": name, "options": schema.model_validate(options), **own}
        except pydantic.ValidationError as error:
            raise nested(problems_of(error, schema)) from error

    @model_serializer
    def _dump(self) -> dict[str, Any]:
        fields = type(self.options).model_fields
        values = self.options.model_dump(mode="json")
        # A None that is not the default says something (`eval_split: null`) and stays.
        own = {key: getattr(self, key) for key in self.beside}
        return (
            {"name": self.name}
            | own
            | {k: v for k, v in values.items() if v is not None or fields[k].default is not None}
        )
