"""``fit(recipe)``: build, loop, evaluate, save, resume, export."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from scpl_ds import checkpoint, export
from scpl_ds.build_checks import refuse_idle
from scpl_ds.data.prepared import Data, make_loaders, saved_position, whole_eval_loader
from scpl_ds.distributed.collectives import barrier, broadcast_object, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.engine import Engine
from scpl_ds.errors import CheckpointError
from scpl_ds.evaluation import diagnose, evaluate, score_model
from scpl_ds.generation import Samples
from scpl_ds.memory import Workload
from scpl_ds.memory_report import compare
from scpl_ds.meter import MemoryWatch
from scpl_ds.partition.config import generation_config
from scpl_ds.partition.lora import save_config
from scpl_ds.partition.plan import render_plan
from scpl_ds.progress import Progress
from scpl_ds.recipe import Recipe
from scpl_ds.reporting import Reporter
from scpl_ds.run_folder import RunFolder, versions
from scpl_ds.setup import (
    Model,
    cut_model,
    draw_schedule,
    load_data,
    make_engine,
    start_world,
    together,
)
from scpl_ds.trackers._base import TrackerSet

log = logging.getLogger(__name__)


def fit(recipe: Recipe, *, on_ready: Callable[[RunFolder], None] | None = None) -> dict[str, Any]:
    """Train a recipe to its end and return its result (what ``result.json`` holds).

    Runs on the launcher's ranks, or on this process alone. Every rank gets the same result.

    Args:
        recipe: From ``load_recipe``.
        on_ready: Called once the run folder exists, before the first step.

    Raises:
        ScplError: Whatever is wrong with recipe, model or data, before the first step.
    """
    mesh, device = start_world(recipe)
    return Run(recipe, mesh, device, on_ready=on_ready).fit()


class Run:
    """One run of a recipe on this rank."""

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        device: torch.device,
        *,
        on_ready: Callable[[RunFolder], None] | None = None,
    ) -> None:
        self.recipe, self.mesh, self.device = recipe, mesh, device
        self.folder = RunFolder(recipe.output_dir)
        self.is_main = mesh.rank == 0
        together(mesh, self._check_folders)
        resume = together(mesh, self._find_checkpoint)
        self.data: Data = load_data(recipe, mesh)
        self.model: Model = together(mesh, lambda: cut_model(recipe, self.data.facts))
        self.train_loader, self.eval_loader = together(
            mesh, lambda: make_loaders(recipe, self.data, mesh, device)
        )
        self.progress = Progress.of(recipe, self.train_loader, mesh.dp_size)
        self.memory = MemoryWatch(device)
        self.engine: Engine = together(
            mesh,
            lambda: make_engine(
                recipe, self.model, mesh, device, total_steps=self.progress.total_steps
            ),
        )
        together(mesh, lambda: refuse_idle(self.engine.stages, mesh))
        if resume is not None:
            together(mesh, lambda: self._restore(resume))
        resuming = resume is not None and resume.parent.resolve() == self.folder.path.resolve()
        kept = [name for stage in self.engine.stages for name in stage.module.body.kept or ()]
        trained = [name for names in gather_objects(mesh, kept) for name in names]
        if self.is_main:
            self.folder.prepare(recipe, resuming=resuming)
            self._write_model_files(trained)
            self._warn_of_no_evaluation()
        barrier(mesh)
        if on_ready is not None:
            on_ready(self.folder)
        if self.is_main:
            self._banner()
        self.trackers = self._make_trackers(resuming=resuming)
        self.report = Reporter(
            self.engine, self.memory, self.trackers, profile_steps=self._profile_steps()
        )
        self.last_eval: dict[str, float] = {}
        self.samples: Samples | None = together(mesh, self._make_samples)

    # -- before the first step -------------------------------------------------------------

    def _check_folders(self) -> None:
        train = self.recipe.train
        self.folder.check()
        if train.export and train.export_dir is not None:
            export.check_destination(train.export_dir, key="train.export_dir")

    def _warn_of_no_evaluation(self) -> None:
        strategy = self.recipe.train.eval_strategy
        if self.eval_loader is None and strategy != "no":
            log.warning(
                "train.eval_strategy is '%s', but '%s' has no evaluation split: nothing is "
                "evaluated. Give one (data.eval_file, data.eval_fraction, data.eval_split), or set "
                "train.eval_strategy: no.",
                strategy, self.recipe.data.name,
            )  # fmt: skip

    def _make_samples(self) -> Samples | None:
        prompts, most = self.recipe.train.sample_prompts, self.recipe.train.sample_max_new_tokens
        if not prompts:
            return None
        model, revision = self.model, self.recipe.model.revision
        own = generation_config(model.path, revision=revision) if self.is_main else None
        return Samples(self.data.tokenizer, prompts, most, model.config, own)

    def _find_checkpoint(self) -> Path | None:
        asked = self.recipe.train.resume_from_checkpoint
        if asked is False:
            return None
        return checkpoint.resolve(self.folder.path if asked is True else Path(asked))

    def _restore(self, folder: Path) -> None:
        _, state = self.engine.load_checkpoint(folder)
        if "data" not in state:
            raise CheckpointError(
                f"{folder} holds no data position: it was not written by `scpl-ds train`. Load it "
                "with engine.load_checkpoint, or export it and start from the export."
            )
        self.train_loader.restore(state["data"])
        if state.get("fingerprint") != self.recipe.fingerprint() and self.is_main:
            log.warning(
                "The recipe is not the one %s was saved under (%s): the run goes on with the new "
                "settings from step %d.",
                folder, state.get("fingerprint", "unknown")[:12], self.engine.global_steps,
            )  # fmt: skip
        self.progress = dataclasses.replace(self.progress, done=self.engine.global_steps)

    def _write_model_files(self, trained: list[str]) -> None:
        model, asked = self.model, self.recipe.model
        self.folder.model_files.mkdir(exist_ok=True)
        model.config.save_pretrained(self.folder.model_files)
        if asked.task == "causal-lm":
            own = generation_config(model.path, revision=asked.revision)
            if own is not None:
                own.to_json_file(self.folder.model_files / "generation_config.json")
        self.data.tokenizer.save_pretrained(self.folder.model_files)
        if model.adapters is not None:
            save_config(
                model.adapters, self.folder.model_files, model.anatomy, trained,
                base=model.path, revision=asked.revision,
            )  # fmt: skip
        self.folder.plan.write_text(self._plan_text() + "\n")

    def _plan_text(self) -> str:
        m = self.mesh
        return render_plan(
            self.model.plan, self.model.anatomy, pipeline_ranks=m.pp_size, data_parallel=m.dp_size
        )

    def _banner(self) -> None:
        sizes = self.recipe.deepspeed.batch(self.mesh.dp_size)
        shown = min(sizes.accumulation, 4)
        drawing = draw_schedule(self.recipe, self.engine.num_stages, max(2, shown))
        together = self.recipe.scpl.method != "scpl" or self.recipe.scpl.clip_scope == "global"
        total, count = self.progress.total_steps, self.data.facts.num_train
        epochs = "a stream" if count is None else f"{self.progress.epoch(total):.2f} epochs"
        log.info("%s\n", self._plan_text())
        log.info("schedule '%s', first micro-batches:\n%s\n", self.recipe.scpl.order, drawing)
        log.info(
            "global batch %d = micro-batch %d x %d micro-batches x %d dp; %s training and %d "
            "evaluation samples; %d steps (%s); clip %g %s; run folder %s",
            sizes.global_batch, sizes.micro_batch, sizes.accumulation, self.mesh.dp_size,
            count or "streamed", self.data.facts.num_eval, total, epochs,
            self.recipe.deepspeed.gradient_clipping,
            "over all stages" if together else "per stage", self.folder.path,
        )  # fmt: skip

    def _make_trackers(self, *, resuming: bool) -> TrackerSet:
        if not self.is_main:
            return TrackerSet([])
        sections = [choice.model_dump(mode="json") for choice in self.recipe.trackers]
        if self.recipe.train.disable_tqdm:
            for section in sections:
                if section["name"] == "console":
                    section["progress"] = False
        trackers = TrackerSet.build(
            sections, run_dir=self.folder.path, resume=resuming, run_name=self.recipe.name
        )
        config = {
            "recipe": self.recipe.to_mapping(),
            "partition": self.model.plan.rows(
                self.model.anatomy,
                pipeline_ranks=self.mesh.pp_size,
                data_parallel=self.mesh.dp_size,
            ),
            "ranks": self.mesh.world_size,
            "device": str(self.device),
            "versions": versions(),
            "fingerprint": self.recipe.fingerprint(),
        }
        trackers.start(
            config,
            total_steps=self.progress.total_steps,
            resumed_step=self.progress.done if resuming else None,
        )
        return trackers

    def _profile_steps(self) -> range | None:
        """Counted from where this run begins: a resumed one is profiled too."""
        first, last = self.recipe.train.profile_steps
        done = self.progress.done
        return range(done + first, done + last + 1) if self.recipe.train.profile else None

    # -- the loop --------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        try:
            result = self._fit()
        except BaseException:
            self.trackers.finish({}, exit_code=1)
            raise
        self.trackers.finish(result)
        return result

    def _fit(self) -> dict[str, Any]:
        train, progress = self.recipe.train, self.progress
        self.report.start()
        with self.report.paused():
            self._calibrate()
        batches = iter(self.train_loader) if self.engine.is_first_stage() else None
        if progress.done >= progress.total_steps:
            with self.report.paused():
                self._nothing_left()
        for step in range(progress.done + 1, progress.total_steps + 1):
            with self.report.step(step):
                self.engine.train_batch(batches)
            last = step == progress.total_steps
            if step % train.logging_steps == 0 or last:
                extra = {"lr": self.engine.lr_at(step - 1)}
                if progress.steps_per_epoch is not None:
                    extra["epoch"] = progress.epoch(step)
                self.report.post(step, extra)
            self.report.show()
            if (self.eval_loader or self.samples) is not None and (
                progress.due(train.eval_strategy, train.eval_steps, step)
                or (last and train.eval_strategy != "no")
            ):
                with self.report.paused():
                    self._evaluate(step)
            if progress.due(train.save_strategy, train.save_steps, step) or (
                last and (train.save_strategy != "no" or train.export)
            ):
                with self.report.paused():
                    self._save(step)
        return self._finish()

    def _calibrate(self) -> None:
        """On the batches that the run goes on with: a checkpoint's place in the data is that of the
        loader, which therefore is put back, not of an iterator that has some in hand."""
        if not self.recipe.scpl.calibrates or self.progress.done >= self.progress.total_steps:
            return
        place = saved_position(self.train_loader, self.mesh)
        batches = iter(self.train_loader) if self.engine.is_first_stage() else None
        self.engine.calibrate(batches, put_back=False)
        self.train_loader.restore(place)

    def _nothing_left(self) -> None:
        """Resumed behind the last step: give the result that the run would have ended with."""
        done, train = self.progress.done, self.recipe.train
        if self.is_main:
            log.warning(
                "Nothing is left to train: the checkpoint is at step %d of %d. To go on, raise "
                "train.num_train_epochs or train.max_steps.",
                done, self.progress.total_steps,
            )  # fmt: skip
        if self.eval_loader is not None and train.eval_strategy != "no":
            self.last_eval = evaluate(self.engine, self.eval_loader).metrics()
        if train.export:
            self._save(done)

    def _evaluate(self, step: int) -> None:
        self.engine.drain()
        self.report.show()  # all up to this step has been posted: keep the step axis monotonic
        if self.eval_loader is not None:
            log.info("step %d: evaluating %d samples", step, self.data.facts.num_eval)
            more: dict[str, float] = {}
            if self.recipe.train.diagnostics:
                score, more = diagnose(self.engine, self.eval_loader)
            else:
                score = evaluate(self.engine, self.eval_loader)
            self.last_eval = score.metrics()
            self.report.show()
            self.trackers.log({**self.last_eval, **more}, step)
        if self.samples is not None:
            self.trackers.texts("samples", self.samples.take(self.engine), step)

    def _save(self, step: int) -> None:
        train = self.recipe.train
        state = {
            "data": saved_position(self.train_loader, self.mesh),
            "fingerprint": self.recipe.fingerprint(),
            "recipe": self.recipe.to_mapping(),
            "versions": versions(),
        }
        self.engine.save_checkpoint(
            self.folder.path, client_state=state, model_files=self.folder.model_files
        )
        if self.is_main:
            checkpoint.prune(self.folder.path, train.save_total_limit)
            log.info("saved checkpoint-%d", step)

    # -- after the last step ---------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        totals = self.report.finish(self.folder)
        if self.is_main and self.engine.global_steps > self.progress.done:
            work = Workload.of(self.recipe, self.model, self.device.type)
            log.info("%s", compare(work, totals.peaks, self.mesh.pp_size, self.mesh.dp_size))
            self.report.log_shares(totals)
        stages, steps = self.engine.num_stages, self.engine.global_steps
        self._free_engine()
        exported = together(self.mesh, self._export)
        final = together(self.mesh, lambda: self._final_score(exported))
        result: dict[str, Any] = {}
        if self.is_main:
            result = {
                **_named(final, "eval"),
                "majority_accuracy": self.data.facts.majority_accuracy,
                **_named(self.last_eval, "stage_eval"),
                "stages": stages,
                "ranks": self.mesh.world_size,
                "steps": steps,
                **totals.for_result(),
                "export_dir": None if exported is None else str(exported),
                "run_dir": str(self.folder.path),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            self.folder.write_result(result)
        return broadcast_object(self.mesh, result)

    def _free_engine(self) -> None:
        """Make room for the whole model, which may need what all ranks of this device held."""
        while self.engine.stages:
            self.engine.stages.pop().backend.close()
        del self.engine, self.report
        gc.collect()  # stages and handlers refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _export(self) -> Path | None:
        """On rank 0; the others wait."""
        if not (self.is_main and self.recipe.train.export):
            return None
        latest = checkpoint.resolve(self.folder.path)
        return export.export_checkpoint(latest, self.recipe.export_dir, task=self.recipe.model.task)

    def _final_score(self, exported: Path | None) -> dict[str, float]:
        """Of the export, loaded as anybody would and scored on all evaluation data by rank 0; the
        stages' where there is none."""
        if exported is None or self.data.facts.num_eval == 0:
            return self.last_eval
        log.info("scoring the exported model on %d samples", self.data.facts.num_eval)
        model = export.load_exported(exported, self.recipe.model.task)
        whole = whole_eval_loader(self.recipe, self.data)
        return score_model(model, whole, self.device).metrics()


def _named(score: Mapping[str, float], prefix: str) -> dict[str, float | None]:
    """The number that says how good a model is, for ``result.json``: ``eval_accuracy``, or
    ``eval_perplexity`` of a language model."""
    name = "perplexity" if "val/perplexity" in score else "accuracy"
    return {f"{prefix}_{name}": score.get(f"val/{name}")}
