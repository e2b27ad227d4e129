"""``fit(recipe)``: build, loop, evaluate, save, resume, export."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scpl_ds import checkpoint, export
from scpl_ds import trainer_words as words
from scpl_ds.build_times import from_rank_0
from scpl_ds.checkpoint_disk import writing
from scpl_ds.data.prepared import saved_position
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.errors import CheckpointError
from scpl_ds.evaluation import diagnose
from scpl_ds.generation import Samples
from scpl_ds.recipe import Recipe
from scpl_ds.reporting import Reporter
from scpl_ds.run_folder import RunFolder
from scpl_ds.setup import Parts, make_parts, start_world, together
from scpl_ds.trainer_best import Best
from scpl_ds.trainer_end import export_run, named, publish, score_export
from scpl_ds.trainer_files import write_model_files
from scpl_ds.trainer_guard import Guard, Health, guarded
from scpl_ds.trainer_hooks import Hooks
from scpl_ds.trainer_saves import after_save, forget_passing, is_due, state_of

log = logging.getLogger(__name__)
_SETTLE_S = 8.0
"""How long a rank that fails lets a background save go on: less than ``watch.GRACE_S``."""


def fit(recipe: Recipe, *, on_ready: Callable[[RunFolder], None] | None = None) -> dict[str, Any]:
    """Train a recipe to its end and return its result (what ``result.json`` holds).

    Runs on the launcher's ranks, or on this process alone. Every rank gets the same result.

    Args:
        recipe: From ``load_recipe``.
        on_ready: Called once the run folder exists, before the first step.

    SIGTERM and SIGUSR1, on any rank, end the run after the next step with a checkpoint; the result
    then says ``stopped``, ``steps`` and ``checkpoint``.

    Raises:
        ScplError: Whatever is wrong with recipe, model or data, before the first step.
        BoundaryError: Another rank failed.
        DivergenceError: A loss is NaN or infinite.
    """
    mesh, device = start_world(recipe)
    with guarded(recipe, mesh) as guard:
        return Run(recipe, mesh, device, guard, on_ready=on_ready).fit()


class Run:
    """One run of a recipe on this rank.

    Args:
        recipe: What to do.
        mesh: The ranks.
        device: Of this rank.
        guard: Around this run.
        on_ready: As in ``fit``.
        hooks: Whom it tells how it goes.
        parts: Given, the run works with these and leaves its engine to whoever made them.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        device: torch.device,
        guard: Guard,
        *,
        on_ready: Callable[[RunFolder], None] | None = None,
        hooks: Hooks | None = None,
        parts: Callable[[], Parts] | None = None,
    ) -> None:
        self.recipe, self.mesh, self.device = recipe, mesh, device
        self.guard, self.folder = guard, guard.folder
        self.is_main = mesh.rank == 0
        together(mesh, self._check_folders)
        resume = from_rank_0(mesh, self._find_checkpoint)
        self.hooks, self._frees_engine = hooks or Hooks(), parts is None
        resumed = resume is not None
        made = make_parts(recipe, mesh, device, resumed=resumed) if parts is None else parts()
        self.data, self.model, self.memory = made.data, made.model, made.memory
        self.train_loader, self.eval_loader = made.train_loader, made.eval_loader
        self.progress, self.engine = made.progress, made.engine
        self.best, self.start = Best(recipe.train), words.Start()
        del made  # holds the engine
        together(mesh, lambda: self.best.check(self.model.plan.bounds, self.data.facts.num_eval))
        if resume is not None:
            together(mesh, lambda: self._restore(resume))
        resuming = resume is not None and resume.parent.resolve() == self.folder.path.resolve()
        kept = [name for stage in self.engine.stages for name in stage.module.body.kept or ()]
        trained = [name for names in gather_objects(mesh, kept) for name in names]
        together(mesh, lambda: self._open_folder(trained, resume if resuming else None))
        guard.watch.tell_stages([stage.index for stage in self.engine.stages])
        if on_ready is not None:
            on_ready(self.folder)
        if self.is_main:
            words.log_banner(self)
        self.trackers = words.make_trackers(self, resuming=resuming)
        self.report = Reporter(
            self.engine, self.memory, self.trackers, profile_steps=self._profile_steps()
        )
        self.health = Health(self.engine, self.folder.path)
        self.engine.on_error = guard.watch.tell
        self.saved = -1
        """Step of the last checkpoint that this run wrote."""
        self.passing: Path | None = None
        """The checkpoint that is there for the export only."""
        self.last_eval: dict[str, float] = {}
        self.evaluated = -1
        """Step that ``last_eval`` is of."""
        self.predictions = words.predictions_of(self)
        self.samples: Samples | None = together(mesh, lambda: words.samples_of(self))

    # -- before the first step -------------------------------------------------------------

    def _check_folders(self) -> None:
        train = self.recipe.train
        self.folder.check()
        if self.is_main:
            self.guard.lock.check()
        if train.export and train.export_dir is not None:
            export.check_destination(train.export_dir, key="train.export_dir")

    def _open_folder(self, trained: list[str], resume: Path | None) -> None:
        """On rank 0; the others wait. ``resume``: a checkpoint in it that the run goes on from."""
        if self.is_main:
            with writing(self.folder.path, then="Nothing was trained. Make room or mend the disk."):
                going_on = resume is not None
                self.folder.prepare(self.recipe, resuming=going_on, lock=self.guard.lock)
                checkpoint.sweep(self.folder.path)
                if resume is not None and not resume.name.startswith("."):
                    checkpoint.name_latest(resume)  # for a restart before the next save
                write_model_files(self, trained)
            words.warn_of_no_evaluation(self)
            words.warn_of_no_upload(self)

    def _find_checkpoint(self) -> Path | None:
        return self.folder.resume_point(self.recipe)

    def _restore(self, folder: Path) -> None:
        _, state = self.engine.load_checkpoint(folder)
        if not isinstance(state.get("data"), dict):
            raise CheckpointError(
                f"{folder} holds no data position: it was not written by `scpl-ds train`. Load it "
                "with engine.load_checkpoint, or export it and start from the export."
            )
        self.train_loader.restore(state["data"])
        self.best.restore(state.get("best"), folder.parent)
        self.hooks.restore(state)
        if state.get("fingerprint") != self.recipe.fingerprint() and self.is_main:
            log.warning(
                "The recipe is not the one %s was saved under (%s): the run goes on with the new "
                "settings from step %d.",
                folder, str(state.get("fingerprint", "unknown"))[:12], self.engine.global_steps,
            )  # fmt: skip
        self.progress = dataclasses.replace(self.progress, done=self.engine.global_steps)

    def _profile_steps(self) -> range | None:
        """Counted from where this run begins: a resumed one is profiled too."""
        first, last = self.recipe.train.profile_steps
        done = self.progress.done
        return range(done + first, done + last + 1) if self.recipe.train.profile else None

    # -- the loop --------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        try:
            result = self._fit()
        except BaseException as error:
            self.guard.watch.tell(error)  # first: what follows may take its time
            if hasattr(self, "engine"):  # it is let go at the end
                self.engine.settle_saving(_SETTLE_S)
            self.trackers.finish({}, exit_code=1)
            raise
        self.trackers.finish(result)
        wait_for_all(self.mesh)  # rank 0 may have had much to upload
        self.hooks.end()
        return result

    def _fit(self) -> dict[str, Any]:
        train, progress = self.recipe.train, self.progress
        self.report.start()
        with self.report.paused():
            self._calibrate()
        self.hooks.begin(self)
        if train.eval_on_start and progress.done == 0 and self.eval_loader is not None:
            with self.report.paused():
                self._evaluate(0)
        batches = iter(self.train_loader) if self.engine.is_first_stage() else None
        if progress.done >= progress.total_steps:
            with self.report.paused():
                self._nothing_left()
        for step in range(progress.done + 1, progress.total_steps + 1):
            if self.guard.stop.due(step - 1):
                return self._stop(step - 1)
            self.hooks.before_step(step)
            with self.report.step(step):
                self.engine.train_batch(batches)
            self.hooks.after_step(step)
            asked, last = self.hooks.asked, step == progress.total_steps
            first = step == 1 and train.logging_first_step
            if step % train.logging_steps == 0 or last or first or asked.log:
                extra = {"lr": self.engine.lr_at(step - 1)}
                if progress.steps_per_epoch is not None:
                    extra["epoch"] = progress.epoch(step)
                self.report.post(step, extra)
            self._show()
            if last:
                with self.report.paused():
                    self.hooks.last_step(self._show)
            if (self.eval_loader or self.samples) is not None and (
                progress.due(train.eval_strategy, train.eval_steps, step)
                or (last and train.eval_strategy != "no")
                or asked.evaluate
            ):
                with self.report.paused():
                    self._evaluate(step)
            if is_due(self, step, last=last):
                with self.report.paused():
                    self._save(step)
                    if asked.evaluate and self.eval_loader is not None and self.evaluated < step:
                        self._evaluate(step)
            if asked.stop:
                break
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

    def _stop(self, step: int) -> dict[str, Any]:
        """Asked to end before the last step: leave a checkpoint to go on from."""
        if self.saved != step:
            with self.report.paused():
                self._save(step)
        together(self.mesh, self.engine.finish_saving)
        self.report.show()  # what other ranks had still on its way, up to this step
        reason, total = self.guard.stop.reason, self.progress.total_steps
        folder = self.folder.path / f"checkpoint-{step}"
        if self.is_main:
            log.warning(
                "Stopped by %s after step %d of %d, saved as %s. To go on: "
                "train.resume_from_checkpoint=true (or auto).",
                reason, step, total, folder,
            )  # fmt: skip
        return {
            "stopped": reason,
            "steps": step,
            "checkpoint": str(folder),
            "run_dir": str(self.folder.path),
        }

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
            self.last_eval = self.hooks.score(self.engine, self.eval_loader)
        if train.export:
            self._save(done)

    def _show(self) -> None:
        """Give the trackers what has arrived, and end a run that has gone wrong."""
        for step, values in self.report.show():
            self.health.logged(step, values)
            self.hooks.logged(step, values)

    def _evaluate(self, step: int) -> None:
        self.engine.drain()
        self._show()  # all up to this step has been posted: keep the step axis monotonic
        if self.eval_loader is not None:
            log.info("step %d: evaluating %d samples", step, self.data.facts.num_eval)
            more: dict[str, float] = {}
            see = None if self.predictions is None else self.predictions.see
            if self.recipe.train.diagnostics:
                score, more = diagnose(self.engine, self.eval_loader, see=see)
                self.last_eval = score.metrics()
            else:
                self.last_eval = self.hooks.score(self.engine, self.eval_loader, see=see)
            self.evaluated = step
            together(self.mesh, lambda: self.best.scored(step, self.last_eval))
            self.report.show()
            self.trackers.log({**self.last_eval, **more}, step)
            if self.predictions is not None:
                self.trackers.table("predictions", self.predictions.take(self.mesh), step)
            self.hooks.evaluated(step, self.last_eval)
        if self.samples is not None:
            self.trackers.table("samples", self.samples.take(self.engine), step)

    def _save(self, step: int) -> None:
        train, run = self.recipe.train, self.folder.path
        self.health.before_save(step)
        together(self.mesh, self.guard.lock.require)
        on_saved = after_save(self, step)  # first: it finds out whether this is the best
        state = state_of(self)
        together(
            self.mesh,
            lambda: self.engine.save_checkpoint(
                run,
                client_state=state,
                model_files=self.folder.model_files,
                background=train.save_async,
                deepspeed_files=train.save_deepspeed_files,
                on_saved=on_saved,
            ),
        )
        self.saved = step
        self.hooks.saved(step)

    # -- after the last step ---------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        together(self.mesh, self.engine.finish_saving)
        totals = self.report.finish(self.folder)
        if self.is_main and self.engine.global_steps > self.progress.done:
            words.log_memory(self, totals.peaks)
            self.report.log_shares(totals)
        stages, steps = self.engine.num_stages, self.engine.global_steps
        if self._frees_engine:
            self._free_engine()
        exported = together(self.mesh, self._export)
        final = together(self.mesh, lambda: self._final_score(exported))
        result: dict[str, Any] = {}
        if self.is_main:
            result = {
                **named(final, "eval"),
                "eval_samples": self.data.facts.num_eval,
                "majority_accuracy": self.data.facts.majority_accuracy,
                **named(self.last_eval, "stage_eval"),
                **self.best.result(),
                "stages": stages,
                "ranks": self.mesh.world_size,
                "steps": steps,
                **totals.for_result(),
                "export_dir": None if exported is None else str(exported),
                "run_dir": str(self.folder.path),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
        together(self.mesh, lambda: self._publish(exported, result))
        return broadcast_object(self.mesh, result)

    def _free_engine(self) -> None:
        """Make room for the whole model, which may need what all ranks of this device held."""
        while self.engine.stages:
            self.engine.stages.pop().backend.close()
        del self.engine, self.report, self.health
        gc.collect()  # stages and handlers refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _export(self) -> Path | None:
        """On rank 0; the others wait."""
        if not (self.is_main and self.recipe.train.export):
            return None
        return export_run(self.recipe, self._chosen())

    def _chosen(self) -> Path:
        """The checkpoint that is exported."""
        return self.best.checkpoint or checkpoint.resolve(self.folder.path)

    def _publish(self, exported: Path | None, result: dict[str, Any]) -> None:
        if self.is_main and exported is not None:
            publish(self.recipe, self.folder, self._chosen(), self.trackers, result)
            forget_passing(self)
        elif self.is_main:
            self.folder.write_result(result)

    def _final_score(self, exported: Path | None) -> dict[str, float]:
        """Of the export, by rank 0; the stages' where there is none."""
        if exported is None or self.data.facts.num_eval == 0:
            return self.last_eval
        return score_export(exported, self.recipe, self.data, self.device)
