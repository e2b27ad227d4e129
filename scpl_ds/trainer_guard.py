"""What stands around a run: its lock, its watch over the other ranks, and what signals mean."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.stop import CommonStop
from scpl_ds.distributed.watch import Watch
from scpl_ds.engine import Engine
from scpl_ds.errors import DivergenceError
from scpl_ds.lock import RunLock
from scpl_ds.recipe import Recipe
from scpl_ds.run_folder import RunFolder
from scpl_ds.trainer_losses import Losses

_SIGNALS = ("SIGTERM", "SIGUSR1")
_WATCHED = ("loss", "head_loss", "grad_norm")
_SKIPPED_STEPS = 50
"""In fp16 a step is left out whose gradients are not finite; so many in a row are no accident."""


class Guard(NamedTuple):
    """Of one run, on one rank."""

    folder: RunFolder
    lock: RunLock
    watch: Watch
    stop: CommonStop


@contextlib.contextmanager
def guarded(recipe: Recipe, mesh: Mesh) -> Iterator[Guard]:
    """Around a run, on every rank: SIGTERM and SIGUSR1 ask for a stop, failures are told, and the
    run folder, once its lock is taken, is given free."""
    folder = RunFolder(recipe.output_dir)
    lock = RunLock(folder.path)
    try:
        with Watch(mesh, log_of=folder.log_file) as watch:
            stop = CommonStop(mesh, token=watch.token, ahead=steps_ahead(recipe, mesh))
            with _signals_ask(stop):
                yield Guard(folder, lock, watch, stop)
    finally:
        lock.release()


def steps_ahead(recipe: Recipe, mesh: Mesh) -> int:
    """How many steps a rank may have begun that rank 0 has not ended: one, while data-parallel
    ranks wait for each other in every step. First stages that learn nothing do not; only the last
    stage, which learns, holds them back, over the messages on their way to it."""
    scpl = recipe.scpl
    if mesh.dp_size == 1 or scpl.freeze_stages == 0:
        return 1
    messages = mesh.pp_size * (scpl.max_in_flight + 2)
    accumulation = recipe.deepspeed.batch(mesh.dp_size).accumulation
    return 2 + math.ceil(messages / accumulation)


@contextlib.contextmanager
def _signals_ask(stop: CommonStop) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        stop.ask(signal.Signals(number).name)

    before = {name: signal.signal(getattr(signal, name), ask) for name in _SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            # None: it was set in C (by MPI, say), where Python cannot put it back.
            signal.signal(getattr(signal, name), handler or signal.SIG_DFL)


class Health:
    """Ends a run whose losses or gradients are no numbers any more, before it saves them.

    Nothing is computed for it: it reads what is logged, and at a save what the last step left.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine, self._folder = engine, folder
        computed_in = (engine.section.precision, engine.section.autocast)
        self._patience = _SKIPPED_STEPS if "fp16" in computed_in else 1
        self._bad = 0
        self.losses = Losses()

    def logged(self, step: int, values: dict[str, float]) -> None:
        """What all ranks found in ``step``; on rank 0.

        Raises:
            DivergenceError: Something of it is NaN or infinite.
        """
        named = {name: value for name, value in values.items() if _is_watched(name)}
        if not named:
            return
        found = _first_bad(named)
        self._bad = self._bad + 1 if found is not None else 0
        if found is not None and self._bad >= self._patience:
            raise self._diverged(step, found)
        self.losses.logged(step, _finite_losses(named))

    def before_save(self, step: int) -> None:
        """On every rank, which waits for the others; all raise the same.

        Raises:
            DivergenceError: A loss or gradient norm of the last step is NaN or infinite.
        """
        if self._patience > 1:
            return  # the step was left out: the weights are those of the step before
        own = {n: float(v) for n, v in self._engine.metrics().items() if _is_watched(n)}
        everywhere = gather_objects(self._engine.mesh, own)
        found = [bad for each in everywhere if (bad := _first_bad(each)) is not None]
        if found:
            raise self._diverged(step, found[0])
        for each in everywhere:
            self.losses.seen(step, _finite_losses(each))

    def _diverged(self, step: int, found: tuple[str, float]) -> DivergenceError:
        name, value = found
        stage, _, what = name.partition("/")
        if stage == "head":
            stage, what = f"stage{self._engine.num_stages - 1}", "task loss"
        what = {"loss": "local loss", "grad_norm": "gradient norm"}.get(what, what)
        return DivergenceError(
            f"The {what} of stage {stage.removeprefix('stage')} is {value} at step {step}: the run "
            "has diverged, and no checkpoint is written with such weights. Those in "
            f"{self._folder} are from before. Lower the learning rate or warm up longer, clip "
            "gradients (deepspeed.gradient_clipping), or train in bf16 or fp32, and go on with "
            "train.resume_from_checkpoint=true."
        )


def _is_watched(name: str) -> bool:
    return name == "head/loss" or (name[:5] == "stage" and name.partition("/")[2] in _WATCHED)


def _finite_losses(values: dict[str, float]) -> dict[str, float]:
    return {n: v for n, v in values.items() if n.endswith("loss") and math.isfinite(v)}


def _first_bad(values: dict[str, float]) -> tuple[str, float] | None:
    """Of the first stage that has one: what is broken there breaks the stages behind it. Its loss
    before its gradient."""
    bad = [(name, value) for name, value in values.items() if not math.isfinite(value)]

    def place(item: tuple[str, float]) -> tuple[float, bool]:
        stage, _, what = item[0].partition("/")
        return (float(stage[5:]) if stage != "head" else math.inf), what == "grad_norm"

    return min(bad, key=place, default=None)
