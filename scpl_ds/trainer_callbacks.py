"""A run that calls transformers' ``TrainerCallback``s and does what they ask for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState
from transformers.trainer_utils import speed_metrics

from scpl_ds.data.loader import BatchLoader
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.distributed.patience import wait_for_all
from scpl_ds.distributed.stop import CommonRequests
from scpl_ds.distributed.world import RankEnv
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.evaluation import See
from scpl_ds.trainer_guard import steps_ahead
from scpl_ds.trainer_hooks import Asked, Hooks
from scpl_ds.trainer_predictions import ComputeMetrics, Preprocess, predict

if TYPE_CHECKING:
    from scpl_ds.trainer import Run

_WORDS = tuple(field.name for field in dataclasses.fields(Asked))
_NEVER = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_prediction_step")
"""Events inside of a step: each stage has its own, at its own time."""


class _Flow(DefaultFlowCallback):
    """When to log, evaluate and save is the recipe's; the handler only looks for this class."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return control


def hf_metrics(metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    """``val/loss`` -> ``eval_loss``."""
    return {f"{prefix}_{name.removeprefix('val/')}": value for name, value in metrics.items()}


class Callbacks(Hooks):
    """Calls callbacks on every rank, each with this rank's own state and control.

    What one rank asks for in an evaluation, a save or at the end of an epoch holds for all at once:
    all ranks are there. What is asked for within an epoch is done a step later, everywhere after
    the same one, so that no stage waits for another (``CommonRequests``).

    Args:
        args: The script's.
        callbacks: Classes or instances.
        model: Handed to callbacks.
        processing_class: Handed to callbacks.
        compute_metrics: Of the script.
        preprocess: Likewise.

    Raises:
        RecipeError: A callback wants to hear of something inside a step.
    """

    def __init__(
        self,
        args: TrainingArguments,
        callbacks: Sequence[Any],
        *,
        model: Any,
        processing_class: Any,
        compute_metrics: ComputeMetrics | None,
        preprocess: Preprocess | None,
    ) -> None:
        super().__init__()
        self.args, self.state, self.control = args, TrainerState(), TrainerControl()
        self.compute_metrics, self.preprocess = compute_metrics, preprocess
        self.handler: Any = CallbackHandler([_Flow()], model, processing_class, None, None)
        for callback in callbacks:
            self.add(callback)
        self._took = 0.0
        self._run: Run | None = None
        self._steps, self._task_losses = 0, torch.zeros((), dtype=torch.float64)
        self.mean_loss = 0.0
        """The task loss, mean over this call's steps and over data-parallel ranks: as
        ``train_loss`` of transformers, which counts no step before a resumed one, and gives 0 where
        there was none."""

    def add(self, callback: Any) -> None:
        """As ``Trainer.add_callback``."""
        found = callback() if isinstance(callback, type) else callback
        for event in _NEVER:
            if getattr(type(found), event, None) is not getattr(TrainerCallback, event, None):
                raise RecipeError(
                    f"callbacks: {type(found).__name__}.{event} would be called inside of a step, "
                    "which every stage takes at its own time. Use on_step_end."
                )
        self.handler.add_callback(found)

    def call(self, event: str, **more: Any) -> None:
        """One event, for all callbacks.

        Raises:
            RecipeError: A callback asks for the end of an epoch.
        """
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **more)
        if self.control.should_epoch_stop:
            raise RecipeError(
                "callbacks: control.should_epoch_stop was set; an epoch cannot be cut short, as "
                "the position in the data is one number for all ranks. Use should_training_stop."
            )

    # -- of a run --------------------------------------------------------------------------

    def begin(self, run: Run) -> None:
        self._run = run
        self._mesh = mesh = run.mesh
        progress, train, state = run.progress, run.recipe.train, self.state
        # Ranks may have other callbacks; whether they meet must be the same for all.
        self._epochs_are_heard = any(gather_objects(mesh, self._hears("on_epoch_end")))
        self._requests = CommonRequests(
            mesh, token=run.guard.watch.token, ahead=steps_ahead(run.recipe, mesh)
        )
        state.max_steps, state.global_step = progress.total_steps, progress.done
        state.num_train_epochs = -(-progress.total_steps // (progress.steps_per_epoch or 1))
        state.epoch = progress.epoch(progress.done)
        state.is_world_process_zero = mesh.rank == 0
        state.is_local_process_zero = RankEnv.current().local_rank == 0
        state.train_batch_size = run.recipe.deepspeed.micro_batch_size
        state.logging_steps = train.logging_steps
        state.eval_steps = train.eval_steps or state.eval_steps
        state.save_steps = train.save_steps or state.save_steps
        self.handler.optimizer = run.engine.optimizer
        self.handler.train_dataloader = run.train_loader
        self.handler.eval_dataloader = run.eval_loader
        self.call("on_train_begin")

    def before_step(self, step: int) -> None:
        assert self._run is not None
        per_epoch = self._run.progress.steps_per_epoch
        if per_epoch is not None and (step - 1) % per_epoch == 0:
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def after_step(self, step: int) -> None:
        assert self._run is not None
        self._add_up(self._run.engine)
        progress, state = self._run.progress, self.state
        state.global_step, state.epoch = step, progress.epoch(step)
        self.call("on_step_end")
        self.asked = Asked(stop=self.asked.stop)  # perhaps by an evaluation before the first step
        self._requests.ask(self._taken())
        self._also(self._requests.due(step))
        if progress.steps_per_epoch is not None and step % progress.steps_per_epoch == 0:
            self.call("on_epoch_end")
            if self._epochs_are_heard:
                self._meet()

    def _add_up(self, engine: Engine) -> None:
        """On the device, which nobody waits for."""
        self._steps += 1
        if engine.is_last_stage():
            loss = engine.stages[-1].metrics["head_loss"].double()
            self._task_losses = self._task_losses.to(loss.device) + loss

    def last_step(self, show: Callable[[], None]) -> None:
        wait_for_all(self._mesh)  # all have posted their numbers
        show()
        self._meet(self._requests.left())

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        short = {"head/loss": "loss", "lr": "learning_rate"}
        logs = {short.get(name, name): value for name, value in values.items()}
        self._log(logs, step)
        self._requests.ask(self._taken())  # the next step would forget it
        if self._mesh.world_size == 1:
            self._also(self._requests.due(step))

    def score(
        self, engine: Engine, loader: BatchLoader, *, see: See | None = None
    ) -> dict[str, float]:
        began = time.monotonic()
        own = None if self.args.prediction_loss_only else self.compute_metrics
        found = predict(engine, loader, compute_metrics=own, preprocess=self.preprocess, see=see)
        self._took = time.monotonic() - began
        return found.metrics

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._run is not None
        loader = self._run.eval_loader
        found = hf_metrics(metrics)
        if loader is not None:
            found |= self.speed("eval", loader)
        found["epoch"] = self.state.epoch
        self._log(found, step)
        self.call("on_evaluate", metrics=found)
        self._choose(found, step)
        self._meet()

    def speed(self, prefix: str, loader: BatchLoader) -> dict[str, float]:
        """``eval_runtime`` and so on, of the last ``score``."""
        return speed_metrics(
            prefix,
            time.time() - self._took,
            num_samples=loader.num_samples,
            num_steps=loader.num_micro_batches_per_epoch,
        )

    def saved(self, step: int) -> None:
        assert self._run is not None
        if self._run.best.checkpoint is not None:
            self.state.best_model_checkpoint = str(self._run.best.checkpoint)
        self.call("on_save")
        self._meet()

    def end(self) -> None:
        assert self._run is not None
        engine, mean = self._run.engine, float(self._task_losses) / max(1, self._steps)
        found = gather_objects(self._run.mesh, [mean] if engine.is_last_stage() else [])
        means = [one for own in found for one in own]
        self.mean_loss = sum(means) / len(means)
        # Numbers of training steps reach rank 0 alone while it trains.
        self.state.log_history = broadcast_object(self._run.mesh, self.state.log_history)
        self.call("on_train_end")
        self._run = None

    def _states(self) -> dict[str, list[dict[str, Any]]]:
        """Of those that have one, by the name of their class."""
        found: dict[str, list[dict[str, Any]]] = {}
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        return found

    def kept(self) -> dict[str, Any]:
        kept = dataclasses.asdict(self.state)
        return {"trainer_state": kept | {"stateful_callbacks": self._states()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        kept = state.get("trainer_state")
        if kept is None:
            return
        self.state = TrainerState(**kept)
        if not self.args.restore_callback_states_from_checkpoint:
            return
        for callback in self.handler.callbacks:
            states = kept["stateful_callbacks"].get(type(callback).__name__)
            if states:
                for name, value in states.pop(0)["attributes"].items():
                    setattr(callback, name, value)

    # -- what callbacks ask for ------------------------------------------------------------

    def _taken(self) -> set[str]:
        """What this rank's control asks for, and no longer does."""
        names = {"stop": "should_training_stop"}
        found = {w for w in _WORDS if getattr(self.control, names.get(w, f"should_{w}"))}
        for word in found:
            setattr(self.control, names.get(word, f"should_{word}"), False)
        return found

    def _meet(self, before: Collection[str] = ()) -> None:
        """What any rank asks for, or asked for before; every rank comes here, some perhaps late,
        as callbacks may take long."""
        wait_for_all(self._mesh)
        for words in gather_objects(self._mesh, self._taken().union(before)):
            self._also(words)

    def _also(self, words: Any) -> None:
        for word in words:
            setattr(self.asked, word, True)

    def _hears(self, event: str) -> bool:
        return any(
            getattr(type(callback), event) is not getattr(TrainerCallback, event)
            for callback in self.handler.callbacks
            if not isinstance(callback, _Flow)
        )

    # -- what transformers keeps of a run --------------------------------------------------

    def _log(self, logs: dict[str, Any], step: int) -> None:
        self.state.log_history.append({**logs, "step": step})
        self.call("on_log", logs=logs)

    def _choose(self, metrics: Mapping[str, float], step: int) -> None:
        """As ``Trainer._determine_best_metric``: callbacks hear of the evaluation before."""
        name = self.args.metric_for_best_model
        if name is None:
            return
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
        best = self.state.best_metric
        better = value is not None and (
            best is None or (value > best if self.args.greater_is_better else value < best)
        )
        if better:
            self.state.best_metric, self.state.best_global_step = value, step
