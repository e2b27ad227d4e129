"""Text for language models: documents, prompts with completions, conversations -> token ids, with a
label at every position that is learned.

A document is cut into pieces of at most ``max_length`` tokens; a completion or a conversation that
is longer loses its end. With packing, whole pieces are laid beside each other in rows of up to
``max_length`` tokens; ``position_ids`` begin anew at each, from which transformers builds the mask
that keeps them apart.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scpl_ds.data._base import Texts
from scpl_ds.data._writers import IGNORED, ForeignTokens, Piece, RowWriter
from scpl_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class LanguageDataset(Dataset[dict[str, Any]]):
    """Tokenised pieces, or rows of them, in memory; an item is ``{"input_ids": int32 [T],
    "labels": int32 [T]}`` and, packed, ``"position_ids"``."""

    def __init__(self, columns: Mapping[str, np.ndarray], offsets: np.ndarray) -> None:
        self.columns = dict(columns)
        self.offsets = offsets
        """[N + 1]; sample i is ``[offsets[i], offsets[i + 1])`` of each column."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self.offsets[index], self.offsets[index + 1]
        return {name: flat[start:end] for name, flat in self.columns.items()}

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sample, [N]."""
        return np.diff(self.offsets)

    def take(self, kept: np.ndarray) -> LanguageDataset:
        """The samples of these numbers."""
        ends = np.cumsum(self.lengths[kept])
        spans = [slice(self.offsets[n], self.offsets[n + 1]) for n in kept]
        columns = {
            name: np.concatenate([flat[span] for span in spans])
            for name, flat in self.columns.items()
        }
        return LanguageDataset(columns, np.concatenate([[0], ends]))

    @property
    def num_targets(self) -> int:
        """Tokens that are learned, or scored: no row's first position is anybody's next."""
        learned = self.columns["labels"] != IGNORED
        learned[self.offsets[:-1]] = False
        return int(learned.sum())


def tokenize_texts(
    texts: Texts,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    packing: bool = False,
    completion_only: bool = True,
    vocab_size: int | None = None,
    drop_invalid: bool | None = None,
) -> LanguageDataset:
    """Tokenise a split.

    Args:
        texts: What a source loaded.
        split: ``train`` or ``eval``.
        tokenizer: Whose chat template conversations are written in.
        max_length: Most tokens of a piece, and of a packed row.
        packing: Lay whole pieces beside each other in one row.
        completion_only: Of prompts with completions and of conversations, learn what is answered
            only.
        vocab_size: ``config.vocab_size`` of the model.
        drop_invalid: Leave out rows that are unusable instead of refusing them; None: refuse, of a
            source that has no ``drop_invalid_rows``.

    Raises:
        DataError: A text gives fewer than two tokens, a prompt leaves no room for its completion,
            the tokenizer has no chat template or one that rewrites what was said, a token is not
            of the model.
    """
    dataset = texts.train if split == "train" else texts.eval
    assert dataset is not None
    write = RowWriter(texts.kind, tokenizer, max_length, completion_only, vocab_size, drop_invalid)
    origin = texts.origin.get(split, f"{split} split, row")
    pieces: list[Piece] = []
    for index, row in enumerate(cast("Iterable[Mapping[str, Any]]", dataset)):
        pieces += write(row, f"{origin} {row.get('row', index)}")
    if not pieces and len(dataset):
        raise DataError(f"{origin.rsplit(', ', 1)[0]}: every row is unusable: {write.last}")
    if write.dropped:
        log.warning(
            "%d of %d rows left out (data.drop_invalid_rows), the last: %s",
            write.dropped, len(dataset), write.last,
        )  # fmt: skip
    if cut := write.cut:
        log.warning(
            "%d of %d samples (%.1f %%) are longer than data.max_length %d tokens and were cut.",
            cut, len(dataset), 100 * cut / len(dataset), max_length,
        )  # fmt: skip
    return lay_out(pieces, max_length if packing else None)


def packed(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which pieces share a row: the longest first, each where it leaves the least room.

    Args:
        lengths: Tokens of each piece, at most ``size``.
        size: Most tokens of a row.

    Returns:
        Rows of piece numbers, in the order of their first pieces in the data.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, row), sorted
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = bisect.bisect_left(room, (lengths[number], -1))
        free, row = room.pop(place) if place < len(room) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(room, (free - lengths[number], row))
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])


def lay_out(pieces: Sequence[Piece], size: int | None) -> LanguageDataset:
    """Pieces as samples: packed into rows of up to ``size`` tokens, or each by itself (None)."""
    rows = None if size is None else packed([len(piece.ids) for piece in pieces], size)
    order = [[n] for n in range(len(pieces))] if rows is None else rows
    flat = [pieces[n] for row in order for n in row]
    columns = {
        "input_ids": np.concatenate([piece.ids for piece in flat]),
        "labels": np.concatenate([piece.labels for piece in flat]),
    }
    sizes = [len(piece.ids) for piece in flat]
    if rows is not None:
        columns["position_ids"] = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        # The last position of one piece would be taught the first of the next.
        columns["labels"][np.cumsum([0, *sizes[:-1]])] = IGNORED
    counts = [sum(len(pieces[n].ids) for n in row) for row in order]
    return LanguageDataset(columns, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


class LanguageCollator:
    """Samples of a :class:`LanguageDataset` -> one batch, padded to its longest on the side the
    tokenizer says.

    Returns ``input_ids`` and ``labels`` int64 [B, T], and ``attention_mask``; packed,
    ``position_ids`` in its place: padding then is a document of its own at the end of its row.

    What stands on the left is made to change nothing: the last of it is not taught the first token
    of the text, and ``position_ids`` count from there.

    Args:
        tokenizer: Says what pads, and where.
        pad_to_multiple_of: Of the length of a batch.
        with_positions: The model takes ``position_ids``. One that does not, and has learned
            positions, computes something else behind padding.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_multiple_of: int | None = None,
        with_positions: bool = True,
    ) -> None:
        pad = tokenizer.pad_token_id
        if not isinstance(pad, int):
            raise DataError("The tokenizer has no pad token; set data.pad_token: eos.")
        self.pad = {"input_ids": pad, "labels": IGNORED}
        self.left, self.with_positions = tokenizer.padding_side == "left", with_positions
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        is_packed = "position_ids" in samples[0]
        left = self.left and not is_packed
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = -(-max(lengths) // self.multiple) * self.multiple
        shape = (len(samples), width)
        arrays = {name: np.full(shape, value, np.int64) for name, value in self.pad.items()}
        arrays["position_ids" if is_packed else "attention_mask"] = np.zeros(shape, np.int64)
        if left and self.with_positions:
            arrays["position_ids"] = np.zeros(shape, np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(width - length, width) if left else slice(0, length)
            for name, values in sample.items():
                arrays[name][row, place] = values
            if is_packed:
                arrays["position_ids"][row, length:] = np.arange(width - length)
            else:
                arrays["attention_mask"][row, place] = 1
            if left:
                arrays["labels"][row, width - length] = IGNORED
            if left and self.with_positions:
                arrays["position_ids"][row, place] = np.arange(length)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def targets_of(labels: Tensor) -> Tensor:
    """What each position is taught: the next label; the last position nothing. [B, T] -> [B, T]."""
    nothing = labels.new_full((len(labels), 1), IGNORED)
    return torch.cat([labels[:, 1:], nothing], 1)


__all__ = [
    "IGNORED",
    "ForeignTokens",
    "LanguageCollator",
    "LanguageDataset",
    "Piece",
    "RowWriter",
    "lay_out",
    "packed",
    "targets_of",
    "tokenize_texts",
]
