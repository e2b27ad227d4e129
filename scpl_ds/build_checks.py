"""What is settled, or refused, while an engine is built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.engine_backprop import Backprop
from scpl_ds.errors import PartitionError, RecipeError
from scpl_ds.optim import lr_schedule, needs_total_steps
from scpl_ds.partition.matrices import Matrices
from scpl_ds.partition.plan import PartitionPlan
from scpl_ds.recipe import ScplSection, TrainSection
from scpl_ds.stage import LocalStage, Stage
from scpl_ds.stage_build import FrozenStage, rests, span_text


def backprop_of(
    scpl: ScplSection, section: DeepSpeedSection, total_steps: int | None
) -> Backprop | None:
    """Which steps go end to end.

    Raises:
        RecipeError: The length of the run is not known, or the precision needs a loss scale.
    """
    if scpl.method == "scpl" and not scpl.polish:
        return None
    if section.precision == "fp16" or section.autocast == "fp16":
        raise RecipeError(
            "scpl.method: backpropagation over stages scales no loss, so it does not train in "
            "fp16. Use bf16 or fp32."
        )
    if scpl.method == "scpl" and total_steps is None:
        raise RecipeError(
            "scpl.polish: the last part of the steps is to go end to end, but initialize() does "
            "not know how many there will be. Use a recipe, or scpl.method: bp."
        )
    first = 0 if scpl.method != "scpl" else round((total_steps or 0) * (1 - scpl.polish))
    return Backprop(first, scpl.backprop_schedule, joint=scpl.method == "joint")


def constant_or_scheduled(section: DeepSpeedSection) -> Callable[[int], float]:
    """The config's scheduler, or a constant learning rate, as ``deepspeed.initialize`` has it.

    Raises:
        RecipeError: The scheduler ends with the run, whose length is not written: nobody says here
            how many steps will be asked for.
    """
    spec = section.scheduler
    if spec is not None and needs_total_steps(spec):
        raise RecipeError(
            f"deepspeed.scheduler.params.total_num_steps: {spec.type} ends with the "
            "run, and 'auto' or nothing does not say when that is (a recipe knows). Write the "
            "number of optimizer steps, or pass lr_scheduler= to initialize()."
        )
    factor = lr_schedule(section, TrainSection(lr_scheduler_type="constant"), total_steps=1)
    return lambda step: section.lr * factor(step)


def refuse_half(module: Any, weights: torch.dtype | None) -> None:
    """Refuse weights in half precision where the run keeps them in fp32; frozen ones beside
    adapters may be."""
    if weights is None:
        return
    held = getattr(module, "base_dtype", None) is not None
    for name, parameter in module.named_parameters():
        if held and not parameter.requires_grad:
            continue
        if parameter.is_floating_point() and parameter.element_size() < weights.itemsize:
            raise RecipeError(
                f"the model is in {parameter.dtype} ('{name}'), but this run keeps its weights in "
                f"{weights}: training would lose what it no longer has room for. Load it with "
                f"from_pretrained(..., dtype={weights}), or call model.float()."
            )


def refuse_untied(body: Any, k: int) -> None:
    """Refuse backpropagation over stages that train their own copies of what is one weight."""
    if untied := getattr(body, "untied", ()):
        raise RecipeError(
            f"scpl.method: stage {k} and another each have a copy of one weight "
            f"({', '.join(untied)}), and backpropagation would teach each only a part of the "
            "gradient. Use one stage (scpl.stages: 1), or a model with tie_word_embeddings=False."
        )


def refuse_rest(module: LocalStage, plan: PartitionPlan, k: int) -> None:
    """Refuse backpropagation over a stage of frozen weights and no adapters.

    Local losses need nothing of such a stage but its outputs.
    """
    if rests(module):
        raise PartitionError(nothing_to_train(plan, k))


def refuse_idle(stages: Sequence[Stage], mesh: Mesh) -> None:
    """Refuse a run of a model with adapters of which no stage trains; all ranks call it."""
    if all(stage.module.body.kept is None for stage in stages):
        return
    own = [(stage.index, isinstance(stage, FrozenStage)) for stage in stages]
    idle = dict(one for part in gather_objects(mesh, own) for one in part)
    if all(idle.values()):
        raise PartitionError(
            f"none of the {len(idle)} stages has anything to train: each is frozen "
            "(scpl.freeze_stages), or has neither an adapter nor a local head with weights. Give "
            "adapters to layers of other stages (model.lora.target_modules), or freeze fewer."
        )


def refuse_rates(scpl: ScplSection) -> None:
    """Refuse rates of the recipe beside an optimizer of the caller's.

    Raises:
        RecipeError: Names the key.
    """
    for key in ("head_lr", "local_lr"):
        if key in scpl.model_fields_set and (rate := getattr(scpl, key)) != 1.0:
            raise RecipeError(
                f"scpl.{key}: {rate} needs the config's optimizer; one of your own says its "
                "learning rates itself."
            )


def nothing_to_train(plan: PartitionPlan, k: int) -> str:
    return (
        f"stage {k} ({span_text(*plan.span(k))}) has nothing to train: its layers are frozen or "
        "have no parameters, and it has no local head with weights. Unfreeze some of them, move "
        "the cut (scpl.partition), or use fewer stages (scpl.stages)."
    )


def make_objective(
    scpl: ScplSection, num_labels: int | None, matrices: Matrices, hidden: int | None
) -> Any:
    """A stage's objective for a boundary of width ``hidden`` (None: not known).

    Raises:
        RecipeError: It needs the width, or a matrix that the model does not have.
    """
    try:
        return scpl.objective.build(hidden_size=hidden, num_labels=num_labels, matrices=matrices)
    except RecipeError as error:
        if hidden is not None:
            raise
        raise RecipeError(
            f"{error} With a list of layers the width of a boundary is known from "
            "PipelineModule(..., input_example=<one batch of inputs>)."
        ) from error


def stage_section(section: DeepSpeedSection, scpl: ScplSection, k: int) -> DeepSpeedSection:
    """The section of stage ``k``, which may have a ZeRO stage of its own."""
    return section if scpl.zero_stages is None else section.with_zero_stage(scpl.zero_stages[k])
