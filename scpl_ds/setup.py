"""Everything that has to be known and checked before the first step of a run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import platform
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from scpl_ds import checkpoint, registry
from scpl_ds.build import build_engine
from scpl_ds.build_checks import refuse_half, refuse_idle, stage_section
from scpl_ds.build_plan import plan_stages
from scpl_ds.build_times import Stopwatch, from_rank_0
from scpl_ds.checkpoint_damage import scpl_of
from scpl_ds.data.demo import resolve_model_path
from scpl_ds.data.given import Given, data_of
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.prepared import Data, Facts, make_loaders, read
from scpl_ds.data.stream_loader import StreamLoader
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.distributed.world import RankEnv, init_world, pick_device, set_cpu_threads
from scpl_ds.ds_limits import TORCH_BACKENDS
from scpl_ds.engine import Engine
from scpl_ds.errors import DataError, OtherRankFailed, RecipeError, ScplError
from scpl_ds.meter import MemoryWatch
from scpl_ds.optim import lr_schedule
from scpl_ds.partition.anatomy import Anatomy, analyze, anatomy_of
from scpl_ds.partition.config import load_config
from scpl_ds.partition.footprint import longest_sequence
from scpl_ds.partition.loading import load_stage
from scpl_ds.partition.lora import Adapters, plan_adapters
from scpl_ds.partition.lora_base import take_as_given
from scpl_ds.partition.matrices import Matrices, matrices_of, matrices_of_stages
from scpl_ds.partition.plan import LayerTimes, PartitionPlan, stages_of_rank
from scpl_ds.partition.prepare import prepare
from scpl_ds.partition.stage_module import PreTrainedModel, stage_from_model
from scpl_ds.progress import Progress
from scpl_ds.recipe import Recipe, check_world
from scpl_ds.run_folder import RunFolder, versions
from scpl_ds.stage import StageBody, as_body

log = logging.getLogger(__name__)
T = TypeVar("T")
_COMMIT = "scpl_ds_commit"
_MUST_AGREE = ("scpl-ds", _COMMIT, "torch", "transformers", "deepspeed")
"""What another version of may change numbers or messages."""


@dataclasses.dataclass
class Model:
    """The cut model: config, anatomy, plan."""

    path: str
    config: Any
    anatomy: Anatomy
    plan: PartitionPlan
    adapters: Adapters | None = None
    """Trained in the place of the layers' weights."""
    whole: PreTrainedModel | None = None
    """The model itself, where a script gave it: its stages share its tensors."""


@dataclasses.dataclass
class Parts:
    """What a run works with."""

    data: Data
    model: Model
    train_loader: BatchLoader | StreamLoader
    eval_loader: BatchLoader | None
    progress: Progress
    memory: MemoryWatch
    """Begun before the stages were loaded."""
    engine: Engine


def make_parts(
    recipe: Recipe,
    mesh: Mesh,
    device: torch.device,
    given: Given | None = None,
    *,
    resumed: bool = False,
) -> Parts:
    """Read the data, cut the model and build the engine; every rank calls it.

    Args:
        recipe: Of the run.
        mesh: Its ranks.
        device: Of this rank.
        given: In the place of what the recipe's ``model`` and ``data`` name.
        resumed: A checkpoint is going to be loaded.
    """
    data = load_data(recipe, mesh, given=given)
    whole = None if given is None else given.model
    model = together(mesh, lambda: cut_model(recipe, data.facts, whole))
    train, held_out = together(mesh, lambda: make_loaders(recipe, data, mesh, device))
    progress = Progress.of(recipe, train, mesh.dp_size)
    memory, steps = MemoryWatch(device), progress.total_steps
    engine = together(
        mesh,
        lambda: make_engine(recipe, model, mesh, device, total_steps=steps, replaced=resumed),
    )
    together(mesh, lambda: refuse_idle(engine.stages, mesh))
    return Parts(data, model, train, held_out, progress, memory, engine)


def start_world(recipe: Recipe) -> tuple[Mesh, torch.device]:
    """The process groups of this run, on the launcher's ranks or on this process alone.

    Raises:
        RecipeError: The number of ranks does not fit the recipe, or its task cannot be trained.
    """
    env = RankEnv.current()
    pipeline_ranks, dp_size = check_world(recipe, env.world_size)
    recipe.deepspeed.batch(dp_size)  # refuses batch sizes that do not fit
    set_cpu_threads(env)
    device = pick_device(env)
    init_world(env, device, timeout_s=recipe.scpl.timeout_s)
    mesh = Mesh(pipeline_ranks, dp_size, device, timeout_s=recipe.scpl.timeout_s)
    _refuse_other_versions(mesh)
    registry.resolve("sharding", recipe.scpl.sharding, where="scpl.sharding").start(mesh)
    return mesh, device


def _refuse_other_versions(mesh: Mesh) -> None:
    """Ranks that compute with other code would train something else without a word."""
    found = gather_objects(mesh, (platform.node(), versions()))
    _, first = found[0]
    for rank, (host, own) in enumerate(found):
        other = [n for n in sorted({*first, *own}) if first.get(n) != own.get(n)]
        if not (first.get(_COMMIT) and own.get(_COMMIT)):  # git may be missing, or be slow
            other = [name for name in other if name != _COMMIT]
        if set(other) & set(_MUST_AGREE):
            told = ", ".join(f"{n} {first.get(n, 'none')} and {own.get(n, 'none')}" for n in other)
            raise RecipeError(
                f"Rank 0 on {found[0][0]} and rank {rank} on {host} have other versions: {told}. "
                "Install the same on all machines."
            )


def together(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; if it fails anywhere, all stop, and the failing ranks say why.

    Without it one rank would refuse its data while the others wait for it until the timeout. The
    work may take longer than the timeout, on any rank.
    """
    error: ScplError | None = None
    result: Any = None
    try:
        result = work()
    except ScplError as found:
        error = found
    wait_for_all(mesh)
    failed = [r for r, bad in enumerate(gather_objects(mesh, error is not None)) if bad]
    if error is not None and failed[0] == mesh.rank:
        raise error
    if failed:
        raise OtherRankFailed(f"rank {failed[0]} found the problem.")
    return result


def load_data(
    recipe: Recipe, mesh: Mesh, *, trained: Path | None = None, given: Given | None = None
) -> Data:
    """Load, check and tokenise on first-stage ranks, and tell the others what they must know.

    Args:
        recipe: Names the data.
        mesh: Says who reads.
        trained: Given, the data are only scored: by the model whose ``config.json`` is in this
            folder. Its classes hold, nothing is tokenised for training, and no training data are
            needed.
        given: What a script has read already, in the place of ``recipe.data``.
    """
    whole = None if given is None else given.model

    def own() -> Data | None:
        if mesh.pp_rank != 0:
            return None
        return read(recipe, trained) if given is None else data_of(recipe, given)

    data = together(mesh, own)
    _refuse_other_data(mesh, data)
    facts: Facts = broadcast_object(mesh, data.facts if data is not None else None)
    if recipe.scpl.partition == "time":
        facts = from_rank_0(mesh, lambda: _with_cut(recipe, facts, trained, whole))
    if data is None:
        return Data(facts, None, range(facts.num_train or 0), range(facts.num_eval))
    data.facts = facts
    return data


def _refuse_other_data(mesh: Mesh, data: Data | None) -> None:
    """A machine with a changed copy of the data would train on other samples without a word."""
    own = None if data is None else (data.facts.num_train, data.facts.train_checksum)
    found = gather_objects(mesh, (platform.node(), own))
    for rank, (host, other) in enumerate(found):
        if other is not None and other != found[0][1]:
            raise DataError(
                f"Rank {rank} on {host} reads other training data than rank 0 on {found[0][0]}: "
                f"{other[0]} samples with checksum {other[1]}, not {found[0][1][0]} with "
                f"{found[0][1][1]}. Give all machines the same files; a script must shuffle with a "
                "seed that is the same on all ranks."
            )


def _with_cut(
    recipe: Recipe, facts: Facts, trained: Path | None, whole: PreTrainedModel | None
) -> Facts:
    """What ``scpl.partition: time`` cuts by. Times are never the same twice, so a run that goes on
    keeps the cut of its checkpoint: another one would give other numbers."""
    folder = None if trained is None else trained.parent
    if folder is None:
        folder = RunFolder(recipe.output_dir).resume_point(recipe)
    if folder is not None:
        manifest = checkpoint.Reader(folder).manifest
        bounds, by_time = manifest["bounds"], scpl_of(manifest).get("partition") == "time"
        if len(bounds) - 1 == recipe.scpl.stages and (by_time or trained is not None):
            log.info("scpl.partition: time keeps the cut of %s, at layers %s", folder, bounds)
            return dataclasses.replace(facts, kept_bounds=tuple(bounds))
    return dataclasses.replace(facts, times=_measure(recipe, *_anatomy(recipe, facts, whole)))


def _measure(recipe: Recipe, config: Any, anatomy: Anatomy) -> LayerTimes:
    stopwatch = Stopwatch(recipe.scpl, recipe.deepspeed, pick_device(RankEnv.current()))
    section = recipe.train.model_copy(update={"torch_compile": False})
    asked = getattr(recipe.data.options, "max_length", anatomy.sequence_length)
    return stopwatch.config(
        config,
        recipe.model.task,
        anatomy,
        sequence_length=longest_sequence(config, asked),
        attn_implementation=recipe.model.attn_implementation,
        prepare=lambda stage: prepare(stage, section),
    )


def cut_model(
    recipe: Recipe, facts: Facts | None = None, whole: PreTrainedModel | None = None
) -> Model:
    """Config, anatomy and plan of the recipe's model; reads no weights and needs no process group.

    With ``scpl.partition: time`` several ranks need ``facts``, which say what rank 0 measured;
    without them this process measures. ``whole`` stands in the place of the recipe's model.

    Raises:
        PartitionError: The model cannot be cut as asked.
    """
    config, anatomy = _anatomy(recipe, facts, whole)
    times, kept = (None, None) if facts is None else (facts.times, facts.kept_bounds)
    if recipe.scpl.partition == "time" and times is None and kept is None:
        times = _measure(recipe, config, anatomy)  # `scpl-ds plan`: no ranks to agree with
    method = None if kept is None else list(itertools.pairwise(kept))
    plan = plan_stages(anatomy, recipe.scpl, config, method=method, times=times)
    if kept is not None:
        plan = dataclasses.replace(plan, method="time")
    asked, task, adapters = recipe.model.lora, recipe.model.task, None
    if asked is not None:
        adapters = plan_adapters(config, task, anatomy, asked, seed=recipe.train.seed)
    path = recipe.model.name_or_path
    path = resolve_model_path(path) if whole is None else path
    return Model(path, config, anatomy, plan, adapters, whole)


def _anatomy(
    recipe: Recipe, facts: Facts | None, whole: PreTrainedModel | None
) -> tuple[Any, Anatomy]:
    if whole is not None:
        return whole.config, analyze(whole)
    model = recipe.model
    config = load_config(
        resolve_model_path(model.name_or_path),
        revision=model.revision,
        num_labels=facts.num_labels if facts else model.num_labels,
        label_names=facts.label_names if facts else (),
        pad_token_id=facts.pad_token_id if facts else None,
    )
    return config, anatomy_of(config, model.task, attn_implementation=model.attn_implementation)


def make_engine(
    recipe: Recipe,
    model: Model,
    mesh: Mesh,
    device: torch.device,
    *,
    total_steps: int,
    replaced: bool = False,
) -> Engine:
    """Load this rank's stages and build the engine over them. ``replaced``: the weights are going
    to be those of a checkpoint."""
    section, seed = recipe.deepspeed, recipe.train.seed
    factor = lr_schedule(section, recipe.train, total_steps)
    whole = model.whole
    sources = (
        _stages_of_files(recipe, model, replaced)
        if whole is None
        else _stages_of_model(recipe, model, whole, mesh)
    )
    return build_engine(
        model.plan,
        sources.make_body,
        recipe.scpl,
        section,
        mesh,
        device,
        num_labels=model.config.num_labels,
        seed=seed,
        lr_at=lambda step: section.lr * factor(step),
        total_steps=total_steps,
        make_span=sources.make_span,
        matrices=sources.matrices,
    )


class _Stages(NamedTuple):
    """What ``build_engine`` makes stages of."""

    make_body: Callable[[int], StageBody]
    make_span: Callable[[int, int, int], StageBody] | None
    matrices: Matrices


def _stages_of_model(recipe: Recipe, model: Model, whole: PreTrainedModel, mesh: Mesh) -> _Stages:
    """Stages that share the tensors of a model in memory. Made before anything is sharded: ties
    that cross stages are copied."""
    anatomy, plan, section = model.anatomy, model.plan, recipe.deepspeed
    backend = registry.resolve("sharding", recipe.scpl.sharding, where="scpl.sharding")
    if recipe.scpl.sharding in TORCH_BACKENDS:
        take_as_given(whole, section.autocast or section.precision)
    for k in range(plan.num_stages):
        refuse_half(whole, backend.weights_dtype(stage_section(section, recipe.scpl, k)))
    own = stages_of_rank(plan.num_stages, mesh.pp_size)[mesh.pp_rank]
    bodies = {
        k: as_body(prepare(stage_from_model(whole, anatomy, *plan.span(k)), recipe.train))
        for k in own
    }
    return _Stages(bodies.__getitem__, None, lambda names: matrices_of(whole, names))


def _stages_of_files(recipe: Recipe, model: Model, replaced: bool) -> _Stages:
    """Stages of which only their own tensors are read."""
    section, seed = recipe.deepspeed, recipe.train.seed
    backend = registry.resolve("sharding", recipe.scpl.sharding, where="scpl.sharding")
    asked = ("attn_implementation", "revision")
    extra = {key: found for key in asked if (found := getattr(recipe.model, key)) is not None}

    def load(start: int, end: int, k: int) -> StageBody:
        stage = load_stage(
            model.path,
            recipe.model.task,
            model.anatomy,
            start,
            end,
            config=model.config,
            dtype=backend.weights_dtype(stage_section(section, recipe.scpl, k)),
            seed=seed,
            adapters=model.adapters,
            replaced=replaced,
            **extra,
        )
        return as_body(prepare(stage, recipe.train))

    def matrices(names: Collection[str]) -> Mapping[str, Tensor]:
        return matrices_of_stages(
            lambda start, end: load_stage(
                model.path, recipe.model.task, model.anatomy, start, end,
                config=model.config, seed=seed, only_read=True, **extra,
            ),
            model.anatomy,
            names,
        )  # fmt: skip

    return _Stages(lambda k: load(*model.plan.span(k), k), load, matrices)
