"""A row of text -> token ids, with a label at every position that is learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from scpl_ds.data._texts import as_json, why_not
from scpl_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


class Piece(NamedTuple):
    """Tokens that belong together."""

    ids: np.ndarray
    """int32 [T]; millions of Python's integers would not fit."""
    labels: np.ndarray
    """The ids, ``IGNORED`` where nothing is learned. As everywhere in Hugging Face's models, a
    position is taught the label of the next."""


class RowWriter:
    """What a row becomes: pieces of at most ``max_length`` tokens. Arguments as in
    ``language.tokenize_texts``.

    Raises:
        DataError: ``max_length`` is 1. From calls: the row gives nothing to learn, or a token that
            is not of the model.
    """

    def __init__(
        self,
        kind: str,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        completion_only: bool = True,
        vocab_size: int | None = None,
        drop_invalid: bool | None = None,
    ) -> None:
        if max_length < 2:
            raise DataError(
                f"data.max_length: {max_length} leaves a language model no next token to learn. "
                "Set at least 2."
            )
        self.kind, self.tokenizer, self.max_length = kind, tokenizer, max_length
        self.completion_only, self.vocab_size = completion_only, vocab_size
        self.cut = 0
        """Completions and conversations that lost their end."""
        self.drop_invalid = drop_invalid
        self.dropped, self.last = 0, DataError("")
        """Rows left out, and what was wrong with the last of them."""

    def __call__(
        self, row: Mapping[str, Any], where: str, columns: Mapping[str, str] | None = None
    ) -> list[Piece]:
        """
        Args:
            row: Its cells, by what they are.
            where: It was read, for messages.
            columns: What the cells are called there, of a row that nobody has looked at.
        """
        try:
            for name, column in (columns or {}).items():
                if problem := why_not(name, row[name]):
                    raise DataError(f"{where}: column '{column}' {problem}.")
            return self._written(row, where)
        except ForeignTokens:
            raise
        except DataError as error:
            if self.drop_invalid is None:
                raise
            if not self.drop_invalid:
                raise DataError(
                    f"{error} Correct it, or leave such rows out: data.drop_invalid_rows: true."
                ) from error
            self.dropped, self.last = self.dropped + 1, error
            return []

    def _written(self, row: Mapping[str, Any], where: str) -> list[Piece]:
        whole = _WRITERS[self.kind](self.tokenizer, row, self.completion_only, where)
        if len(whole.ids) < 2:
            count = "one token only" if len(whole.ids) else "no token at all"
            raise DataError(
                f"{where} gives {count}, which leaves nothing to learn; take it out of the data."
            )
        highest = int(whole.ids.max())
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise ForeignTokens(
                f"{where} has token id {highest}, but the model's vocabulary has "
                f"{self.vocab_size} tokens: this tokenizer belongs to another model. Use the one "
                "saved with the model."
            )
        if self.kind == "text":
            return list(_pieces(whole, self.max_length))
        kept = Piece(whole.ids[: self.max_length], whole.labels[: self.max_length])
        if (kept.labels[1:] == IGNORED).all():
            raise DataError(
                f"{where}: the first {self.max_length} of {len(whole.ids)} tokens "
                "(data.max_length) hold nothing to learn: the prompt fills them. Raise "
                "data.max_length, or shorten the prompt."
            )
        self.cut += len(whole.ids) > self.max_length
        return [kept]


class ForeignTokens(DataError):
    """The tokenizer is another model's: no other row would be better."""


def _pieces(whole: Piece, size: int) -> Iterator[Piece]:
    """A document in pieces; a last one of a single token has nothing to learn."""
    for start in range(0, len(whole.ids), size):
        ids = whole.ids[start : start + size]
        if len(ids) > 1:
            yield Piece(ids, whole.labels[start : start + size])


def _piece(ids: list[int], labels: list[int]) -> Piece:
    tokens = np.asarray(ids, np.int32)
    return Piece(tokens, tokens if labels is ids else np.asarray(labels, np.int32))


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
    return _piece(ids, ids)


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
    return _piece([*prompt, *answer], [*first, *answer])


def _spoken(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], completion_only: bool, where: str
) -> Piece:
    """A conversation in the model's chat template. What the assistant says is learned: the tokens
    that the template adds when its turn comes after what it writes to ask for one."""
    said = row["messages"]
    messages = json.loads(said if isinstance(said, str) else as_json(said))
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
        return _piece(ids, ids)
    labels = [IGNORED] * len(ids)
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if number == 0:
            raise DataError(
                f"{where}: the conversation begins with the assistant, and the chat template asks "
                "for an answer only to what was said before. Begin with another role, or set "
                "data.completion_only: false."
            )
        before, after = written(number, ask=True), written(number + 1, ask=False)
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise DataError(
                f"{where}: the chat template writes the conversation up to message {number + 1} "
                "otherwise than the whole of it, so what the assistant said cannot be found in it. "
                "Set data.completion_only: false, or give prompt and completion columns."
            )
        labels[len(before) : len(after)] = after[len(before) :]
    return _piece(ids, labels)


_WRITERS: dict[str, Callable[..., Piece]] = {
    "text": _plain,
    "prompt": _prompted,
    "messages": _spoken,
}
