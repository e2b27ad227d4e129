"""Where this rank stands: its pipeline rank, its data-parallel rank, its neighbours, its groups."""

from __future__ import annotations

import dataclasses
import datetime
import socket
from typing import Any

import torch
import torch.distributed as dist

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
        self,
        pipeline_ranks: int,
        data_parallel_ranks: int,
        device: torch.device | str,
        *,
        timeout_s: float,
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
        self._device = torch.device(device)
        # Headers, CPU payloads and control words: gloo always, and apart from the collectives.
        self.boundary_group: Any = self.new_group(None, backend="gloo")
        self.control_group: Any = self.new_group(None, backend="gloo")
        self._dp_backend = self._choose_backend()
        self._channels = 0
        for pp_rank in range(pipeline_ranks):
            ranks = [self.rank_of(pp_rank, dp) for dp in range(data_parallel_ranks)]
            group, control = self.new_group(ranks), self.new_group(ranks, backend="gloo")
            if pp_rank == self.pp_rank:
                self.dp_group: Any = group
                self.dp_control_group: Any = control

    def new_group(self, ranks: list[int] | None, **options: Any) -> Any:
        """A process group of global ``ranks`` (None: all) with this mesh's timeout, on the backend
        of the data-parallel groups unless ``backend`` says otherwise."""
        options.setdefault("backend", getattr(self, "_dp_backend", None))
        timeout = datetime.timedelta(seconds=self.timeout_s)
        return dist.new_group(ranks, timeout=timeout, **options)

    def new_channel_number(self) -> int:
        """A number for one more user of ``boundary_group``, equal on all ranks that ask equally
        often."""
        self._channels += 1
        return self._channels - 1

    @property
    def has_nccl(self) -> bool:
        """Whether every rank has a CUDA device of its own, which NCCL asks for."""
        return self._device.type == "cuda" and self._dp_backend is None and dist.is_nccl_available()

    def _choose_backend(self) -> str | None:
        """NCCL (the world's default on GPUs) unless two ranks share a GPU, which it refuses."""
        if self._device.type != "cuda":
            return "gloo"
        uuid = str(torch.cuda.get_device_properties(self._device).uuid)
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, (socket.gethostname(), uuid), group=self.control_group)
        return None if len(set(everyone)) == len(everyone) else "gloo"

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
