"""From a model and a config to an ``Engine``: ``initialize`` and ``PipelineModule``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scpl_ds import registry
from scpl_ds.data.loader import BatchLoader
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel
from scpl_ds.distributed.world import RankEnv, init_world, pick_device, set_cpu_threads
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.optim import build_optimizer, lr_schedule
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.layer_list import (
    Layer,
    LayerListStage,
    boundary_width,
    check_layers,
    plan_layers,
)
from scpl_ds.partition.plan import PartitionPlan, make_plan, stages_of_rank
from scpl_ds.partition.stage_module import PreTrainedModel, stage_from_model
from scpl_ds.recipe import ScplSection, TrainSection, check_world, recipe_from_ds_config
from scpl_ds.stage import StageBody, as_body, build_stage

log = logging.getLogger(__name__)


class PipelineModule:
    """What to train in stages, where ``deepspeed.pipe.PipelineModule`` stood.

    Args:
        layers: An unmodified Hugging Face model (sequence classification or causal LM), or what
            DeepSpeed takes: a list of ``nn.Module``, functions and ``LayerSpec``.
        num_stages: Number of stages; None leaves it to ``scpl.stages`` of the config.
        loss_fn: ``loss_fn(outputs, labels)``; needed with a list of layers. A Hugging Face model
            brings its own.
        partition_method: ``parameters``, ``uniform``, ``type:<regex>`` or ranges; None leaves it to
            ``scpl.partition``.
        input_example: With a list of layers: one batch of inputs, so that the width of each
            boundary is known and a local head with weights can be built (``projection: linear`` or
            ``mlp``). Only its shape is used.

    Nothing is built, and no process group is needed, before ``scpl_ds.initialize``.
    """

    def __init__(
        self,
        layers: PreTrainedModel | Sequence[Layer],
        num_stages: int | None = None,
        loss_fn: Callable[[Any, Tensor], Tensor] | None = None,
        partition_method: str | Sequence[Sequence[int]] | None = None,
        input_example: Tensor | None = None,
    ) -> None:
        if not isinstance(layers, PreTrainedModel):
            layers = list(layers)
            if loss_fn is None:
                raise RecipeError(
                    "PipelineModule: a list of layers needs a loss_fn(outputs, labels)."
                )
        self.layers = layers
        self.num_stages, self.loss_fn = num_stages, loss_fn
        self.partition_method, self.input_example = partition_method, input_example

    def cut(
        self, scpl: ScplSection, seed: int
    ) -> tuple[PartitionPlan, Callable[[int], StageBody], int | None]:
        """The plan, a function that makes stage k's body, and the number of labels (if known)."""
        stages, method = scpl.stages, self.partition_method or scpl.partition
        if isinstance(self.layers, PreTrainedModel):
            model = self.layers
            anatomy = analyze(model)
            plan = make_plan(anatomy, stages, method)
            return (
                plan,
                lambda k: as_body(stage_from_model(model, anatomy, *plan.span(k))),
                getattr(model.config, "num_labels", None),
            )
        layers = self.layers
        plan = plan_layers(layers, stages, method)
        check_layers(layers, plan.bounds)

        def body(k: int) -> StageBody:
            start, end = plan.span(k)
            features = end if end < len(layers) else end - 1
            width = boundary_width(layers, features, self.input_example)
            return as_body(
                LayerListStage(
                    layers, start, end, loss_fn=self.loss_fn, hidden_size=width, seed=seed
                )
            )

        return plan, body, None


class Initialized(NamedTuple):
    """What ``deepspeed.initialize`` returns, in its order."""

    engine: Engine
    optimizer: torch.optim.Optimizer
    training_dataloader: BatchLoader | None
    lr_scheduler: Callable[[int], float]


def initialize(
    args: Any = None,
    model: PreTrainedModel | PipelineModule | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Callable[[int], float] | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    seed: int = 42,
) -> Initialized:
    """The counterpart of ``deepspeed.initialize``: the same config file with one more block,
    ``scpl``.

    Works under any launcher that sets RANK and WORLD_SIZE, and in one process without one (all
    stages then share it). Every rank may pass the whole model: each keeps only its stages' tensors.

    Args:
        args: Only ``args.deepspeed_config`` is read, when ``config`` is not given.
        model: A Hugging Face model as it is, or a ``PipelineModule``.
        optimizer: A function from parameters to a torch optimizer, called once per stage. An
            optimizer object cannot be used: it holds the parameters of all stages at once.
        model_parameters: Refused unless None, for the same reason.
        training_data: A map-style data set; each first-stage rank gets a loader of its share.
        lr_scheduler: Optimizer step (0-based) -> learning rate; default: the config's.
        collate_fn: List of samples -> batch, for ``training_data``.
        config: A ``ds_config.json``, or its contents.
        seed: For local heads, dropout and the order of ``training_data``.

    Returns:
        ``(engine, optimizer, dataloader, lr_scheduler)``. The optimizer is that of this rank's last
        stage; the dataloader is None where there is no ``training_data``.

    Raises:
        RecipeError: A config that cannot be run; all its problems at once.
        PartitionError: A model that cannot be cut as asked.
    """
    if model is None:
        raise RecipeError("initialize() needs a model: a Hugging Face model or a PipelineModule.")
    if model_parameters is not None or isinstance(optimizer, torch.optim.Optimizer):
        raise RecipeError(
            "initialize(): an optimizer object or model_parameters span all stages, but each stage "
            "has its own optimizer. Pass optimizer=lambda parameters: "
            "torch.optim.AdamW(parameters, "
            "lr=...), or the config's optimizer section."
        )
    config = config if config is not None else getattr(args, "deepspeed_config", None)
    if config is None:
        raise RecipeError("initialize() needs config=: a ds_config.json or its contents.")
    scpl, section = recipe_from_ds_config(config)
    pipeline = model if isinstance(model, PipelineModule) else PipelineModule(model)
    env = RankEnv.from_environ()
    set_cpu_threads(env)
    device = pick_device(env)
    init_world(env, device, timeout_s=scpl.timeout_s)
    if pipeline.num_stages is not None:
        scpl = scpl.model_copy(update={"stages": pipeline.num_stages})
    pipeline_ranks, dp_size = check_world(scpl, env.world_size)
    mesh = Mesh(pipeline_ranks, dp_size, device, timeout_s=scpl.timeout_s)
    plan, make_body, num_labels = pipeline.cut(scpl, seed)
    engine = build_engine(
        plan, make_body, scpl, section, mesh, device,
        num_labels=num_labels, seed=seed, make_optimizer=optimizer, lr_at=lr_scheduler,
    )  # fmt: skip
    loader = None
    if training_data is not None:
        loader = BatchLoader(
            training_data,
            micro_batch_size=section.micro_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=dp_size,
            seed=seed,
            shuffle=True,
            collate=collate_fn or torch.utils.data.default_collate,
            drop_last=True,
            global_batch_size=section.batch(dp_size).global_batch,
        )
        engine.set_dataiterator(iter(loader))
    return Initialized(engine, engine.optimizer, loader, engine.lr_at)


def build_engine(
    plan: PartitionPlan,
    make_body: Callable[[int], StageBody],
    scpl: ScplSection,
    section: DeepSpeedSection,
    mesh: Mesh,
    device: torch.device,
    *,
    num_labels: int | None,
    seed: int,
    lr_at: Callable[[int], float] | None = None,
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
) -> Engine:
    """An engine over this rank's stages of ``plan``; ``make_body`` is called for those only."""
    section = section.at(mesh.dp_size)
    backend = registry.resolve("sharding", scpl.sharding, where="scpl.sharding")
    objective = registry.resolve("objective", scpl.objective.name, where="scpl.objective.name")

    def optimizer(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if make_optimizer is not None:
            return make_optimizer([parameter for _, parameter in named])
        return build_optimizer(named, section)

    stages = [
        build_stage(
            k,
            make_body(k),
            make_objective=functools.partial(
                _make_objective, objective, scpl.objective.options, num_labels
            ),
            detach_features=scpl.head.detach_features,
            make_optimizer=optimizer,
            backend=backend,
            section=section,
            mesh=mesh,
            device=device,
            seed=seed,
        )
        for k in stages_of_rank(plan.num_stages, mesh.pp_size)[mesh.pp_rank]
    ]
    channel = BoundaryChannel(mesh, device, max_in_flight=scpl.max_in_flight)
    return Engine(
        stages,
        plan,
        mesh,
        channel,
        section,
        schedule=registry.resolve("schedule", scpl.schedule, where="scpl.schedule"),
        lr_at=lr_at or _constant_or_scheduled(section),
        device=device,
    )


def _make_objective(kind: Any, options: Any, num_labels: int | None, hidden: int | None) -> Any:
    try:
        return kind(options, hidden_size=hidden, num_labels=num_labels)
    except RecipeError as error:
        if hidden is not None:
            raise
        raise RecipeError(
            f"{error} With a list of layers the width of a boundary is known from "
            "PipelineModule(..., input_example=<one batch of inputs>)."
        ) from error


def _constant_or_scheduled(section: DeepSpeedSection) -> Callable[[int], float]:
    """The config's scheduler, or a constant learning rate, as ``deepspeed.initialize`` has it."""
    factor = lr_schedule(section, TrainSection(lr_scheduler_type="constant"), total_steps=1)
    return lambda step: section.lr * factor(step)
