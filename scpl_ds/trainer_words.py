"""What a run says before its first step, and to whom it reports."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scpl_ds.checkpoint import write_text
from scpl_ds.evaluation_samples import Predictions
from scpl_ds.export_hub import why_not
from scpl_ds.generation import Samples
from scpl_ds.memory import RankMemory, Workload
from scpl_ds.memory_report import compare, predicted, render_ranks
from scpl_ds.memory_sizes import show_size
from scpl_ds.meter_machine import describe_machine
from scpl_ds.partition.config import GenerationConfig, generation_config
from scpl_ds.partition.plan import render_plan
from scpl_ds.recipe_words import method_in_words
from scpl_ds.run_folder import versions
from scpl_ds.setup_schedule import draw_schedule, predict_bubble
from scpl_ds.trackers._base import TrackerSet
from scpl_ds.trainer_end import destination

if TYPE_CHECKING:
    from scpl_ds.setup import Model
    from scpl_ds.trainer import Run

log = logging.getLogger(__name__)
_RANKS_SHOWN = 8
_LINES_SHOWN = 14
_MACHINE = ("cpu", "cores", "memory_bytes", "python")


@dataclasses.dataclass
class Start:
    """What is known before the first step; filled on rank 0, by ``write_start``."""

    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory: list[RankMemory] | str = "not predicted"
    """Of each pipeline rank, or why it is not known."""


def log_memory(run: Run, measured: Sequence[int]) -> None:
    """Bytes at the peak of every rank, beside what was predicted."""
    words = compare(
        run.start.memory, measured, dp_size=run.mesh.dp_size, device_type=run.device.type,
        before=run.memory.before,
    )  # fmt: skip
    log.info("%s", words)


def warn_of_no_evaluation(run: Run) -> None:
    strategy = run.recipe.train.eval_strategy
    if run.eval_loader is None and strategy != "no":
        log.warning(
            "train.eval_strategy is '%s', but '%s' has no evaluation split: nothing is "
            "evaluated. Give one (data.eval_file, data.eval_fraction, data.eval_split), or set "
            "train.eval_strategy: no.",
            strategy, run.recipe.data.name,
        )  # fmt: skip


def samples_of(run: Run) -> Samples | None:
    """What shows the texts of a language model."""
    prompts, most = run.recipe.train.sample_prompts, run.recipe.train.sample_max_new_tokens
    if not prompts:
        return None
    own = own_generation_config(run.model, run.recipe.model.revision) if run.is_main else None
    return Samples(run.data.tokenizer, prompts, most, run.model.config, own)


def own_generation_config(model: Model, revision: str | None) -> GenerationConfig | None:
    """How the model generates, if it says so."""
    if model.whole is not None:
        return model.whole.generation_config
    return generation_config(model.path, revision=revision)


def predictions_of(run: Run) -> Predictions | None:
    """What shows the answers of a classifier."""
    count = run.recipe.train.sample_predictions
    if not count or run.eval_loader is None:
        return None
    return Predictions(run.data, run.eval_loader, count)


def warn_of_no_upload(run: Run) -> None:
    """Said now, not after the training."""
    where = destination(run.recipe)
    if where is not None and (reason := why_not(where)) is not None:
        log.warning("train.push_to_hub: %s. The run goes on, and its export stays here.", reason)


def write_start(run: Run) -> None:
    """On rank 0: ``plan.txt``, for people, and ``about.json``, which ``scpl-ds report`` reads."""
    if run.model.whole is not None:  # its stages share tensors that the prediction would count
        run.start.memory = table = "not predicted for a model that a script made"
    else:
        work = Workload.of(run.recipe, run.model, run.device.type)
        with torch.random.fork_rng(devices=[]):
            run.start.memory = found = predicted(work, run.mesh.pp_size, run.mesh.dp_size)
        table = found if isinstance(found, str) else render_ranks(found, work)
    run.start.about = about(run)
    write_text(run.folder.plan, "\n\n".join([*_banner(run), table]) + "\n")
    starts = [*run.folder.starts(), {"step": run.progress.done, "at": run.start.about["started"]}]
    if run.progress.done == 0:
        starts = starts[-1:]
    write_text(run.folder.about, json.dumps({**run.start.about, "starts": starts}, indent=1) + "\n")


def log_banner(run: Run) -> None:
    """Cut, schedule, arithmetic of the batches, and what is predicted: not more than a screen."""
    cut, schedule, arithmetic = _banner(run)
    for part in (cut, schedule):
        log.info("%s\n", _shortened(part, run.folder.plan))
    log.info("%s", arithmetic)


def about(run: Run) -> dict[str, Any]:
    """What is known of a run before its first step, as plain JSON values."""
    m, facts = run.mesh, run.data.facts
    sizes = run.recipe.deepspeed.batch(m.dp_size)
    bubble = predict_bubble(
        run.recipe, run.model, pipeline_ranks=m.pp_size, micro_batches=sizes.accumulation,
        total_steps=run.progress.total_steps,
    )  # fmt: skip
    share, steps = bubble or (None, None)
    memory: dict[str, Any] = {"note": run.start.memory}
    if not isinstance(run.start.memory, str):
        memory = {"ranks": [dataclasses.asdict(rank) for rank in run.start.memory]}
    machine = describe_machine()
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    return {
        "name": run.recipe.name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model_type": run.model.anatomy.model_type,
        "partition": partition_of(run),
        "cut_by": run.model.plan.method,
        "ranks": m.world_size,
        "pipeline_ranks": m.pp_size,
        "data_parallel": m.dp_size,
        "device": str(run.device),
        "batch": {
            "global": sizes.global_batch,
            "micro": sizes.micro_batch,
            "accumulation": sizes.accumulation,
        },
        "total_steps": run.progress.total_steps,
        "num_train": facts.num_train,
        "num_eval": facts.num_eval,
        "majority_accuracy": facts.majority_accuracy,
        "memory_before_model_bytes": run.memory.before,
        "predicted": {"bubble_fraction": share, "steps": steps, "memory": memory},
        "machine": {"device": device, **{key: machine[key] for key in _MACHINE}},
        "versions": versions(),
        "fingerprint": run.recipe.fingerprint(),
    }


def _banner(run: Run) -> tuple[str, str, str]:
    """Cut, schedule, and the rest a line each."""
    m, facts, total, scpl = run.mesh, run.data.facts, run.progress.total_steps, run.recipe.scpl
    plan, anatomy = run.model.plan, run.model.anatomy
    sizes = run.recipe.deepspeed.batch(m.dp_size)
    cut = render_plan(plan, anatomy, pipeline_ranks=m.pp_size, data_parallel=m.dp_size)
    schedule = f"schedule '{scpl.order}'"
    if m.pp_size > 1:  # one rank takes the stages one after the other: nothing to draw
        drawing = draw_schedule(run.recipe, plan.num_stages, max(2, min(sizes.accumulation, 4)))
        schedule += f", first micro-batches:\n{drawing}"
    else:
        schedule += ": one rank holds all stages, and works on one after the other"
    guess = run.start.about["predicted"]
    share, steps = guess["bubble_fraction"], guess["steps"]
    bubble = "not predicted for this schedule" if share is None else f"{share:.1%}"
    if share is not None:
        lengths = "FLOPs" if plan.times is None else "measured times"
        bubble += f" predicted ({steps} steps simulated, stages as long as their {lengths})"
    memory = run.start.memory
    if not isinstance(memory, str):
        shown = [f"rank {r.rank} {show_size(r.peak)}" for r in memory][:_RANKS_SHOWN]
        more = ["..."] if len(memory) > _RANKS_SHOWN else []
        kind = "pipeline rank" if m.dp_size > 1 else "rank"
        memory = f"{', '.join(shown + more)} predicted at the peak"
        memory = memory if kind == "rank" else memory.replace("rank ", f"{kind} ", 1)
        if run.device.type == "cpu":
            memory += f", on top of {show_size(run.memory.before)} of Python and libraries"
    together = scpl.method != "scpl" or scpl.clip_scope == "global"
    epochs = "a stream" if facts.num_train is None else f"{run.progress.epoch(total):.2f} epochs"
    lines = [
        f"method   {method_in_words(run.recipe.to_mapping()['scpl'])}",
        f"bubble   {bubble}",
        f"memory   {memory}",
        f"batch    train_batch_size {sizes.global_batch} = micro-batch {sizes.micro_batch} x "
        f"accumulation {sizes.accumulation} x data-parallel {m.dp_size}",
        f"data     {facts.num_train or 'streamed'} training and {facts.num_eval} evaluation "
        f"samples; {total} steps ({epochs})",
        f"clip     {run.recipe.deepspeed.gradient_clipping:g} "
        f"{'over all stages' if together else 'per stage'}",
        f"run      {run.folder.path}",
    ]
    return cut, schedule, "\n".join(lines)


def _shortened(text: str, whole: Path) -> str:
    """What fits beside the rest of the banner on a screen."""
    lines = text.splitlines()
    if len(lines) <= _LINES_SHOWN:
        return text
    left = len(lines) - _LINES_SHOWN
    return "\n".join([*lines[: _LINES_SHOWN - 1], f"... {left} more lines in {whole}", lines[-1]])


def make_trackers(run: Run, *, resuming: bool) -> TrackerSet:
    if not run.is_main:
        return TrackerSet([])
    sections = [choice.model_dump(mode="json") for choice in run.recipe.trackers]
    if run.recipe.train.disable_tqdm:
        for section in sections:
            if section["name"] == "console":
                section["progress"] = False
    trackers = TrackerSet.build(
        sections, run_dir=run.folder.path, resume=resuming, run_name=run.recipe.name
    )
    config = {"recipe": run.recipe.to_mapping(), **run.start.about}
    trackers.start(
        config,
        total_steps=run.progress.total_steps,
        resumed_step=run.progress.done if resuming else None,
    )
    trackers.table("partition", partition_of(run), run.progress.done if resuming else 0)
    return trackers


def partition_of(run: Run) -> list[dict[str, Any]]:
    """A row for each stage."""
    m = run.mesh
    return run.model.plan.rows(run.model.anatomy, pipeline_ranks=m.pp_size, data_parallel=m.dp_size)
