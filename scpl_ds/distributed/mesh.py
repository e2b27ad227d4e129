"""Where this rank stands: its pipeline rank, its data-parallel rank, its neighbours, its groups."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scpl_ds.errors import RecipeError


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where this rank stands, under DeepSpeed's names."""

    pipe_parallel_size: int
    data_parallel_size: int
    stage_id: int
    data_parallel_id: int

    def get_pipe_parallel_rank(self) -> int:
        return self.stage_id

    def get_data_parallel_rank(self) -> int:
        return self.data_parallel_id


class Mesh:
    """P pipeline ranks x D data-parallel ranks; global rank = pp * D + dp, as DeepSpeed lays them
    out.

    The data-parallel neighbours of a stage have consecutive ranks, so a stage's gradient traffic
    stays inside a node while only activations cross nodes.

    Groups are made once, by all ranks in the same order: making one later would be a collective
    in the middle of a streamed run.
    """

    def __init__(
        self, pipeline_ranks: int, data_parallel_ranks: int, device_type: str, *, timeout_s: float
    ) -> None:
        world = dist.get_world_size()
        if pipeline_ranks * data_parallel_ranks != world:
            raise RecipeError(
                f"{pipeline_ranks} pipeline ranks x {data_parallel_ranks} data-parallel ranks need "
                f"{pipeline_ranks * data_parallel_ranks} ranks, but WORLD_SIZE is {world}."
            )
        self.rank = dist.get_rank()
        self.pp_size, self.dp_size = pipeline_ranks, data_parallel_ranks
        self.pp_rank, self.dp_rank = divmod(self.rank, data_parallel_ranks)
        self.timeout_s = timeout_s
        self.device_mesh: DeviceMesh = init_device_mesh(
            device_type, (pipeline_ranks, data_parallel_ranks), mesh_dim_names=("pp", "dp")
        )
        self.dp_group: Any = self.device_mesh.get_group("dp")
        timeout = datetime.timedelta(seconds=timeout_s)
        # Headers, CPU payloads and control words: gloo always, and apart from the collectives.
        self.boundary_group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.control_group: Any = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def world_size(self) -> int:
        return self.pp_size * self.dp_size

    @property
    def previous_rank(self) -> int | None:
        """Global rank that sends to this one; None on the first pipeline rank."""
        return self.rank - self.dp_size if self.pp_rank > 0 else None

    @property
    def next_rank(self) -> int | None:
        """Global rank that this one sends to; None on the last pipeline rank."""
        return self.rank + self.dp_size if self.pp_rank < self.pp_size - 1 else None

    @property
    def stage_ranks(self) -> list[int]:
        """Global ranks that share this rank's stages (its data-parallel group), in dp order."""
        first = self.pp_rank * self.dp_size
        return list(range(first, first + self.dp_size))

    def rank_of(self, pp_rank: int, dp_rank: int = 0) -> int:
        return pp_rank * self.dp_size + dp_rank

    def name(self) -> str:
        """``pp1 dp0``: how this rank is called in logs."""
        return f"pp{self.pp_rank} dp{self.dp_rank}"
