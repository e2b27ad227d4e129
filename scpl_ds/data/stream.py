"""Training data that are read while they are trained on, for data sets too big to tokenise first.

A stream is rows -> blocks of ``shuffle_buffer`` rows, each in a random order of its own -> pieces
-> samples, packed a few rows at a time. Nothing that has been read is saved: a position says where
the reading of a block began and how much of it was used, so a resumed run reads that block again
and goes on with the very next sample. (The shuffle buffer of ``datasets`` is lost when its state is
loaded.)
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch.utils.data
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from scpl_ds.data._base import TextStream
from scpl_ds.data._workers import in_processes
from scpl_ds.data.language import Piece, RowWriter, lay_out
from scpl_ds.data.loader import Batch, ahead_of, permutation
from scpl_ds.errors import DataError

log = logging.getLogger(__name__)

PACKED_TOGETHER = 64
"""Rows of pieces that are packed in one go: full to a few percent, and little to do again when a
run is resumed."""


class _Row(NamedTuple):
    where: str
    values: Mapping[str, Any]


class _Begin(NamedTuple):
    """Where the reading of a block began."""

    epoch: int = 0
    shard: int = 0
    """Place in this rank's order of shards."""
    row: int = 0
    """Rows of the shard that this rank has read before."""
    state: dict[str, Any] | None = None
    """What ``datasets`` calls the state of the shard; None: its beginning."""


class Position(NamedTuple):
    """Where a rank's stream stands, as plain values."""

    begin: _Begin = _Begin()
    used: int = 0
    """Rows of the block that became samples before the current group of rows."""
    given: int = 0
    """Samples of the current group that were handed out."""

    def plain(self) -> dict[str, Any]:
        return {**self.begin._asdict(), "used": self.used, "given": self.given}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Position:
        begin = _Begin(*(plain[name] for name in _Begin._fields))
        return cls(begin, int(plain["used"]), int(plain["given"]))


class Stream:
    """The samples of one data-parallel rank, without end: epoch follows epoch.

    Data sets of at least as many files (shards) as ranks are shared out by shard where that divides
    evenly; each epoch has its own order of shards. Otherwise every rank reads all rows and keeps
    one in ``dp_size``. Either way no row goes to two ranks in an epoch.

    Args:
        source: Rows.
        write: Row -> pieces; it knows whether rows that are unusable are left out.
        packing: Lay pieces beside each other in rows of up to ``write.max_length`` tokens.
        buffer: Rows that are shuffled together.
        seed: Of the order.
    """

    def __init__(
        self,
        source: TextStream,
        write: RowWriter,
        *,
        packing: bool,
        buffer: int,
        seed: int,
    ) -> None:
        self.source, self.write = source, write
        self.packing, self.buffer, self.seed = packing, buffer, seed
        self.dp_rank, self.dp_size = 0, 1

    def for_rank(self, dp_rank: int, dp_size: int) -> Stream:
        """The same for one of several ranks."""
        found = Stream(
            self.source, self.write, packing=self.packing, buffer=self.buffer, seed=self.seed
        )
        found.dp_rank, found.dp_size = dp_rank, dp_size
        return found

    def samples(self, position: Position) -> Iterator[tuple[dict[str, Any], Position]]:
        """Samples from a position on, each with the position behind it.

        Raises:
            DataError: A row is unusable, or a whole epoch of them.
        """
        given = position.given
        size = self.write.max_length if self.packing else None
        for start, pieces in self._groups(position):
            data = lay_out(pieces, size)
            for number in range(given, len(data)):
                yield data[number], start._replace(given=number + 1)
            given = 0

    def _groups(self, position: Position) -> Iterator[tuple[Position, list[Piece]]]:
        """The pieces of as many rows as are packed together, and where the first stands."""
        enough = PACKED_TOGETHER * self.write.max_length if self.packing else 1
        start: Position | None = None
        pieces: list[Piece] = []
        tokens, useful = 0, position.begin.epoch
        for place, row in self._rows(position):
            found = self._pieces(row, may_drop=place.begin.epoch <= useful + 1)
            if not found:
                continue
            start, useful = start or place, place.begin.epoch
            pieces += found
            tokens += sum(len(piece.ids) for piece in found)
            if tokens >= enough:
                yield start, pieces
                start, pieces, tokens = None, [], 0

    def _pieces(self, row: _Row, *, may_drop: bool) -> list[Piece]:
        cut, dropped = self.write.cut, self.write.dropped
        found = self.write(row.values, row.where, self.source.columns)
        if (now := self.write.dropped) > dropped:
            error = self.write.last
            if not may_drop:
                raise DataError(f"{self.source.origin}: every row is unusable: {error}") from error
            if now == 10 ** (len(str(now)) - 1):  # 1, 10, 100 ...
                log.warning("%d rows left out so far, the last: %s", now, error)
        if cut == 0 < self.write.cut:
            log.warning(
                "%s is longer than data.max_length %d tokens and was cut, as will be others.",
                row.where, self.write.max_length,
            )  # fmt: skip
        return found

    def _rows(self, position: Position) -> Iterator[tuple[Position, _Row]]:
        """Rows in the order of training, each with the position before it."""
        used = position.used
        for begin, block in self._blocks(position.begin):
            order = range(len(block))
            if self.buffer > 1:
                seeds = (self.seed, begin.epoch, begin.shard, begin.row)
                order = permutation(len(block), *seeds).tolist()
            for number in range(used, len(block)):
                yield Position(begin, number), block[order[number]]
            used = 0

    def _blocks(self, begin: _Begin) -> Iterator[tuple[_Begin, list[_Row]]]:
        epoch, shard, row, state = begin
        block: list[_Row] = []
        while True:
            shards = self._shards(epoch)
            while shard < len(shards):
                rows = self._open(shards[shard])
                if state is not None:
                    rows.load_state_dict(state)
                for values in rows:
                    block.append(self._row(shards[shard], row, values))
                    row += 1
                    if len(block) == self.buffer:
                        after = _Begin(epoch, shard, row, rows.state_dict())
                        yield begin, block
                        begin, block = after, []
                shard, row, state = shard + 1, 0, None
            if not block and begin == _Begin(epoch):
                share = "" if self.dp_size == 1 else f" for data-parallel rank {self.dp_rank}"
                raise DataError(f"{self.source.origin}: no rows{share}, the data set is empty.")
            if block:
                yield begin, block
            epoch, shard = epoch + 1, 0
            begin, block = _Begin(epoch), []

    def _by_shards(self) -> bool:
        return self.source.rows.num_shards % self.dp_size == 0

    def _shards(self, epoch: int) -> list[int]:
        """This rank's shards in the order of an epoch."""
        count = self.source.rows.num_shards
        order = list(range(count))
        if self.buffer > 1:
            order = permutation(count, self.seed, epoch).tolist()
        return order[self.dp_rank :: self.dp_size] if self._by_shards() else order

    def _open(self, shard: int) -> IterableDataset:
        rows = self.source.rows
        rows = rows.shard(rows.num_shards, shard)
        if self._by_shards():
            return rows
        return split_dataset_by_node(rows, self.dp_rank, self.dp_size, strategy="examples")

    def _row(self, shard: int, number: int, values: Mapping[str, Any]) -> _Row:
        source = self.source
        if source.numbered:
            where = f"{source.origin} {values['row']}"
        else:
            count = source.rows.num_shards
            number = number if self._by_shards() else self.dp_rank + number * self.dp_size
            part = f", shard {shard} of {count}" if count > 1 else ""
            where = f"{source.origin}{part}, row {number}"
        return _Row(where, {name: values.get(column) for name, column in source.columns.items()})


class StreamLoader:
    """Micro-batches of a stream, without end.

    As with ``BatchLoader`` a batch counts as consumed when it is handed out, whatever was prepared
    beyond it.

    Args:
        stream: This rank's; None on a rank that reads no data.
        micro_batch_size: Samples of a micro-batch.
        collate: List of samples -> batch.
        dp_size: Data-parallel ranks, each of which has its own position.
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
        num_workers: int = 0,
        ahead: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.stream, self.collate = stream, collate
        self.micro_batch_size, self.dp_rank, self.dp_size = micro_batch_size, dp_rank, dp_size
        self.num_workers, self.ahead, self.pin_memory = num_workers, ahead, pin_memory
        self._position = Position()
        self._generation = 0

    @property
    def position(self) -> dict[str, Any] | None:
        """Where this rank stands: plain values; None on a rank that reads no data."""
        return None if self.stream is None else self._position.plain()

    def saved(self, positions: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
        """What a checkpoint keeps of every rank's position."""
        lanes = [each for each in positions if each is not None]
        return {"lanes": lanes, **self._order()}

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
            DataError: It is of another number of data-parallel ranks, or of another order.
        """
        if "lanes" not in saved:
            raise DataError(
                "The checkpoint was written without data.streaming: the order of samples cannot be "
                "continued. Use the same data section."
            )
        if len(saved["lanes"]) != self.dp_size:
            raise DataError(
                f"The checkpoint's stream was read by {len(saved['lanes'])} data-parallel ranks, "
                f"this run has {self.dp_size}: the order of samples cannot be continued. Launch as "
                "many ranks as before, or set scpl.pipeline_ranks."
            )
        for key, mine in self._order().items():
            if saved[key] != mine:
                raise DataError(
                    f"The checkpoint's stream has {key} {saved[key]}, this run's {mine}: the order "
                    "of samples cannot be continued. Use the same data section and train.seed."
                )
        self._position = Position.of(saved["lanes"][self.dp_rank])
        self._generation += 1

    def __iter__(self) -> Iterator[Batch]:
        assert self.stream is not None, "only first-stage ranks read data"
        generation = self._generation
        for batch, position in self._load(self.stream):
            if generation != self._generation:
                raise RuntimeError(
                    "This iterator is void: the loader was restored. Call iter() again."
                )
            self._position = Position.of(position)
            yield batch

    def _load(self, stream: Stream) -> Iterator[tuple[Batch, dict[str, Any]]]:
        made = _Batches(stream, self._position, self.micro_batch_size, self.collate)
        if self.num_workers:
            # One: several would have to share the shards out once more.
            return in_processes(made, batch_size=None, num_workers=1, pin_memory=self.pin_memory)
        batches = iter(made)
        if not self.ahead:
            return batches

        def following(_: None) -> tuple[Batch, dict[str, Any]]:
            batch, position = next(batches)
            if self.pin_memory:
                batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            return batch, position

        return ahead_of(following, itertools.repeat(None), self.ahead)


class _Batches(torch.utils.data.IterableDataset[Any]):
    """Batches with the positions behind them, as a process of its own can make them."""

    def __init__(
        self, stream: Stream, position: Position, size: int, collate: Callable[[list[Any]], Batch]
    ) -> None:
        self._stream, self._position = stream, position
        self._size, self._collate = size, collate

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        samples = self._stream.samples(self._position)
        while True:
            chunk = list(itertools.islice(samples, self._size))
            yield self._collate([sample for sample, _ in chunk]), chunk[-1][1].plain()
