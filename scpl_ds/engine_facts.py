"""What DeepSpeed users ask an engine about itself."""

from __future__ import annotations

from collections.abc import Callable

import torch

from scpl_ds.distributed.mesh import Grid, Mesh
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.partition.plan import PartitionPlan
from scpl_ds.stage import Stage


class EngineFacts:
    """Where this rank stands, what it holds, and the arithmetic of its batches."""

    stages: list[Stage]
    plan: PartitionPlan
    mesh: Mesh
    section: DeepSpeedSection
    global_steps: int
    lr_at: Callable[[int], float]

    @property
    def grid(self) -> Grid:
        m = self.mesh
        return Grid(m.pp_size, m.dp_size, m.pp_rank, m.dp_rank)

    @property
    def num_stages(self) -> int:
        return self.plan.num_stages

    @property
    def stage_id(self) -> int:
        return self.stages[0].index

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step (gradient accumulation steps)."""
        return self.section.gradient_accumulation_steps

    @property
    def module(self) -> torch.nn.Module:
        return torch.nn.ModuleList(stage.module for stage in self.stages)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of this rank's last stage."""
        return self.stages[-1].backend.optimizer

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.section.micro_batch_size

    def gradient_accumulation_steps(self) -> int:
        return self.micro_batches

    def train_batch_size(self) -> int:
        """Samples of one optimizer step, over all data-parallel ranks."""
        return self.section.micro_batch_size * self.micro_batches * self.mesh.dp_size

    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage (the one that reads the data)."""
        return self.mesh.previous_rank is None

    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage (the one with the task head)."""
        return self.mesh.next_rank is None

    def get_lr(self) -> list[float]:
        return [self.lr_at(self.global_steps)]
