"""From a slice of a model to a stage that is trained, or to one that is not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from scpl_ds.batch import MicroBatch
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.rows import row_gatherer
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.objectives._base import Objective
from scpl_ds.sharding._base import MakeOptimizer, StageBackend, trainable
from scpl_ds.sharding._frozen import FrozenBackend
from scpl_ds.stage import DetachFeatures, LocalStage, Stage, StageBody

log = logging.getLogger(__name__)


class FrozenStage(Stage):
    """A stage that stays as it is: it has no objective, no dropout and no optimizer."""

    def forward(self, batch: MicroBatch) -> MicroBatch:
        """What the next stage gets; on the last stage the task loss counts, though none learns."""
        batch, loss = self.evaluate(batch)
        self.logits = None
        if loss is not None:
            self.count({"loss": loss, "head_loss": loss})
        return batch

    def backward(self, *, last: bool) -> None:
        """Nothing."""

    def step(self, lr: float, *, clip_to: float | None = None) -> None:
        """Nothing but the means of the step."""
        self.close_step({})


def rests(module: LocalStage) -> bool:
    """Whether a stage of a model with adapters has nothing to train: no adapter, and no local head
    with weights."""
    return module.body.kept is not None and not trainable(module)


def build_stage(
    index: int,
    body: StageBody,
    *,
    make_objective: Callable[[int | None], Objective] | None,
    detach_features: DetachFeatures,
    make_optimizer: MakeOptimizer,
    backend: type[StageBackend],
    section: DeepSpeedSection,
    mesh: Mesh,
    device: torch.device,
    seed: int,
    frozen: bool = False,
    ahead: StageBody | None = None,
) -> Stage:
    """Put a stage together on ``device``.

    The local head is drawn from (seed, last layer of the stage) alone, so it does not depend on how
    many stages this process builds.

    Args:
        make_objective: From the width of the hidden states; None: the stage has no objective.
        frozen: It is not trained at all; nor is a stage that :func:`rests`.
        ahead: Copies of the next layers, for the local loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed((seed * 1_000_003 + body.end) % 2**63)
        objective = None if make_objective is None else make_objective(body.hidden_size)
        module = LocalStage(body, objective, detach_features=detach_features, ahead=ahead)
    if rests(module):
        if mesh.dp_rank == 0:
            log.info(
                "stage %d (%s) has nothing to train (no adapter, no local head with weights): it "
                "passes its outputs on.",
                index, span_text(body.start, body.end),
            )  # fmt: skip
        frozen, module.objective = True, None
    if module.objective is not None:
        module.objective.see_all_ranks(row_gatherer(mesh))
    # Not requires_grad_(False): a tensor of the model may be shared with a stage that is trained.
    module.train(not frozen)
    chosen = FrozenBackend if frozen else backend
    made = chosen(module, make_optimizer, section, mesh, device)
    return (FrozenStage if frozen else Stage)(index, module, made, seed)


def span_text(start: int, end: int) -> str:
    """Layers ``[start, end)`` in words."""
    return f"layer {start}" if end - start == 1 else f"layers {start} to {end - 1}"
