"""From a model and a config to an ``Engine``: ``initialize`` and ``PipelineModule``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scpl_ds import registry
from scpl_ds.batch import as_named_inputs
from scpl_ds.build_checks import (
    backprop_of,
    constant_or_scheduled,
    make_objective,
    nothing_to_train,
    refuse_half,
    refuse_idle,
    refuse_rates,
    refuse_rest,
    refuse_untied,
    stage_section,
)
from scpl_ds.build_plan import plan_stages
from scpl_ds.build_times import Stopwatch
from scpl_ds.data.loader import BatchLoader
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.p2p import BoundaryChannel
from scpl_ds.distributed.world import RankEnv, init_world, pick_device, set_cpu_threads
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.ds_limits import TORCH_BACKENDS
from scpl_ds.engine import Engine
from scpl_ds.errors import PartitionError, RecipeError
from scpl_ds.optim import build_optimizer
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.layer_list import (
    Layer,
    LayerListStage,
    boundary_width,
    check_layers,
    plan_layers,
)
from scpl_ds.partition.lora import without_wrapper
from scpl_ds.partition.lora_base import take_as_given
from scpl_ds.partition.matrices import Matrices, matrices_of
from scpl_ds.partition.plan import PartitionPlan, stages_of_rank
from scpl_ds.partition.prepare import recompute_activations
from scpl_ds.partition.stage_module import PreTrainedModel, stage_from_model
from scpl_ds.recipe import ScplSection, check_world, recipe_from_ds_config
from scpl_ds.sharding._base import DTYPES
from scpl_ds.stage import Stage, StageBody, as_body
from scpl_ds.stage_build import build_stage

log = logging.getLogger(__name__)


class PipelineModule:
    """What to train in stages, where ``deepspeed.pipe.PipelineModule`` stood.

    Args:
        layers: An unmodified Hugging Face model (sequence classification or causal LM), or what
            DeepSpeed takes: a list of ``nn.Module``, functions and ``LayerSpec``.
        num_stages: Number of stages; None leaves it to ``scpl.stages`` of the config.
        loss_fn: ``loss_fn(outputs, labels)``; needed with a list of layers. A Hugging Face model
            brings its own.
        partition_method: ``parameters``, ``uniform``, ``time``, ``type:<regex>`` or ranges; None
            leaves it to ``scpl.partition``.
        input_example: With a list of layers: one batch of inputs, so that the width of each
            boundary is known and a local head with weights can be built (``projection: linear`` or
            ``mlp``). Only its shape is used, but for ``time``, which runs the layers on it; with a
            Hugging Face model it says there how long samples are.
        activation_checkpoint_interval: With a list of layers DeepSpeed's: keep only what enters
            every n-th layer of a stage and run those layers again in backward; 0 keeps everything.
            With a Hugging Face model any n > 0 switches on its gradient checkpointing, layer by
            layer; 0 leaves the model as it was given. The numbers stay the same to the bit.

    Nothing is built, and no process group is needed, before ``scpl_ds.initialize``.
    """

    def __init__(
        self,
        layers: PreTrainedModel | Sequence[Layer],
        num_stages: int | None = None,
        loss_fn: Callable[[Any, Tensor], Tensor] | None = None,
        partition_method: str | Sequence[Sequence[int]] | None = None,
        input_example: Tensor | None = None,
        *,
        activation_checkpoint_interval: int = 0,
    ) -> None:
        if activation_checkpoint_interval < 0:
            raise RecipeError(
                f"PipelineModule: activation_checkpoint_interval: {activation_checkpoint_interval} "
                "must be 0 (keep all activations) or a number of layers."
            )
        layers = without_wrapper(layers)
        if not isinstance(layers, PreTrainedModel):
            if isinstance(layers, str) or not isinstance(layers, Iterable):
                raise RecipeError(
                    f"a {type(layers).__name__} is neither a Hugging Face model nor a list of "
                    "layers. Give what AutoModelFor...from_pretrained() returns, or "
                    "PipelineModule([layer, layer, ...], loss_fn=...)."
                )
            layers = list(layers)
            if loss_fn is None:
                raise RecipeError(
                    "PipelineModule: a list of layers needs a loss_fn(outputs, labels)."
                )
        self.layers = layers
        self.num_stages, self.loss_fn = num_stages, loss_fn
        self.partition_method, self.input_example = partition_method, input_example
        self.activation_checkpoint_interval = activation_checkpoint_interval

    def matrices(self, names: Collection[str]) -> dict[str, Tensor]:
        """Embedding and LM head as they are now; a list of layers has none that are known."""
        return matrices_of(self.layers, names) if isinstance(self.layers, nn.Module) else {}

    def cut(
        self, scpl: ScplSection, seed: int, stopwatch: Stopwatch | None = None
    ) -> tuple[PartitionPlan, Callable[[int], StageBody], int | None]:
        """The plan, a function that makes stage k's body, and the number of labels (if known).

        ``stopwatch`` measures what the method ``time`` cuts by.
        """
        stages, method = scpl.stages, self.partition_method or scpl.partition
        if isinstance(self.layers, PreTrainedModel):
            model = self.layers
            anatomy = analyze(model)
            num_labels = getattr(model.config, "num_labels", None)
            prepare = recompute_activations if self.activation_checkpoint_interval else None
            times = None
            if method == "time" and stopwatch is not None:
                example = self.input_example
                times = stopwatch.model(model, anatomy, example=example, prepare=prepare)
            plan = plan_stages(anatomy, scpl, model.config, method=method, times=times)

            def stage(k: int) -> StageBody:
                made = stage_from_model(model, anatomy, *plan.span(k))
                return as_body(made if prepare is None else prepare(made))

            return plan, stage, num_labels
        layers = self.layers
        if method == "time" and stopwatch is not None:
            plan = stopwatch.layers(layers, self.input_example)
        else:
            plan = plan_layers(layers, stages, method)
        check_layers(layers, plan.bounds)

        def body(k: int) -> StageBody:
            start, end = plan.span(k)
            features = end if end < len(layers) else end - 1
            width = boundary_width(layers, features, self.input_example)
            return as_body(
                LayerListStage(
                    layers,
                    start,
                    end,
                    loss_fn=self.loss_fn,
                    hidden_size=width,
                    seed=seed,
                    checkpoint_interval=self.activation_checkpoint_interval,
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
    pipeline = model if isinstance(model, PipelineModule) else PipelineModule(model)
    scpl, section = recipe_from_ds_config(config, stages=pipeline.num_stages)
    lr_at = lr_scheduler or constant_or_scheduled(section)
    if isinstance(pipeline.layers, PreTrainedModel):
        if pipeline.layers.get_output_embeddings() is not None:
            scpl = scpl.for_task("causal-lm")
        backend = registry.resolve("sharding", scpl.sharding, where="scpl.sharding")
        if scpl.sharding in TORCH_BACKENDS:
            take_as_given(pipeline.layers, section.autocast or section.precision)
        for k in range(scpl.stages):
            refuse_half(pipeline.layers, backend.weights_dtype(stage_section(section, scpl, k)))
    env = RankEnv.current()
    set_cpu_threads(env)
    device = pick_device(env)
    init_world(env, device, timeout_s=scpl.timeout_s)
    pipeline_ranks, dp_size = check_world(scpl, env.world_size)
    mesh = Mesh(pipeline_ranks, dp_size, device, timeout_s=scpl.timeout_s)
    stopwatch = Stopwatch(scpl, section, device, seed, mesh)
    plan, make_body, num_labels = pipeline.cut(scpl, seed, stopwatch)
    if plan.method == "time":
        log.info("scpl.partition: time measured and cut at layers %s", list(plan.bounds))
    if isinstance(pipeline.layers, PreTrainedModel):  # ties are copied before anything is sharded
        own = stages_of_rank(plan.num_stages, mesh.pp_size)[mesh.pp_rank]
        make_body = {k: make_body(k) for k in own}.__getitem__
    engine = build_engine(
        plan, make_body, scpl, section, mesh, device,
        num_labels=num_labels, seed=seed, make_optimizer=optimizer, lr_at=lr_at,
        matrices=pipeline.matrices,
    )  # fmt: skip
    refuse_idle(engine.stages, mesh)
    if isinstance(pipeline.layers, PreTrainedModel):
        engine.set_batch_fn(as_named_inputs)
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
    lr_at: Callable[[int], float],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    make_channel: Callable[..., BoundaryChannel] = BoundaryChannel,
    total_steps: int | None = None,
    make_span: Callable[[int, int, int], StageBody] | None = None,
    matrices: Matrices | None = None,
) -> Engine:
    """An engine over this rank's stages of ``plan``; ``make_body`` is called for those only.

    ``make_channel`` takes what ``BoundaryChannel`` takes; ``total_steps`` says where
    ``scpl.polish`` begins; ``make_span`` makes layers ``[start, end)`` as they were before
    training for stage k, for ``scpl.lookahead``; ``matrices`` reads embedding and LM head as they
    were before training, for objectives that borrow them.
    """
    section = section.at(mesh.dp_size)
    backend = registry.resolve("sharding", scpl.sharding, where="scpl.sharding")
    order = scpl.schedule if scpl.method == "scpl" else "stream"  # of what no gradient crosses
    schedule = registry.resolve("schedule", order, where="scpl.schedule")

    def optimizer(k: int, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        if not (trainable := list(named)):
            raise PartitionError(nothing_to_train(plan, k))
        if make_optimizer is not None:
            refuse_rates(scpl)
            return make_optimizer([parameter for _, parameter in trainable])
        return build_optimizer(trainable, section, lr=scpl.lr_of(k), head_lr=scpl.head_lr)

    backend.start(mesh)
    backprop = backprop_of(scpl, section, total_steps)

    @functools.cache
    def read(names: frozenset[str]) -> dict[str, Tensor]:
        half = section.autocast or section.precision
        found = {} if matrices is None else matrices(names)
        dtype = DTYPES[half] if half != "fp16" else torch.float32
        return {name: tensor.to(device, dtype) for name, tensor in found.items()}

    def lent(names: Collection[str]) -> dict[str, Tensor]:
        return read(frozenset(names))

    def stage(k: int) -> Stage:
        own = stage_section(section, scpl, k)
        body = make_body(k)
        refuse_half(body, backend.weights_dtype(own))
        if scpl.method != "scpl":  # polish goes on with copies that are no longer equal
            refuse_untied(body, k)
        make = functools.partial(make_objective, scpl, num_labels, lent)
        ahead = None
        if (reach := scpl.reach(k, body.end, plan.bounds[-1])) > body.end:
            if make_span is None:
                raise RecipeError("scpl.lookahead: needs a recipe, which knows where layers lie.")
            ahead = make_span(body.end, reach, k)
        made = build_stage(
            k,
            body,
            make_objective=make if scpl.has_objective(k) else None,
            detach_features=scpl.detach_features,
            make_optimizer=functools.partial(optimizer, k),
            backend=backend,
            frozen=k < scpl.freeze_stages,
            ahead=ahead,
            section=own,
            mesh=mesh,
            device=device,
            seed=seed,
        )
        if backprop is not None:
            refuse_rest(made.module, plan, k)
        return made

    return Engine(
        [stage(k) for k in stages_of_rank(plan.num_stages, mesh.pp_size)[mesh.pp_rank]],
        plan,
        mesh,
        make_channel(
            mesh,
            device,
            max_in_flight=scpl.max_in_flight,
            transport=scpl.transport,
            boundary_dtype=scpl.boundary_dtype,
        ),
        section,
        schedule=functools.partial(schedule, step_in_backward=scpl.step_in_backward),
        lr_at=lr_at,
        device=device,
        sync=scpl.sync,
        clip_scope=scpl.clip_scope,
        backprop=backprop,
        calibrates=scpl.calibrates,
    )
