"""Where on the Hugging Face hub a run's export goes, in the names of ``TrainingArguments``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import pydantic
from pydantic import model_validator

from scpl_ds.problems import Problem, nested
from scpl_ds.recipe_fields import Section


class HubKeys(Section):
    """Keys of ``train``."""

    push_to_hub: bool = False
    """Upload the export, model card included, to the hub at the end; ``owner/name`` for short says
    ``hub_model_id`` too. The token is that of ``HF_TOKEN`` or ``hf auth login``."""
    hub_model_id: str | None = None
    """Repository; made if it is not there. Default: the run's name, under the token's own
    account."""
    hub_private_repo: bool | None = None
    """Make it private; without it, as the account or organisation has it by default."""
    hub_revision: str | None = None
    """Branch to upload to, made if it is not there; default ``main``."""

    @model_validator(mode="before")
    @classmethod
    def _name_means_both(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = dict(value)
        if given.get("hub_token") is not None:
            text = (
                "is not read: a recipe is copied into every checkpoint. Remove it, and set "
                "HF_TOKEN in the environment or run `hf auth login`"
            )
            raise nested([Problem("hub_token", text)])
        given.pop("hub_token", None)
        if isinstance(name := given.get("push_to_hub"), str):
            if given.get("hub_model_id") not in (None, name):
                text = f"'{name}' and hub_model_id '{given['hub_model_id']}': keep one of the two"
                raise nested([Problem("push_to_hub", text)])
            given |= {"push_to_hub": True, "hub_model_id": name}
        return given

    @pydantic.field_validator("hub_model_id")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        return value if value is None else repository(value)

    @model_validator(mode="after")
    def _used(self) -> Self:
        keys = ("hub_model_id", "hub_private_repo", "hub_revision")
        alone = [key for key in keys if getattr(self, key) is not None]
        if alone and not self.push_to_hub:
            text = "has no effect without push_to_hub: true"
            raise nested([Problem(key, text) for key in alone])
        return self


def repository(name: str) -> str:
    """A name that the hub takes, or a ``ValueError`` that says why not."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"'{name}' is no name of a repository: {str(error).splitlines()[0]}"
        ) from error
    return name


def problems_of_name(keys: HubKeys, key: str, name: str) -> list[Problem]:
    """Found before the training, not at its end: a run whose name is to be the repository's.

    Args:
        keys: ``train``.
        key: What the run is named by.
        name: Of the run.
    """
    if not keys.push_to_hub or keys.hub_model_id is not None:
        return []
    try:
        repository(name)
    except ValueError as error:
        text = f"true means a repository with the name of the run ({key}), and {error}"
        return [Problem("train.push_to_hub", f"{text} Name one: train.push_to_hub: owner/name")]
    return []


def own_keys_first(schema: dict[str, Any]) -> None:
    """Put those of the hub behind the others of ``train``, and let a name stand for short."""
    known = schema["properties"]
    for key in HubKeys.model_fields:
        known[key] = known.pop(key)
    del known["push_to_hub"]["type"]
    known["push_to_hub"]["anyOf"] = [{"type": "boolean"}, {"type": "string"}]
