"""What is generated from the recipe models: the JSON schema and the reference page.

Imports every registered objective, data source and tracker for their options.
"""

from __future__ import annotations

import copy
import inspect
import json
from typing import Any

import pydantic

from scpl_ds import ds_keys, registry
from scpl_ds.ds_keys import Keys
from scpl_ds.recipe import Recipe
from scpl_ds.recipe_fields import Named
from scpl_ds.recipe_scpl import ObjectiveChoice, PartChoice
from scpl_ds.recipe_sections import DataChoice, LoraSection, TrackerChoice

_CHOICES: tuple[type[Named], ...] = (ObjectiveChoice, DataChoice, TrackerChoice)

_DS_TYPES: dict[str, dict[str, Any]] = {
    "int": {"type": ["number", "string", "null"]},
    "float": {"type": ["number", "string", "null"]},
    "bool": {"type": ["boolean", "null"]},
    "str": {"type": ["string", "null"]},
    "list": {"type": ["array", "string", "null"]},
    "dict": {"type": ["object", "null"]},
    "any": {},
}
"""Numbers may be ``"auto"`` or ``1e-4``, which YAML reads as text; the loader is stricter."""

_HEADER = """\
# Recipe reference

<!-- Generated from the docstrings of the fields: python -m scpl_ds.recipe_docs docs/recipe.md -->

A recipe is a YAML or JSON file with the sections below. An unknown key anywhere is an error. Any
key can be set on the command line: `scpl.stages=3`, `data.train_file=mine.csv`,
`trackers.wandb.mode=offline` (list items by number or by name). `recipes/recipe.schema.json` is the
same as a JSON schema, for editors.
"""

_DEEPSPEED = """\
DeepSpeed's own keys (0.19.8), unchanged: the mapping itself, or the path of a `ds_config.json`
relative to the recipe file. It is the vocabulary for batch sizes, optimizer, LR schedule, clipping
and ZeRO stage whatever `scpl.sharding` is. A key that DeepSpeed does not know is an error here;
DeepSpeed itself ignores it.

`"auto"`, or leaving the key out, takes the value from `train`; setting both to different values is
an error.

| DeepSpeed key | `train` key | when both are silent |
|---|---|---|
"""

_DEEPSPEED_END = """
`train_micro_batch_size_per_gpu` has to be written in one of the two places (`"auto"` with a silent
`train` is Hugging Face's 8, with a warning). `train_batch_size` may be written; it must be
micro-batch x accumulation x data-parallel ranks of a stage.
`gradient_clipping` is per stage, and on by default, as in DeepSpeed.

- Optimizers: {optimizers}. `Adam` is AdamW unless `adam_w_mode: false`, as in DeepSpeed. Parameters
  with fewer than two dimensions get no weight decay.
- Schedulers: {schedulers}.
- A key that would do nothing here is refused: DeepSpeed's `checkpoint` section, and with
  `scpl.sharding: none` what its engine does (`flops_profiler`, `wall_clock_breakdown`,
  `communication_data_type`, `prescale_gradients` ...). A block that DeepSpeed has removed may stay
  if it is switched off.
- ZeRO stage, offloading and precision by backend: [sharding](sharding.md). Refused by name: ZeRO++,
  ZenFlow, `activation_checkpointing` (`train.gradient_checkpointing` takes its place).
"""


def build_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema()
    defs: dict[str, Any] = schema["$defs"]
    for choice in _CHOICES:
        defs[choice.__name__] = _choice_schema(choice, defs)
    _add_sums(defs)
    deepspeed = schema["properties"]["deepspeed"]
    table = _ds_schema(ds_keys.TOP)
    schema["properties"]["deepspeed"] = {
        "description": deepspeed["description"],
        "anyOf": [{"type": "string"}, table],
    }
    trackers = schema["properties"]["trackers"]
    trackers["anyOf"] = [{"type": "string"}, {"type": "array", "items": trackers.pop("items")}]
    del trackers["type"]
    schema["title"] = "scpl_ds recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def build_page() -> str:
    """``docs/recipe.md``."""
    schema = build_schema()
    defs = schema["$defs"]
    parts = [_HEADER]
    for name, field in Recipe.model_fields.items():
        need = "required" if field.is_required() else "optional"
        parts.append(f"## `{name}` ({need})\n")
        if name == "deepspeed":
            parts.append(_deepspeed_page())
            continue
        parts.append(f"{_flat(field.description)}\n")
        model = field.annotation
        if name in ("data", "trackers"):
            parts += _choice_page(DataChoice if name == "data" else TrackerChoice, name)
        elif isinstance(model, type) and issubclass(model, pydantic.BaseModel):
            parts.append(_table(defs[model.__name__], defs, set(model.model_fields) - {"head"}))
            if name == "model":
                parts.append("### `model.lora`\n")
                lora = defs["LoraSection"]
                parts.append(f"{_flat(lora['description'])}\n")
                parts.append(_table(lora, defs, set(LoraSection.model_fields)))
            if name == "scpl":
                parts.append("### `scpl.head`\n")
                parts.append(_table(defs["HeadSection"], defs, None))
                parts += _choice_page(ObjectiveChoice, "scpl.objective")
    return "\n".join(parts).rstrip() + "\n"


def _options(kind: str) -> dict[type[pydantic.BaseModel], list[str]]:
    """Options model -> the registered names that take it."""
    found: dict[type[pydantic.BaseModel], list[str]] = {}
    for name in registry.names(kind):
        found.setdefault(registry.resolve(kind, name, where=kind).Options, []).append(name)
    return found


def _choice_schema(choice: type[Named], defs: dict[str, Any]) -> dict[str, Any]:
    variants: list[dict[str, Any]] = []
    for model, names in _options(choice.kind).items():
        schema = model.model_json_schema()
        defs.update(schema.pop("$defs", {}))
        for short, name in getattr(model, "short_names", {}).items():
            schema["properties"][short] = schema["properties"][name]
        variants.append(
            {
                "type": "object",
                "properties": {"name": {"enum": names}, **schema.get("properties", {})},
                "required": ["name", *schema.get("required", [])],
                "additionalProperties": False,
            }
        )
    own = {"type": "object", "properties": {"name": {"pattern": ":"}}, "required": ["name"]}
    return {
        "description": inspect.getdoc(choice),
        "anyOf": [{"type": "string"}, *variants, own],
    }


def _add_sums(defs: dict[str, Any]) -> None:
    """An objective may be a list of objectives, each with a weight."""
    objective = defs[ObjectiveChoice.__name__]
    weight = PartChoice.model_json_schema()["properties"]["weight"]
    part = copy.deepcopy(objective) | {"description": inspect.getdoc(PartChoice)}
    for variant in part["anyOf"][1:]:
        variant["properties"]["weight"] = weight
    defs[PartChoice.__name__] = part
    items = {"$ref": f"#/$defs/{PartChoice.__name__}"}
    objective["anyOf"].insert(0, {"type": "array", "items": items})


def _ds_schema(known: Keys) -> dict[str, Any]:
    properties = {
        key: _ds_schema(kind) if isinstance(kind, dict) else _DS_TYPES[kind]
        for key, kind in known.items()
    }
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _deepspeed_page() -> str:
    rows = [
        f"| `{path}` | {', '.join(f'`{k}`' for k in fill.train_keys)} "
        f"| {'required' if path == 'train_micro_batch_size_per_gpu' else _code(fill.default)} |"
        for path, fill in ds_keys.FILLS.items()
    ]
    end = _DEEPSPEED_END.format(
        optimizers="AdamW, Adam, SGD, Adagrad", schedulers=", ".join(ds_keys.SCHEDULER_PARAMS)
    )
    return _DEEPSPEED + "\n".join(rows) + "\n" + end


def _choice_page(choice: type[Named], path: str) -> list[str]:
    parts: list[str] = []
    for model, names in _options(choice.kind).items():
        schema = model.model_json_schema()
        parts.append(f"### `{path}`: {', '.join(f'`{n}`' for n in names)}\n")
        if schema.get("properties"):
            parts.append(_table(schema, schema.get("$defs", {}), None))
        else:
            parts.append("No options.\n")
    return parts


def _table(schema: dict[str, Any], defs: dict[str, Any], only: set[str] | None) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    required = schema.get("required", [])
    for key, prop in schema["properties"].items():
        if only is not None and key not in only:
            continue
        if key in required:
            default = "required"
        else:
            default = _code(prop["default"]) if prop.get("default") is not None else ""
        kind = _type(prop, defs).replace("|", "\\|")
        lines.append(f"| `{key}` | {kind} | {default} | {_flat(prop.get('description'))} |")
    return "\n".join(lines) + "\n"


def _type(prop: dict[str, Any], defs: dict[str, Any]) -> str:
    if "$ref" in prop:
        name = prop["$ref"].rpartition("/")[2]
        return "name or mapping" if name.endswith("Choice") else _type(defs[name], defs)
    if "anyOf" in prop:
        kinds = [_type(p, defs) for p in prop["anyOf"] if p.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in prop:
        return ", ".join(_code(v) for v in prop["enum"])
    if "const" in prop:
        return _code(prop["const"])
    if prop.get("type") == "array":
        items = prop.get("items") or (prop.get("prefixItems") or [{}])[0]
        return f"list of {_type(items, defs)}"
    words = {"integer": "whole number", "number": "number", "boolean": "true, false"}
    words |= {"string": "path" if prop.get("format") == "path" else "text", "null": "null"}
    limits = [
        f"{sign} {prop[key]:g}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in prop and prop[key] < 2**62
    ]
    return " ".join([words.get(str(prop.get("type")), "mapping"), ", ".join(limits)]).strip()


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`"


def _flat(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split()).replace("|", "\\|")


if __name__ == "__main__":
    import sys
    from pathlib import Path

    target = Path(sys.argv[1])
    target.write_text(
        build_page() if target.suffix == ".md" else json.dumps(build_schema(), indent=2) + "\n"
    )
