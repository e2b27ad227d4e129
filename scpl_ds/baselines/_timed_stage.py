"""Torch's pipeline stage, with a clock and a count of what it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

Doing = Callable[..., AbstractContextManager[None]]
"""``(kind, stage, micro_batch)`` -> what is entered around an action."""


class TimedStage(PipelineStage):
    """
    Args:
        doing: Entered around every forward and backward.
        sent: Called with the bytes of the tensors that torch is given to send.
    """

    def __init__(
        self, *args: Any, doing: Doing, sent: Callable[[int], None], **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._doing, self._sent = doing, sent

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._doing("forward", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._doing("backward", self.stage_index, bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._doing("backward", self.stage_index, bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._counted(super().get_bwd_send_ops(bwd_chunk_id))

    def _counted(self, sends: Iterable[dist.P2POp]) -> list[dist.P2POp]:
        sends = list(sends)
        self._sent(sum(op.tensor.numel() * op.tensor.element_size() for op in sends))
        return sends
