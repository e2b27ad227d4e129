"""Which sample comes when: deterministic, data-parallel, resumable by three numbers.

The order of a run is a property of (data, seed) alone. The samples of an epoch stand in one global
order; the D data-parallel ranks take consecutive blocks of it in turn. So a run that stops after n
global samples can go on with any D, and nothing but n has to be saved.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scpl_ds.data._workers import in_processes
from scpl_ds.errors import DataError

Batch = dict[str, Tensor]
C = TypeVar("C")
T = TypeVar("T")
_POOL = 50
"""Batches that are sorted by length together, as in Hugging Face's ``LengthGroupedSampler``."""


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of ``range(num_samples)`` for one epoch; equal on all ranks, [N] int64."""
    return permutation(num_samples, seed, epoch)


def permutation(count: int, *seeds: int) -> np.ndarray:
    """Random order of ``range(count)`` that follows from the seeds alone, [count] int64."""
    # SeedSequence mixes, so that (seed 1, epoch 0) and (seed 0, epoch 1) are not the same order.
    mixed = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed)).numpy()


def group_by_length(
    order: np.ndarray, lengths: np.ndarray, batch: int, *, seed: int, epoch: int
) -> np.ndarray:
    """``order`` with samples of like length in one batch, so that little of it is padding.

    Within every ``_POOL`` batches of the order the samples are sorted by length and cut into
    batches, which come in random order: unlike Hugging Face's grouping, which has the longest batch
    first, so that each such pool ends with its shortest texts.

    Args:
        order: Sample numbers, [N]; what is left beyond whole batches stays at the end.
        lengths: Tokens of each sample of the data set.
        batch: Samples of an optimizer step over all ranks.
    """
    grouped, whole = [], len(order) // batch * batch
    for start in range(0, whole, _POOL * batch):
        pool = order[start : min(start + _POOL * batch, whole)]
        batches = pool[np.argsort(lengths[pool], kind="stable")].reshape(-1, batch)
        grouped.append(batches[permutation(len(batches), seed, epoch, start)].ravel())
    return np.concatenate([*grouped, order[whole:]])


class BatchLoader:
    """Micro-batches for one rank of the first stage.

    With ``drop_last`` it is a training loader: iterating never ends, epoch follows epoch, and all
    ranks get equally many micro-batches of equal size. Without, it is an evaluation loader: one
    pass in order, each rank a contiguous shard, every sample exactly once over the ranks.

    A batch counts as consumed when it is handed out, whatever workers have prepared beyond it.

    Args:
        dataset: Indexable samples.
        micro_batch_size: Samples per rank in one micro-batch; evaluation may give fewer.
        dp_rank: This rank's place among ``dp_size``.
        dp_size: Data-parallel ranks.
        seed: Order of training.
        shuffle: A new order every epoch (training only).
        collate: List of samples -> batch.
        drop_last: Training (True) or evaluation (False), see above.
        num_workers: Processes that prepare batches ahead; 0 prepares in this one.
        ahead: With 0 workers, batches that a thread has ready, so that collating is never in the
            way; 0 collates when a batch is asked for. ``collate`` and the dataset must then not
            draw from torch's global random numbers, which training draws from at the same time.
        pin_memory: In page-locked memory, which a CUDA device reads without waiting.
        global_batch_size: Samples per optimizer step over all ranks. Given, an epoch ends at a
            whole step and holds the same samples for every ``dp_size``; None ends it at a whole
            micro-batch over all ranks.
        lengths: Tokens of each sample, to bring samples of like length together in training; None
            leaves the order random.
        checksum: Of the samples, which a position keeps and ``restore`` compares; None compares
            nothing.

    Raises:
        DataError: The data has no length, is empty, or is smaller than one global batch (training
            would never see an epoch).
        ValueError: Sizes or ranks that cannot be.
    """

    def __init__(
        self,
        dataset: Dataset[Any] | Sequence[Any],
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool,
        collate: Callable[[list[Any]], Batch],
        drop_last: bool,
        num_workers: int = 0,
        ahead: int = 0,
        pin_memory: bool = False,
        global_batch_size: int | None = None,
        lengths: np.ndarray | None = None,
        checksum: str | None = None,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise DataError(
                f"Training data must have a length and be indexable, got {type(dataset).__name__}: "
                f"a stream cannot be shuffled or resumed by position. Read it into a list first."
            )
        if micro_batch_size < 1 or dp_size < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"micro_batch_size {micro_batch_size}, dp_rank {dp_rank}, dp_size {dp_size}: sizes "
                f"are at least 1 and 0 <= dp_rank < dp_size."
            )
        if shuffle and not drop_last:
            raise ValueError("shuffle needs drop_last: evaluation runs in the order of the data.")
        self.dataset: Any = dataset
        self.num_samples = len(dataset)
        self.micro_batch_size = micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.collate = collate
        self.num_workers, self.ahead, self.pin_memory = num_workers, ahead, pin_memory
        self.block = micro_batch_size * dp_size
        """Samples of one micro-batch over all ranks."""
        unit = global_batch_size or self.block
        if unit % self.block:
            raise ValueError(
                f"global_batch_size {unit} is not a multiple of micro_batch_size "
                f"{micro_batch_size} x dp_size {dp_size} = {self.block}."
            )
        if self.num_samples == 0:
            raise DataError("The data set is empty: 0 samples.")
        if drop_last and self.num_samples < unit:
            raise DataError(
                f"{self.num_samples} training samples are fewer than one global batch: {unit} = "
                f"{micro_batch_size} per micro-batch x {dp_size} data-parallel ranks"
                f"{f' x {unit // self.block} micro-batches' if unit > self.block else ''}. Lower "
                f"deepspeed.train_micro_batch_size_per_gpu or gradient_accumulation_steps, or give "
                f"more data."
            )
        self._usable = self.num_samples // unit * unit
        self._unit, self._lengths, self._checksum = unit, lengths, checksum
        self._epoch = 0
        self._consumed = 0
        self._generation = 0

    @property
    def num_micro_batches_per_epoch(self) -> int:
        """Micro-batches this rank gets in one pass.

        Equal on all ranks. In evaluation a rank that is short of one repeats its last; the first
        ``num_scored`` are not repeated.
        """
        return self._usable // self.block if self.drop_last else len(self._eval_chunks())

    @property
    def num_scored(self) -> int:
        """Micro-batches of an evaluation that hold samples of this rank, each sample once."""
        return len(self._eval_chunks(padded=False))

    @property
    def first_scored(self) -> int:
        """Index of this rank's first sample of an evaluation; the others follow it in order."""
        return self.num_samples * self.dp_rank // self.dp_size

    @property
    def position(self) -> dict[str, Any]:
        """Where training stands: plain values for a checkpoint, the same on every rank."""
        return {
            "epoch": self._epoch,
            "consumed": self._consumed,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "grouped_by": 0 if self._lengths is None else self._unit,
            **({} if self._checksum is None else {"checksum": self._checksum}),
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        """Go on behind the last sample of ``position``, under any ``dp_size`` or micro-batch size.

        Iterators made before are void.

        Raises:
            DataError: The position is of other data or of another seed: samples would be repeated
                and left out without a word.
        """
        if "lanes" in position:
            raise DataError(
                "The checkpoint was written with data.streaming: the order of samples cannot be "
                "continued. Use the same data section."
            )
        needed = ("num_samples", "seed", "epoch", "consumed")
        if wrong := [key for key in needed if not isinstance(position.get(key), int)]:
            raise DataError(
                f"The checkpoint's loader position is damaged: '{wrong[0]}' is "
                f"{position.get(wrong[0])!r}. Use an earlier checkpoint."
            )
        for key, mine in (("num_samples", self.num_samples), ("seed", self.seed)):
            if position[key] != mine:
                what = "data set has" if key == "num_samples" else "run's order is of"
                raise DataError(
                    f"The checkpoint's {what} {key} {position[key]}, this run's {mine}: the order "
                    f"of samples cannot be continued. Use the same data section and train.seed."
                )
        data = (position.get("checksum"), self._checksum)
        if None not in data and data[0] != data[1]:  # of an older checkpoint nobody knows
            raise DataError(
                f"The training samples are not those of the checkpoint: as many, {self.num_samples}"
                f", but their checksum is {data[1]} and was {data[0]}. A file was changed or "
                "sorted, or is tokenised in another way (tokenizer, data.max_length), so some "
                "samples would be repeated and others left out. Put the data back as they were; "
                "or export the checkpoint and begin a run on the new data from the export."
            )
        was, now = position.get("grouped_by", 0), self.position["grouped_by"]
        if was != now:
            said = [f"grouped by length into batches of {n}" if n else "random" for n in (was, now)]
            raise DataError(
                f"The checkpoint's order of samples is {said[0]}, this run's {said[1]}: it cannot "
                "be continued. Use the same train.group_by_length, and with it the same global "
                "batch."
            )
        if position["epoch"] < 0 or not 0 <= position["consumed"] <= self.num_samples:
            raise DataError(
                f"The checkpoint's loader position is damaged: epoch {position['epoch']}, consumed "
                f"{position['consumed']} of {self.num_samples} samples."
            )
        self._epoch, self._consumed = int(position["epoch"]), int(position["consumed"])
        self._generation += 1

    def __iter__(self) -> Iterator[Batch]:
        if not self.drop_last:
            yield from self._load(iter(self._eval_chunks()))
            return
        generation = self._generation
        ahead, plan = itertools.tee(self._training_plan())
        batches = self._load(indices for _, _, indices in ahead)
        for batch, (epoch, consumed, _) in zip(batches, plan, strict=True):
            if generation != self._generation:
                raise RuntimeError(
                    "This iterator is void: the loader was restored. Call iter() again."
                )
            self._epoch, self._consumed = epoch, consumed
            yield batch

    def _training_plan(self) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, consumed after it, this rank's indices) of every micro-batch from here on."""
        epoch, consumed = self._epoch, self._consumed
        order: np.ndarray | None = None
        while True:
            if consumed + self.block > self._usable:
                epoch, consumed, order = epoch + 1, 0, None
            if order is None:
                order = self._order(epoch)
            start = consumed + self.dp_rank * self.micro_batch_size
            consumed += self.block
            yield epoch, consumed, order[start : start + self.micro_batch_size].tolist()

    def _order(self, epoch: int) -> np.ndarray:
        """Samples of one epoch, the same on all ranks."""
        if not self.shuffle:
            return np.arange(self.num_samples)
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
        if self._lengths is None:
            return order
        return group_by_length(order, self._lengths, self._unit, seed=self.seed, epoch=epoch)

    def _eval_chunks(self, *, padded: bool = True) -> list[list[int]]:
        """This rank's shard in chunks of at most one micro-batch, as many as on the other ranks."""
        size = self.micro_batch_size
        bounds = [self.num_samples * rank // self.dp_size for rank in range(self.dp_size + 1)]
        most = max(-(-(end - start) // size) for start, end in itertools.pairwise(bounds))
        shard = list(range(bounds[self.dp_rank], bounds[self.dp_rank + 1]))
        chunks = [shard[i : i + size] for i in range(0, len(shard), size)]
        # Shards differ by one sample, so a rank is short of one chunk at most; backends that meet
        # in a collective every micro-batch (ZeRO-3) would wait for ever for the missing one.
        if chunks and len(chunks) < most and len(chunks[-1]) > 1:
            last = chunks.pop()
            chunks += [last[: len(last) // 2], last[len(last) // 2 :]]
        missing = most - len(chunks) if padded else 0
        return chunks + [chunks[-1] if chunks else [0]] * missing

    def _load(self, indices: Iterator[list[int]]) -> Iterator[Batch]:
        if self.num_workers == 0:
            if self.ahead:
                return ahead_of(self._make, indices, self.ahead)
            return (self._make(chunk) for chunk in indices)
        return in_processes(
            self.dataset,
            batch_sampler=_Once(indices),
            num_workers=self.num_workers,
            collate_fn=self.collate,
            pin_memory=self.pin_memory,
        )

    def _make(self, chunk: list[int]) -> Batch:
        batch = self.collate([self.dataset[i] for i in chunk])
        if not self.pin_memory:
            return batch
        return {name: tensor.pin_memory() for name, tensor in batch.items()}


def ahead_of(make: Callable[[C], T], chunks: Iterator[C], count: int) -> Iterator[T]:
    """``map(make, chunks)`` by a thread that is ``count`` batches ahead.

    It begins at the first ``next``, so that a process that forks before has no thread, and ends
    when this iterator is closed or forgotten. An error comes out where its batch would have.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = collections.deque(
            thread.submit(make, chunk) for chunk in itertools.islice(chunks, count)
        )
        try:
            while coming:
                batch = coming.popleft()
                coming.extend(thread.submit(make, chunk) for chunk in itertools.islice(chunks, 1))
                yield batch.result()
        finally:
            for batch in coming:
                batch.cancel()


class _Once:
    """What ``DataLoader`` takes as a batch sampler; it is iterated exactly once."""

    def __init__(self, indices: Iterator[list[int]]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[list[int]]:
        return self._indices
