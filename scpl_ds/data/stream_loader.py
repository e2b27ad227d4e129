"""Micro-batches of a stream, in an order that no number of data-parallel ranks changes.

A stream is begun in as many *lanes* as there are data-parallel ranks, one for each, which read
disjoint rows. The order of a run is that of its lanes taken in turn, a block of samples each; a
step ends when all have given equally many. Resumed on another number of ranks it keeps its lanes: a
rank reads those that hold blocks of its micro-batches and leaves out the blocks of others.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.utils.data

from scpl_ds.data._workers import in_processes
from scpl_ds.data.loader import Batch, ahead_of
from scpl_ds.data.stream import Position, Stream
from scpl_ds.errors import DataError

log = logging.getLogger(__name__)


class _Lane(NamedTuple):
    """Where a lane stands, as plain values that a process can send."""

    given: int
    """Samples since the loader was made or restored."""
    position: dict[str, Any]


class _State(NamedTuple):
    """Where one rank stands."""

    block: int
    """The next of the step, whosever it is."""
    lanes: dict[int, _Lane]
    """Those that this rank reads."""


class _Turns(NamedTuple):
    """Which lane gives the blocks of a step, and which rank gets them."""

    lanes: int
    dp_size: int
    micro_batch: int
    global_batch: int

    @property
    def size(self) -> int:
        """Samples of a block: no micro-batch and no lane's share of a step ends within one."""
        return math.gcd(self.micro_batch, self.global_batch // self.lanes)

    @property
    def blocks(self) -> int:
        """Blocks of a step."""
        return self.global_batch // self.size

    def lane(self, block: int) -> int:
        return block % self.lanes

    def rank(self, block: int) -> int:
        return block * self.size // self.micro_batch % self.dp_size

    def lanes_of(self, rank: int) -> list[int]:
        """Those with a block for a rank."""
        return sorted({self.lane(b) for b in range(self.blocks) if self.rank(b) == rank})


class StreamLoader:
    """Micro-batches of a stream for one rank of the first stage, without end.

    As with ``BatchLoader`` a batch counts as consumed when it is handed out, whatever was prepared
    beyond it. Positions are saved between optimizer steps.

    Args:
        stream: Of all rows; None on a rank that reads no data.
        micro_batch_size: Samples of a micro-batch.
        collate: List of samples -> batch.
        dp_rank: This rank's place among ``dp_size``.
        dp_size: Data-parallel ranks.
        global_batch_size: Samples per optimizer step over all ranks; None: a micro-batch each.
        num_workers: Above 0, one process prepares batches ahead.
        ahead: With 0 workers, batches that a thread has ready.
        pin_memory: In page-locked memory.
    """

    def __init__(
        self,
        stream: Stream | None,
        *,
        micro_batch_size: int,
        collate: Callable[[list[Any]], Batch],
        dp_rank: int,
        dp_size: int,
        global_batch_size: int | None = None,
        num_workers: int = 0,
        ahead: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.stream, self.collate = stream, collate
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.global_batch_size = global_batch_size or micro_batch_size * dp_size
        self.num_workers, self.ahead, self.pin_memory = num_workers, ahead, pin_memory
        self._generation = 0
        self._begin([Position().plain()] * dp_size)

    def _begin(self, lanes: Sequence[Mapping[str, Any]]) -> None:
        self._turns = _Turns(
            len(lanes), self.dp_size, self.micro_batch_size, self.global_batch_size
        )
        own = self._turns.lanes_of(self.dp_rank)
        self._state = _State(0, {lane: _Lane(0, dict(lanes[lane])) for lane in own})

    @property
    def position(self) -> dict[int, _Lane] | None:
        """Where the lanes of this rank stand; None on a rank that reads no data."""
        return None if self.stream is None else self._state.lanes

    def saved(self, positions: Sequence[Mapping[int, _Lane] | None]) -> dict[str, Any]:
        """What a checkpoint keeps of every rank's position: of a lane that several ranks read, that
        of the rank which read last."""
        found: dict[int, _Lane] = {}
        for lanes in positions:
            for lane, stands in (lanes or {}).items():
                if lane not in found or found[lane].given < stands.given:
                    found[lane] = stands
        return {"lanes": [found[lane].position for lane in sorted(found)], **self._order()}

    def _order(self) -> dict[str, Any]:
        """What the order of the samples hangs on, where the stream is read."""
        if self.stream is None:
            return {}
        s = self.stream
        return {
            "seed": s.seed,
            "shuffle_buffer": s.buffer,
            "packing": s.packing,
            "max_length": s.write.max_length,
            "num_shards": s.source.rows.num_shards,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on behind the last sample of :meth:`saved`. Iterators made before are void.

        Raises:
            DataError: It is of another order, or the lanes do not fit the global batch.
        """
        if "lanes" not in saved:
            raise DataError(
                "The checkpoint was written without data.streaming: the order of samples cannot be "
                "continued. Use the same data section."
            )
        lanes = saved["lanes"]
        if not lanes or self.global_batch_size % len(lanes):
            raise DataError(
                f"The checkpoint's stream was begun by {len(lanes)} data-parallel ranks, which "
                f"share a step equally, and this run's global batch is {self.global_batch_size} "
                f"samples: no multiple of {len(lanes)}, so the order of samples cannot be "
                "continued. Change deepspeed.gradient_accumulation_steps."
            )
        for key, mine in self._order().items():
            if saved[key] != mine:
                raise DataError(
                    f"The checkpoint's stream has {key} {saved[key]}, this run's {mine}: the order "
                    "of samples cannot be continued. Use the same data section and train.seed."
                )
        self._begin(lanes)
        self._generation += 1
        if len(lanes) < self.dp_size and self.stream is not None and self.dp_rank == 0:
            log.warning(
                "The stream was begun by %d data-parallel ranks and is read by %d: to keep its "
                "order, several ranks read and tokenise the same rows.", len(lanes), self.dp_size,
            )  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        assert self.stream is not None, "only first-stage ranks read data"
        generation = self._generation
        for batch, state in self._load(self.stream):
            if generation != self._generation:
                raise RuntimeError(
                    "This iterator is void: the loader was restored. Call iter() again."
                )
            self._state = state
            yield batch

    def _load(self, stream: Stream) -> Iterator[tuple[Batch, _State]]:
        made = _Batches(stream, self._turns, self._state, self.dp_rank, self.collate)
        if self.num_workers:
            # One: several would have to share the lanes out once more.
            return in_processes(made, batch_size=None, num_workers=1, pin_memory=self.pin_memory)
        batches = iter(made)
        if not self.ahead:
            return batches

        def following(_: None) -> tuple[Batch, _State]:
            batch, state = next(batches)
            if self.pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            return batch, state

        return ahead_of(following, itertools.repeat(None), self.ahead)


class _Batches(torch.utils.data.IterableDataset[Any]):
    """Batches with the state behind them, as a process of its own can make them."""

    def __init__(
        self,
        stream: Stream,
        turns: _Turns,
        state: _State,
        dp_rank: int,
        collate: Callable[[list[Any]], Batch],
    ) -> None:
        self._stream, self._turns, self._state = stream, turns, state
        self._dp_rank, self._collate = dp_rank, collate

    def __iter__(self) -> Iterator[tuple[Batch, _State]]:
        turns, lanes = self._turns, dict(self._state.lanes)
        samples = {
            lane: self._stream.for_rank(lane, turns.lanes).samples(Position.of(stands.position))
            for lane, stands in lanes.items()
        }
        chunk: list[Any] = []
        block = self._state.block
        while True:
            lane, mine = turns.lane(block), turns.rank(block) == self._dp_rank
            block = (block + 1) % turns.blocks
            if lane not in lanes:
                continue
            found = list(itertools.islice(samples[lane], turns.size))
            given, behind = lanes[lane].given + turns.size, found[-1][1].plain()
            lanes[lane] = _Lane(given, behind)
            if not mine:
                continue
            chunk += [sample for sample, _ in found]
            if len(chunk) == turns.micro_batch:
                yield self._collate(chunk), _State(block, dict(lanes))
                chunk = []
