"""What ``scpl_ds.Trainer`` saves: an ordinary Hugging Face folder, here and on the hub."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scpl_ds import export
from scpl_ds.checkpoint_disk import writing
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.world import RankEnv
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.export_hub import Destination, push, why_not
from scpl_ds.recipe import Recipe
from scpl_ds.setup import Model, together
from scpl_ds.trainer_files import write_files

if TYPE_CHECKING:
    from transformers import TrainingArguments

log = logging.getLogger(__name__)
_AGAIN = "Nothing of it is kept, and the weights are in no checkpoint. Make room, then save again."


def save_whole(
    engine: Engine, model: Model, recipe: Recipe, tokenizer: Any, out: Path, source: Path | None
) -> None:
    """Write ``out``, whole or not at all; every rank calls it, and all fail if one does.

    Args:
        engine: The stages.
        model: What they are cut from.
        recipe: Of the run.
        tokenizer: Saved beside the model; or None.
        out: A new folder, or an earlier export.
        source: A checkpoint of these weights; None: there is none, so one is written for the time
            that it takes.
    """
    mesh, task = engine.mesh, recipe.model.task
    together(mesh, lambda: export.check_destination(out, key="save_model"))
    if source is not None:
        whole = source

        def write() -> None:
            if mesh.rank == 0:
                export.export_checkpoint(whole, out, task=task)

        together(mesh, write)
        return
    scratch = out.with_name(f".{out.name}.checkpoint")
    files = scratch / "files"
    kept = [name for stage in engine.stages for name in stage.module.body.kept or ()]
    trained = [name for names in gather_objects(mesh, kept) for name in names]

    def write_beside() -> None:
        if mesh.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            with writing(out, then=_AGAIN):
                files.mkdir(parents=True)
                write_files(model, files, tokenizer, recipe, trained)

    def write_weights() -> Path:
        state = {"recipe": recipe.to_mapping()}
        return engine.save_checkpoint(scratch, "whole", state, save_latest=False, model_files=files)

    def write_whole() -> None:
        if mesh.rank == 0:
            export.export_checkpoint(scratch / "whole", out, task=task, left=_AGAIN)
            shutil.rmtree(scratch, ignore_errors=True)  # before any rank goes on

    try:
        for work in (write_beside, write_weights, write_whole):
            together(mesh, work)
    finally:
        if mesh.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)


def destination_of(
    args: TrainingArguments, revision: str | None = None, private: bool | None = None
) -> Destination:
    """Where on the hub a script wants its model."""
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    return Destination(
        name,
        args.hub_private_repo if private is None else private,
        revision or args.hub_revision,
    )


def warn_of_no_upload(args: TrainingArguments) -> None:
    """Said at the start, not after the training; on rank 0."""
    if not args.push_to_hub or RankEnv.current().rank > 0:
        return
    if (reason := why_not(destination_of(args), args.hub_token)) is not None:
        log.warning("push_to_hub: %s. Until then save_model ends in an error.", reason)


def upload(
    engine: Engine, folder: Path, to: Destination, message: str | None, token: str | None
) -> str:
    """Upload an export; every rank calls it.

    Returns:
        The commit's address.

    Raises:
        HubError: It could not be done; the folder is as it was.
    """
    mesh = engine.mesh

    def send() -> str | None:
        if mesh.rank > 0:
            return None
        return push(folder, to, message=message or "scpl_ds", token=token)

    return broadcast_object(mesh, together(mesh, send))


def refuse_card_options(options: Mapping[str, Any], *, blocking: bool) -> None:
    """What transformers' ``push_to_hub`` takes and this one has no place for."""
    if not blocking:
        raise RecipeError(
            "push_to_hub(blocking=False) cannot be honoured: all ranks wait for the upload. Leave "
            "it out."
        )
    if given := [name for name, value in options.items() if value is not None]:
        raise RecipeError(
            f"push_to_hub({', '.join(given)}) cannot be honoured: the model card says what is "
            "known of the run. Change README.md of what save_model wrote, and upload the folder "
            "with `hf upload`."
        )
