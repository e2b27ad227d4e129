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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scpl_ds.data._base import Texts
from scpl_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

IGNORED = -100


class Piece(NamedTuple):
    """Tokens that belong together."""

    ids: list[int]
    labels: list[int]
    """The ids, ``IGNORED`` where nothing is learned. As everywhere in Hugging Face's models, a
    position is taught the label of the next."""


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

    Raises:
        DataError: A text gives no token, a prompt leaves no room for its completion, the tokenizer
            has no chat template or one that rewrites what was said, a token is not of the model.
    """
    dataset = texts.train if split == "train" else texts.eval
    assert dataset is not None
    write = RowWriter(texts.kind, tokenizer, max_length, completion_only, vocab_size)
    pieces: list[Piece] = []
    for index, row in enumerate(cast("Iterable[Mapping[str, Any]]", dataset)):
        pieces += write(row, texts.at(split, index))
    if cut := write.cut:
        log.warning(
            "%d of %d samples (%.1f %%) are longer than data.max_length %d tokens and were cut.",
            cut, len(dataset), 100 * cut / len(dataset), max_length,
        )  # fmt: skip
    return lay_out(pieces, max_length if packing else None)


class RowWriter:
    """What a row becomes: pieces of at most ``max_length`` tokens. Arguments as in
    :func:`tokenize_texts`.

    Raises:
        DataError: From calls: the row gives no token, nothing to learn, or a token that is not of
            the model.
    """

    def __init__(
        self,
        kind: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        completion_only: bool = True,
        vocab_size: int | None = None,
    ) -> None:
        self.kind, self.tokenizer, self.max_length = kind, tokenizer, max_length
        self.completion_only, self.vocab_size = completion_only, vocab_size
        self.cut = 0
        """Completions and conversations that lost their end."""

    def __call__(self, row: Mapping[str, Any], where: str) -> list[Piece]:
        whole = _WRITERS[self.kind](self.tokenizer, row, self.completion_only, where)
        if not whole.ids:
            raise DataError(f"{where} gives no token at all; take it out of the data.")
        highest = max(whole.ids)
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise ForeignTokens(
                f"{where} has token id {highest}, but the model's vocabulary has "
                f"{self.vocab_size} tokens: this tokenizer belongs to another model. Use the one "
                "saved with the model."
            )
        if self.kind == "text":
            return list(_pieces(whole, self.max_length))
        kept = Piece(whole.ids[: self.max_length], whole.labels[: self.max_length])
        if all(label == IGNORED for label in kept.labels[1:]):
            raise DataError(
                f"{where}: the first {self.max_length} of {len(whole.ids)} tokens "
                "(data.max_length) hold nothing to learn: the prompt fills them. Raise "
                "data.max_length, or shorten the prompt."
            )
        self.cut += len(whole.ids) > self.max_length
        return [kept]


class ForeignTokens(DataError):
    """The tokenizer is another model's: no other row would be better."""


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
        "input_ids": np.concatenate([np.asarray(piece.ids, np.int32) for piece in flat]),
        "labels": np.concatenate([np.asarray(piece.labels, np.int32) for piece in flat]),
    }
    sizes = [len(piece.ids) for piece in flat]
    if rows is not None:
        columns["position_ids"] = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
        # The last position of one piece would be taught the first of the next.
        columns["labels"][np.cumsum([0, *sizes[:-1]])] = IGNORED
    counts = [sum(len(pieces[n].ids) for n in row) for row in order]
    return LanguageDataset(columns, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]))


def _pieces(whole: Piece, size: int) -> Iterator[Piece]:
    """A document in pieces; a last one of a single token has nothing to learn."""
    for start in range(0, len(whole.ids), size):
        ids = whole.ids[start : start + size]
        if len(ids) > 1 or len(whole.ids) == 1:
            yield Piece(ids, whole.labels[start : start + size])


def _with_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if not isinstance(end, int) or ids[-1:] == [end] else [*ids, end]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _plain(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], completion_only: bool, where: str
) -> Piece:
    del completion_only, where
    ids = _with_end(tokenizer, _ids(tokenizer, row["text"]))
    return Piece(ids, list(ids))


def _prompted(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], completion_only: bool, where: str
) -> Piece:
    """Prompt and completion are tokenised apart, so that no token is half of each."""
    del where
    prompt = _ids(tokenizer, row["prompt"])
    end = tokenizer.eos_token_id
    if prompt[-1:] == [end] and isinstance(end, int):  # a tokenizer that ends whatever it is given
        prompt = prompt[:-1]
    answer = _with_end(tokenizer, _ids(tokenizer, row["completion"], special=False))
    first = [IGNORED] * len(prompt) if completion_only else prompt
    return Piece([*prompt, *answer], [*first, *answer])


def _spoken(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], completion_only: bool, where: str
) -> Piece:
    """A conversation in the model's chat template. What the assistant says is learned: the tokens
    that the template adds when its turn comes after what it writes to ask for one."""
    messages = [dict(message) for message in row["messages"]]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a conversation, but the tokenizer has no chat template. Use an instruct "
            "model's tokenizer (model.tokenizer_name_or_path), or prompt and completion columns."
        )

    def written(count: int, *, ask: bool) -> list[int]:
        try:
            found: Any = tokenizer.apply_chat_template(
                messages[:count], tokenize=True, add_generation_prompt=ask, return_dict=True
            )
        # A template is a program of the model's author and raises what it likes.
        except Exception as error:
            raise DataError(
                f"{where}: the chat template refuses the conversation: {error} Its roles are "
                f"{[message.get('role') for message in messages[:count]]}."
            ) from error
        return list(found["input_ids"])

    ids = written(len(messages), ask=False)
    if not completion_only:
        return Piece(ids, list(ids))
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, after = written(number, ask=True), written(number + 1, ask=False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{where}: the chat template writes the conversation up to message {number + 1} "
                "otherwise than the whole of it, so what the assistant said cannot be found in it. "
                "Set data.completion_only: false, or give prompt and completion columns."
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return Piece(ids, labels)


_WRITERS: dict[str, Callable[..., Piece]] = {
    "text": _plain,
    "prompt": _prompted,
    "messages": _spoken,
}


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
