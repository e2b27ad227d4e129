"""How many steps a run has, and what is due after which."""

from __future__ import annotations

import dataclasses

from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.stream_loader import StreamLoader
from scpl_ds.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands and where it will end."""

    total_steps: int
    steps_per_epoch: int | None
    """None: a stream, which is taken to end where the run does."""
    done: int = 0

    @classmethod
    def of(cls, recipe: Recipe, loader: BatchLoader | StreamLoader, dp_size: int) -> Progress:
        """A new run over what ``loader`` gives one of ``dp_size`` data-parallel ranks."""
        train = recipe.train
        if isinstance(loader, StreamLoader):
            return cls(train.max_steps, None)
        per_epoch = loader.num_micro_batches_per_epoch
        per_epoch //= recipe.deepspeed.batch(dp_size).accumulation
        total = (
            train.max_steps if train.max_steps > 0 else round(per_epoch * train.num_train_epochs)
        )
        return cls(max(1, total), per_epoch)

    def epoch(self, step: int) -> float:
        return step / (self.steps_per_epoch or self.total_steps)

    def due(self, strategy: str, every: int | None, step: int) -> bool:
        """Whether ``strategy`` (``no``, ``steps``, ``epoch``) asks for something after ``step``."""
        if strategy == "steps":
            return every is not None and step % every == 0
        return strategy == "epoch" and step % (self.steps_per_epoch or self.total_steps) == 0
