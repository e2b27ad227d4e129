"""Everything that has to be known and checked before the first step of a run."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from scpl_ds import checkpoint, registry
from scpl_ds.build import build_engine, plan_stages, stage_section
from scpl_ds.build_times import Stopwatch, from_rank_0
from scpl_ds.data._base import DataOptions, check_labels
from scpl_ds.data._columns import ColumnOptions
from scpl_ds.data.demo import resolve_model_path
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.text import Collator, TokenizedDataset, lengths_of, load_tokenizer, tokenize
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.distributed.world import RankEnv, init_world, pick_device, set_cpu_threads
from scpl_ds.engine import Engine
from scpl_ds.errors import CheckpointError, DataError, OtherRankFailed, RecipeError, ScplError
from scpl_ds.optim import lr_schedule
from scpl_ds.partition.anatomy import Anatomy, anatomy_of
from scpl_ds.partition.config import load_config
from scpl_ds.partition.footprint import longest_sequence
from scpl_ds.partition.loading import load_stage
from scpl_ds.partition.plan import LayerTimes, PartitionPlan
from scpl_ds.partition.prepare import prepare
from scpl_ds.recipe import Recipe, check_world
from scpl_ds.schedules import render, simulate
from scpl_ds.stage import StageBody, as_body

log = logging.getLogger(__name__)
T = TypeVar("T")

AHEAD = 2  # micro-batches that are ready before a GPU asks for them


@dataclasses.dataclass(frozen=True)
class Facts:
    """What every rank must know about data that only first-stage ranks read."""

    num_labels: int
    label_names: tuple[str, ...]
    pad_token_id: int
    num_train: int
    num_eval: int
    majority_accuracy: float | None
    """Accuracy of always answering the most frequent label of the evaluation split."""
    times: LayerTimes | None = None
    """With ``scpl.partition: time``, what rank 0 measured."""
    kept_bounds: tuple[int, ...] | None = None
    """Or the cut that a resumed or scored run has already."""


@dataclasses.dataclass
class Data:
    """Tokenised splits on first-stage ranks; only their sizes elsewhere."""

    facts: Facts
    tokenizer: Any
    train: TokenizedDataset | range
    eval: TokenizedDataset | range


@dataclasses.dataclass
class Model:
    """The cut model: config, anatomy, plan."""

    path: str
    config: Any
    anatomy: Anatomy
    plan: PartitionPlan


def start_world(recipe: Recipe) -> tuple[Mesh, torch.device]:
    """The process groups of this run, on the launcher's ranks or on this process alone.

    Raises:
        RecipeError: The number of ranks does not fit the recipe, or its task cannot be trained.
    """
    if recipe.model.task != "sequence-classification":
        raise RecipeError(
            f"model.task: '{recipe.model.task}' can be cut and planned, but not trained by a "
            "recipe yet: the local objectives need one class label per sample. Use "
            "sequence-classification."
        )
    env = RankEnv.current()
    pipeline_ranks, dp_size = check_world(recipe, env.world_size)
    recipe.deepspeed.batch(dp_size)  # refuses batch sizes that do not fit
    set_cpu_threads(env)
    device = pick_device(env)
    init_world(env, device, timeout_s=recipe.scpl.timeout_s)
    mesh = Mesh(pipeline_ranks, dp_size, device, timeout_s=recipe.scpl.timeout_s)
    registry.resolve("sharding", recipe.scpl.sharding, where="scpl.sharding").start(mesh)
    return mesh, device


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


def load_data(recipe: Recipe, mesh: Mesh, *, trained: Path | None = None) -> Data:
    """Load, check and tokenise on first-stage ranks, and tell the others what they must know.

    Args:
        recipe: Names the data.
        mesh: Says who reads.
        trained: Given, the data are only scored: by the model whose ``config.json`` is in this
            folder. Its classes hold, nothing is tokenised for training, and no training data are
            needed.
    """
    data = together(mesh, lambda: _read(recipe, trained) if mesh.pp_rank == 0 else None)
    facts: Facts = broadcast_object(mesh, data.facts if data is not None else None)
    if recipe.scpl.partition == "time":
        facts = from_rank_0(mesh, lambda: _with_cut(recipe, facts, trained))
    if data is None:
        return Data(facts, None, range(facts.num_train), range(facts.num_eval))
    data.facts = facts
    return data


def _with_cut(recipe: Recipe, facts: Facts, trained: Path | None) -> Facts:
    """What ``scpl.partition: time`` cuts by. Times are never the same twice, so a run that goes on
    keeps the cut of its checkpoint: another one would give other numbers."""
    resume = recipe.train.resume_from_checkpoint
    folder = None if trained is None else trained.parent
    if folder is None and resume is not False:
        folder = checkpoint.resolve(recipe.output_dir if resume is True else Path(resume))
    if folder is not None:
        manifest = checkpoint.Reader(folder).manifest
        bounds, written = manifest["bounds"], manifest["client_state"].get("recipe") or {}
        by_time = written.get("scpl", {}).get("partition") == "time"
        if len(bounds) - 1 == recipe.scpl.stages and (by_time or trained is not None):
            log.info("scpl.partition: time keeps the cut of %s, at layers %s", folder, bounds)
            return dataclasses.replace(facts, kept_bounds=tuple(bounds))
    return dataclasses.replace(facts, times=_measure(recipe, *_anatomy(recipe, facts)))


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


def _read(recipe: Recipe, trained: Path | None) -> Data:
    model, options, choice = recipe.model, _options(recipe), recipe.data
    path = resolve_model_path(model.name_or_path)
    classes = None if trained is None else _classes(trained)
    if classes and isinstance(options, ColumnOptions) and options.label_names is None:
        # Without it a file in which a class is missing would get other ids than in training.
        options = options.model_copy(update={"label_names": classes})
        choice = choice.model_copy(update={"options": options})
    splits = choice.create().load()
    num_labels = check_labels(splits, len(classes) if classes else model.num_labels)
    tokenizer = load_tokenizer(
        model.tokenizer_name_or_path or model.name_or_path,
        pad_token=options.pad_token,
        revision=model.revision,
    )
    config = load_config(path, revision=model.revision)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    # With the attention too, so that one that is not there is refused before minutes of tokenising.
    attention = model.attn_implementation
    input_names = anatomy_of(config, model.task, attn_implementation=attention).forward_keys

    def ids(split: Any) -> TokenizedDataset | range:
        if split is None:
            return range(0)
        return tokenize(
            split,
            tokenizer,
            max_length=options.max_length,
            max_positions=positions,
            vocab_size=config.get_text_config().vocab_size,
            input_names=input_names,
        )

    train, held_out = ids(None if trained else splits.train), ids(splits.eval)
    if trained is None and not isinstance(train, TokenizedDataset):
        raise DataError(f"data: '{recipe.data.name}' has no training split.")
    majority = None
    if isinstance(held_out, TokenizedDataset):
        majority = float(np.bincount(held_out.labels).max() / len(held_out))
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int), "load_tokenizer returns tokenizers that can pad"
    facts = Facts(
        num_labels, classes or tuple(splits.label_names), pad, len(train),
        len(held_out), majority,
    )  # fmt: skip
    return Data(facts, tokenizer, train, held_out)


def _classes(trained: Path) -> tuple[str, ...]:
    """Names of the classes of a trained model, by id."""
    if not (trained / "config.json").is_file():
        raise CheckpointError(
            f"{trained} has no config.json, which names the classes; checkpoints of `scpl-ds "
            "train` have one. Score another checkpoint, or train again."
        )
    config: Any = load_config(str(trained))
    return tuple(str(config.id2label[k]) for k in range(config.num_labels))


def _options(recipe: Recipe) -> DataOptions:
    options = recipe.data.options
    if not isinstance(options, DataOptions):
        raise RecipeError(
            f"data.name: the Options of '{recipe.data.name}' must derive from "
            "scpl_ds.data._base.DataOptions (max_length, pad_token ...)."
        )
    return options


def cut_model(recipe: Recipe, facts: Facts | None = None) -> Model:
    """Config, anatomy and plan of the recipe's model; reads no weights and needs no process group.

    With ``scpl.partition: time`` several ranks need ``facts``, which say what rank 0 measured;
    without them this process measures.

    Raises:
        PartitionError: The model cannot be cut as asked.
    """
    config, anatomy = _anatomy(recipe, facts)
    times, kept = (None, None) if facts is None else (facts.times, facts.kept_bounds)
    if recipe.scpl.partition == "time" and times is None and kept is None:
        times = _measure(recipe, config, anatomy)  # `scpl-ds plan`: no ranks to agree with
    method = None if kept is None else list(itertools.pairwise(kept))
    plan = plan_stages(
        anatomy, recipe.scpl, num_labels=config.num_labels, method=method, times=times
    )
    if kept is not None:
        plan = dataclasses.replace(plan, method="time")
    return Model(resolve_model_path(recipe.model.name_or_path), config, anatomy, plan)


def _anatomy(recipe: Recipe, facts: Facts | None) -> tuple[Any, Anatomy]:
    model = recipe.model
    config = load_config(
        resolve_model_path(model.name_or_path),
        revision=model.revision,
        num_labels=facts.num_labels if facts else model.num_labels,
        label_names=facts.label_names if facts else (),
        pad_token_id=facts.pad_token_id if facts else None,
    )
    return config, anatomy_of(config, model.task, attn_implementation=model.attn_implementation)


def draw_schedule(recipe: Recipe, num_stages: int, num_micro_batches: int) -> str:
    """The timeline of one step under the recipe's schedule, one rank a stage."""
    scpl = recipe.scpl
    backprop, name = scpl.method != "scpl", scpl.order
    schedule = registry.resolve("schedule", name, where="scpl.schedule")
    num_micro_batches = 1 if name == "naive" else num_micro_batches
    try:
        slots = simulate(schedule, num_stages, num_micro_batches, gradients_travel_back=backprop)
        learn = [s for s in slots if s.kind == "F" or s.stage >= scpl.freeze_stages]
        return render(learn)
    except Exception as error:  # anybody's code, perhaps made for several stages a rank
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"(not drawn with one rank a stage: {reason})"


def make_engine(
    recipe: Recipe, model: Model, mesh: Mesh, device: torch.device, *, total_steps: int
) -> Engine:
    """Load this rank's stages and build the engine over them."""
    section, seed = recipe.deepspeed, recipe.train.seed
    backend = registry.resolve("sharding", recipe.scpl.sharding, where="scpl.sharding")
    asked = ("attn_implementation", "revision")
    extra = {key: found for key in asked if (found := getattr(recipe.model, key)) is not None}
    factor = lr_schedule(section, recipe.train, total_steps)

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
            **extra,
        )
        return as_body(prepare(stage, recipe.train))

    return build_engine(
        model.plan,
        lambda k: load(*model.plan.span(k), k),
        recipe.scpl,
        section,
        mesh,
        device,
        num_labels=model.config.num_labels,
        seed=seed,
        lr_at=lambda step: section.lr * factor(step),
        total_steps=total_steps,
        make_span=load,
    )


def make_loaders(
    recipe: Recipe, data: Data, mesh: Mesh, device: torch.device
) -> tuple[BatchLoader, BatchLoader | None]:
    """Training and evaluation loaders. On ranks that read no data they only count.

    For a GPU a thread collates ahead into pinned memory. Beside a CPU's milliseconds to seconds a
    step the fraction of one that collating takes is not worth a thread (docs/profiling.md).
    """
    sizes = recipe.deepspeed.batch(mesh.dp_size)
    cuda = device.type == "cuda"
    train = BatchLoader(
        data.train,
        micro_batch_size=sizes.micro_batch,
        shuffle=True,
        drop_last=True,
        global_batch_size=sizes.global_batch,
        ahead=AHEAD if cuda else 0,
        pin_memory=cuda,
        lengths=lengths_of(data.train) if recipe.train.group_by_length else None,
        **_loading(recipe, data, mesh),
    )
    return train, make_eval_loader(recipe, data, mesh)


def make_eval_loader(recipe: Recipe, data: Data, mesh: Mesh) -> BatchLoader | None:
    """Loader of the evaluation data, None where there are none."""
    if data.facts.num_eval == 0:
        return None
    return BatchLoader(
        data.eval,
        micro_batch_size=recipe.eval_batch_size,
        shuffle=False,
        drop_last=False,
        **_loading(recipe, data, mesh),
    )


def whole_eval_loader(recipe: Recipe, data: Data) -> BatchLoader:
    """Loader of all evaluation data for one rank alone, which must have read them."""
    size, collate = recipe.eval_batch_size, _collator(recipe, data)
    return BatchLoader(
        data.eval, micro_batch_size=size, dp_rank=0, dp_size=1, seed=0, shuffle=False,
        collate=collate, drop_last=False,
    )  # fmt: skip


def _loading(recipe: Recipe, data: Data, mesh: Mesh) -> dict[str, Any]:
    """What the two loaders have in common."""
    return {
        "dp_rank": mesh.dp_rank,
        "dp_size": mesh.dp_size,
        "seed": recipe.train.seed,
        "collate": _collator(recipe, data),
        "num_workers": recipe.train.dataloader_num_workers,
    }


def _collator(recipe: Recipe, data: Data) -> Any:
    if data.tokenizer is None:
        return _no_batch
    return Collator(data.tokenizer, pad_to_multiple_of=_options(recipe).pad_to_multiple_of)


def _no_batch(samples: list[Any]) -> Any:
    raise AssertionError("only first-stage ranks read data")
