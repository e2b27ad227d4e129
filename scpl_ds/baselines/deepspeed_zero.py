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
    """DeepSpeed with ZeRO over all ranks: each updates its share of the parameters.

    ZeRO-1 sends gradients once a step, as ZeRO-2, which sends them once a micro-batch, does not.
    ZeRO-3 sends them as ZeRO-2 does, and gathers the parameters for every forward and backward.
    """

    def __init__(self, name: str, job: Job, mesh: Mesh, zero_stage: int) -> None:
        super().__init__(name, job, mesh, mesh.world_size)
        assert self.part is not None
        # Before DeepSpeed takes the parameters apart.
        self._bytes_a_step = ring_bytes(self.part.parameters(), self.ranks)
        if zero_stage == 3:  # a ring gathers, or reduces to its owners, with half of that
            self._bytes_a_step = self._bytes_a_step // 2 * 3 * (self.rows // self.piece)
        self._world = WholeWorld()
        with self._world.building(job) as deepspeed:
            self.engine: Any = deepspeed.initialize(
                model=self.part,
                optimizer=job.optimizer(self.part.named_parameters()),
                config=config(
                    job,
                    micro_batch_size=self.piece,
                    accumulation=self.rows // self.piece,
                    zero_stage=zero_stage,
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
        self.bytes_sent += self._bytes_a_step
        return torch.stack(losses).mean()

    def parameters(self) -> dict[str, Tensor]:
        """Whole ones; with ZeRO-3 a collective over all ranks."""
        import deepspeed

        assert self.part is not None
        partitioned = [p for p in self.part.parameters() if hasattr(p, "ds_id")]
        if not partitioned:
            return super().parameters()
        with self._world.training(), deepspeed.zero.GatheredParameters(partitioned):
            return {name: tensor.clone() for name, tensor in super().parameters().items()}
