"""ZeRO's data parallelism, as DeepSpeed has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scpl_ds.baselines._base import Job, ring_bytes
from scpl_ds.baselines._deepspeed import WholeWorld, config
from scpl_ds.baselines.data_parallel import Replica
from scpl_ds.distributed.mesh import Mesh


class Zero(Replica):
    """DeepSpeed with ZeRO-1 over all ranks: each updates its share of the parameters.

    ZeRO-1 and not 2, which would send gradients once a micro-batch and not once a step.
    """

    def __init__(self, name: str, job: Job, mesh: Mesh) -> None:
        super().__init__(name, job, mesh, mesh.world_size)
        assert self.part is not None
        self._world = WholeWorld()
        with self._world.building(job) as deepspeed:
            self.engine: Any = deepspeed.initialize(
                model=self.part,
                optimizer=job.optimizer(self.part.named_parameters()),
                config=config(
                    job,
                    micro_batch_size=self.piece,
                    accumulation=self.rows // self.piece,
                    zero_stage=1,
                ),
                dist_init_required=False,
            )[0]

    def _train_batch(self, inputs: dict[str, Tensor]) -> Tensor | None:
        self.set_lr(self.engine.optimizer)
        losses: list[Tensor] = []
        with self._world.training():
            for number, piece in enumerate(self.pieces(inputs)):
                with self.doing("forward", 0, number):
                    loss = self.engine(piece["input_ids"], **piece)
                with self.doing("backward", 0, number):
                    self.engine.backward(loss)
                with self.doing("step"):
                    self.engine.step()  # only counts, until the last
                losses.append(loss.detach())
        self.bytes_sent += ring_bytes(self.engine.module.parameters(), self.ranks)
        return torch.stack(losses).mean()
