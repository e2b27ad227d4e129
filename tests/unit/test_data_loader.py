"""The order of samples: every one once, the same for any number of ranks, resumable."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from typing import Any

import numpy as np
import pytest
import torch

from scpl_ds.data._identity import checksum_of
from scpl_ds.data._workers import in_processes
from scpl_ds.data.loader import BatchLoader, epoch_order
from scpl_ds.errors import DataError


def collate(samples: list[int]) -> dict[str, torch.Tensor]:
    return {"ids": torch.tensor(samples)}


def loader(
    n: int, *, size: int = 2, rank: int = 0, ranks: int = 1, train: bool = True, **options
) -> BatchLoader:
    return BatchLoader(
        range(n),
        micro_batch_size=size,
        dp_rank=rank,
        dp_size=ranks,
        seed=options.pop("seed", 0),
        shuffle=options.pop("shuffle", train),
        collate=collate,
        drop_last=train,
        **options,
    )


def take(loaded: BatchLoader, count: int) -> list[list[int]]:
    return [batch["ids"].tolist() for batch in itertools.islice(iter(loaded), count)]


def in_global_order(per_rank: list[list[list[int]]]) -> list[int]:
    """Samples of all ranks in the order of the run: micro-batch by micro-batch, rank by rank."""
    return [i for blocks in zip(*per_rank, strict=True) for block in blocks for i in block]


@pytest.mark.parametrize(("n", "size", "ranks"), [(24, 2, 1), (24, 2, 3), (24, 4, 2), (7, 1, 7)])
def test_an_epoch_has_every_sample_exactly_once(n: int, size: int, ranks: int):
    loaders = [loader(n, size=size, rank=rank, ranks=ranks) for rank in range(ranks)]
    per_epoch = loaders[0].num_micro_batches_per_epoch
    assert per_epoch * size * ranks == n
    runs = [take(each, 2 * per_epoch) for each in loaders]
    for epoch in range(2):
        span = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        assert sorted(in_global_order([run[span] for run in runs])) == list(range(n))


def test_a_training_epoch_leaves_out_less_than_one_block_and_never_repeats():
    for n, size, ranks in itertools.product(range(8, 30), (1, 2, 3), (1, 2)):
        if n < size * ranks:
            continue
        loaders = [loader(n, size=size, rank=r, ranks=ranks) for r in range(ranks)]
        seen = in_global_order([take(x, x.num_micro_batches_per_epoch) for x in loaders])
        assert len(set(seen)) == len(seen) > n - size * ranks


def test_the_order_does_not_depend_on_the_number_of_ranks():
    alone = in_global_order([take(loader(24, size=2), 24)])
    shared = in_global_order([take(loader(24, size=2, rank=r, ranks=3), 8) for r in range(3)])
    assert shared == alone


def test_global_batch_size_makes_epochs_equal_for_any_number_of_ranks():
    """22 samples in steps of 8: without it, 1 rank would use 22 of them and 2 ranks 20."""
    alone = in_global_order([take(loader(22, global_batch_size=8), 24)])
    ranks = [loader(22, rank=r, ranks=2, global_batch_size=8) for r in range(2)]
    assert [x.num_micro_batches_per_epoch for x in ranks] == [4, 4]
    assert in_global_order([take(x, 12) for x in ranks]) == alone


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [
        tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(4) for epoch in range(4)
    ]
    assert len(set(orders)) == 16


LENGTHS = np.random.default_rng(0).integers(1, 100, 64)


def padded(loaded: BatchLoader) -> int:
    """Tokens to compute in an epoch, padding included."""
    batches = take(loaded, loaded.num_micro_batches_per_epoch)
    return sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches)


def test_grouping_by_length_saves_most_of_the_padding():
    real = LENGTHS.sum()
    grouped, mixed = padded(loader(64, size=8, lengths=LENGTHS)), padded(loader(64, size=8))
    assert grouped - real < (mixed - real) / 4


def test_grouped_epochs_have_every_sample_once_in_an_order_that_no_number_of_ranks_changes():
    options = {"lengths": LENGTHS, "global_batch_size": 8}
    alone = in_global_order([take(loader(64, **options), 64)])
    assert sorted(alone[:64]) == sorted(alone[64:]) == list(range(64))
    assert alone[:64] != alone[64:]
    ranks = [take(loader(64, rank=r, ranks=2, **options), 32) for r in range(2)]
    assert in_global_order(ranks) == alone
    longest = [max(LENGTHS[i] for i in alone[k : k + 8]) for k in range(0, 64, 8)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_a_grouped_order_is_continued_with_the_same_global_batch_only():
    options = {"lengths": LENGTHS, "global_batch_size": 8}
    first = loader(64, **options)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    later = loader(64, **options)
    later.restore(first.position)
    assert take(later, 40) == [batch["ids"].tolist() for batch in itertools.islice(batches, 40)]
    with pytest.raises(DataError, match=r"into batches of 8, this run's random"):
        loader(64).restore(first.position)
    with pytest.raises(DataError, match=r"into batches of 8, this run's .* of 4: .*global batch"):
        loader(64, lengths=LENGTHS, global_batch_size=4).restore(first.position)


def test_without_shuffle_training_runs_in_the_order_of_the_data():
    assert take(loader(5, shuffle=False), 4) == [[0, 1], [2, 3], [0, 1], [2, 3]]


@pytest.mark.parametrize(("workers", "ahead"), [(0, 0), (2, 0), (0, 2)])
def test_two_restores_in_mid_epoch_give_the_uninterrupted_order(workers: int, ahead: int):
    whole = take(loader(23, size=3), 30)
    position, parts = None, []
    for count in (4, 9, 17):
        part = loader(23, size=3, num_workers=workers, ahead=ahead)
        if position is not None:
            part.restore(position)
        parts += take(part, count)
        position = part.position
    assert parts == whole


def test_a_restore_with_more_ranks_continues_the_same_order():
    whole = in_global_order([take(loader(40), 40)])
    first = loader(40)
    before = take(first, 6)
    resumed = [loader(40, rank=rank, ranks=2) for rank in range(2)]
    for each in resumed:
        each.restore(first.position)
    after = in_global_order([take(each, 17) for each in resumed])
    assert in_global_order([before]) + after == whole


@pytest.mark.parametrize("options", [{"num_workers": 1}, {"ahead": 2}], ids=str)
def test_position_counts_what_was_handed_out_not_what_was_prepared(options: dict):
    train = loader(40, **options)
    iterator = iter(train)
    for _ in range(3):
        next(iterator)
    position = {"epoch": 0, "consumed": 6, "num_samples": 40, "seed": 0, "grouped_by": 0}
    assert train.position == position


def test_an_iterator_from_before_a_restore_refuses_to_go_on():
    train = loader(10)
    iterator = iter(train)
    next(iterator)
    train.restore({"epoch": 0, "consumed": 0, "num_samples": 10, "seed": 0})
    with pytest.raises(RuntimeError, match=r"Call iter\(\) again"):
        next(iterator)


def test_a_new_iterator_goes_on_where_the_last_one_stopped():
    train = loader(24)
    assert take(train, 3) + take(train, 3) == take(loader(24), 6)


def test_evaluation_gives_every_sample_once_in_order_over_the_ranks():
    for n, size, ranks in itertools.product(range(1, 20), (1, 2, 3, 8), (1, 2, 3, 4)):
        loaders = [loader(n, size=size, rank=r, ranks=ranks, train=False) for r in range(ranks)]
        shards = [
            [i for batch in itertools.islice(each, each.num_scored) for i in batch["ids"].tolist()]
            for each in loaders
        ]
        assert list(itertools.chain(*shards)) == list(range(n))


def test_evaluation_ranks_get_equally_many_micro_batches_of_at_most_the_size():
    for n, size, ranks in itertools.product(range(1, 40), (1, 2, 3, 8), (1, 2, 3, 4)):
        loaders = [loader(n, size=size, rank=r, ranks=ranks, train=False) for r in range(ranks)]
        batches = [[b["ids"].tolist() for b in x] for x in loaders]
        counts = {len(b) for b in batches}
        assert counts == {loaders[0].num_micro_batches_per_epoch} and len(counts) == 1
        assert all(1 <= len(chunk) <= size for b in batches for chunk in b)


def test_evaluation_can_be_run_again_from_the_start():
    held_out = loader(5, train=False)
    assert take(held_out, 9) == take(held_out, 9) == [[0, 1], [2, 3], [4]]


def test_data_smaller_than_one_global_batch_is_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"7 training samples .* 8 = 4 per micro-batch x 2"):
        loader(7, size=4, ranks=2)
    with pytest.raises(
        DataError, match=r"7 training samples .* 12 = 2 .* x 1 .* x 6 micro-batches"
    ):
        loader(7, size=2, global_batch_size=12)


def test_a_position_of_other_data_or_another_seed_is_refused():
    position = loader(10).position
    with pytest.raises(DataError, match="num_samples 10, this run's 12"):
        loader(12).restore(position)
    with pytest.raises(DataError, match="seed 0, this run's 1"):
        loader(10, seed=1).restore(position)
    with pytest.raises(DataError, match="damaged: epoch 0, consumed 11 of 10"):
        loader(10).restore({**position, "consumed": 11})


def test_a_position_of_a_stream_is_refused():
    with pytest.raises(DataError, match=r"written with data\.streaming: .*the same data section"):
        loader(10).restore({"lanes": [{"epoch": 0}], "seed": 0})


def test_an_empty_data_set_or_a_stream_is_refused():
    with pytest.raises(DataError, match="empty"):
        loader(0, train=False)
    with pytest.raises(DataError, match=r"must have a length .* got generator"):
        BatchLoader(
            (i for i in range(9)),  # pyright: ignore
            micro_batch_size=1, dp_rank=0, dp_size=1, seed=0, shuffle=True, collate=collate,
            drop_last=True,
        )  # fmt: skip


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="0 <= dp_rank < dp_size"):
        loader(10, rank=2, ranks=2)
    with pytest.raises(ValueError, match="not a multiple"):
        loader(10, size=3, global_batch_size=8)
    with pytest.raises(ValueError, match="shuffle needs drop_last"):
        loader(10, train=False, shuffle=True)


# -- a thread that is ahead ----------------------------------------------------------------


def batch_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_a_thread_gives_the_same_batches_in_the_same_order():
    assert take(loader(23, ahead=2), 40) == take(loader(23), 40)
    held_out = loader(5, train=False, ahead=2)
    assert take(held_out, 9) == take(held_out, 9) == [[0, 1], [2, 3], [4]]


def test_the_next_batches_are_collated_while_one_is_in_use():
    made, third = [], threading.Event()

    def watched(samples: list[int]) -> dict[str, torch.Tensor]:
        made.append(threading.current_thread().name)
        if len(made) == 3:
            third.set()
        return collate(samples)

    train = BatchLoader(
        range(40), micro_batch_size=2, dp_rank=0, dp_size=1, seed=0, shuffle=True,
        collate=watched, drop_last=True, ahead=2,
    )  # fmt: skip
    iterator = iter(train)
    assert made == [] and batch_threads() == []  # nothing before the first next
    next(iterator)
    assert third.wait(10) and len(made) == 3  # the one in use and two ahead, and no more
    assert all(name.startswith("batches") for name in made)


def test_the_thread_ends_when_the_iterator_is_forgotten_or_closed():
    iterator = iter(loader(40, ahead=2))
    next(iterator)
    assert len(batch_threads()) == 1
    del iterator
    gc.collect()
    assert batch_threads() == []
    iterator = iter(loader(40, train=False, ahead=2))
    next(iterator)
    iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert batch_threads() == []


def test_an_error_of_the_thread_comes_where_its_batch_would_have_with_its_traceback():
    def fails_on_four(samples: list[int]) -> dict[str, torch.Tensor]:
        if 4 in samples:
            raise LookupError(f"no text in {samples}")
        return collate(samples)

    held_out = BatchLoader(
        range(8), micro_batch_size=2, dp_rank=0, dp_size=1, seed=0, shuffle=False,
        collate=fails_on_four, drop_last=False, ahead=2,
    )  # fmt: skip
    iterator = iter(held_out)
    assert [next(iterator)["ids"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(LookupError, match=r"no text in \[4, 5\]") as caught:
        next(iterator)
    assert "fails_on_four" in "".join(traceback.format_tb(caught.tb))
    assert batch_threads() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_pinned_by_the_thread():
    batch = next(iter(loader(8, ahead=2, pin_memory=True)))
    assert batch["ids"].is_pinned()


@pytest.mark.forks
def test_a_worker_ends_when_its_own_process_says_so_and_when_nobody_else_does():
    """A rank that exits ends its workers by SIGTERM and waits for them."""
    numbers: Any = range(10_000)
    batches = in_processes(numbers, num_workers=1, batch_size=None)
    assert next(batches) == 0
    (worker,) = multiprocessing.active_children()
    other = os.fork()
    if other == 0:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.pid or 0, number)
        os._exit(0)
    os.waitpid(other, 0)
    assert [next(batches) for _ in range(20)] == list(range(1, 21))
    os.kill(worker.pid or 0, signal.SIGUSR1)
    assert next(batches) == 21
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == 0


# -- the samples themselves ----------------------------------------------------------------


def samples(count: int, *, tokens: int = 3) -> dict[str, Any]:
    flat = np.random.default_rng(0).integers(0, 30_000, count * tokens, dtype=np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * tokens
    return {"columns": {"input_ids": flat}, "offsets": offsets, "labels": np.arange(count) % 2}


@pytest.mark.parametrize("tokens", [3, 40_000], ids=["small", "more than is looked at"])
def test_samples_in_another_order_have_another_checksum(tokens: int):
    wanted = checksum_of(**samples(400, tokens=tokens))
    assert checksum_of(**samples(400, tokens=tokens)) == wanted
    turned = samples(400, tokens=tokens)
    ids = turned["columns"]["input_ids"]
    turned["columns"] = {"input_ids": ids.reshape(-1, tokens)[::-1].reshape(-1)}
    assert checksum_of(**turned) != wanted
    last = samples(400, tokens=tokens)
    last["columns"]["input_ids"][-1] += 1
    assert checksum_of(**last) != wanted
    assert checksum_of(**{**samples(400, tokens=tokens), "labels": np.zeros(400)}) != wanted


def test_a_position_of_other_samples_is_refused_and_an_older_one_without_a_checksum_is_not():
    """As many samples in another order were taken for the same."""
    first, other = loader(20, checksum="a" * 16), loader(20, checksum="b" * 16)
    take(first, 3)
    with pytest.raises(DataError, match=r"not those of the checkpoint: as many, 20, but"):
        other.restore(first.position)
    loader(20, checksum="a" * 16).restore(first.position)
    older = {k: v for k, v in first.position.items() if k != "checksum"}
    other.restore(older)
    loader(20).restore(first.position)
