"""Text to token ids, and token ids to padded batches.

Tokenised once, up front, into three flat arrays: no cache files of ``datasets`` are left on the
user's disk, workers share the pages, and a sample is a slice.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from scpl_ds.data.demo import resolve_model_path
from scpl_ds.errors import DataError
from scpl_ds.registry import did_you_mean

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_BATCH = 1000
_UNLIMITED = 10**9
"""Tokenizers without a limit say so with a huge number."""


def load_tokenizer(
    name_or_path: str, *, pad_token: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, able to pad.

    The model must learn of the padding token too: set ``config.pad_token_id`` to the tokenizer's,
    or classifiers that look for the last token (GPT-2, Llama) refuse or misread padded batches.

    Args:
        name_or_path: Hub name, folder, or ``demo``.
        pad_token: ``data.pad_token``: ``eos``, or the text of a token the tokenizer knows.
        revision: Branch, tag or commit on the hub.

    Raises:
        DataError: No tokenizer there, none that can pad, or ``pad_token`` is no token of it.
    """
    from transformers import AutoTokenizer

    path = resolve_model_path(name_or_path)
    local = Path(path).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(local) if local.is_dir() else path, revision=revision, trust_remote_code=False
        )
        # transformers 5 makes up a tokenizer of nothing but special tokens where files are missing.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty: tokenizer.json or the vocabulary is missing")
    # Not narrower: a missing or damaged tokenizer surfaces as OSError, ValueError, TypeError,
    # ImportError or an error of the Rust library, depending on the architecture.
    except Exception as error:
        cause = " ".join(str(error).split())[:400]
        here = sorted(p.name for p in local.iterdir())[:20] if local.is_dir() else []
        advice = (
            f"The folder holds {', '.join(here) or 'nothing'}; copy the model's tokenizer files "
            f"(tokenizer.json, tokenizer_config.json) into it."
            if local.is_dir()
            else "There is no such folder here, so it was looked for on the hub. Check "
            "model.name_or_path; without a network, name a local folder, or copy the hub's cache "
            "(HF_HOME) from a connected machine and set HF_HUB_OFFLINE=1."
        )
        raise DataError(
            f"No tokenizer for '{name_or_path}' ({type(error).__name__}: {cause}) {advice}"
        ) from error
    _set_pad_token(tokenizer, pad_token, name_or_path)
    return tokenizer


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None, name: str) -> None:
    eos = tokenizer.eos_token
    if pad_token is None:
        if tokenizer.pad_token_id is None:
            way = (
                f"Set data.pad_token: eos to use its end-of-text token '{eos}'"
                if eos is not None
                else "Set data.pad_token to one of its tokens"
            )
            raise DataError(
                f"The tokenizer of '{name}' has no pad token, so batches of unequal length cannot "
                f"be made. {way} (padded places are masked out)."
            )
        return
    if pad_token == "eos":
        if eos is None:
            raise DataError(
                f"data.pad_token: eos, but the tokenizer of '{name}' has no end-of-text token. "
                f"Name one of its tokens instead."
            )
        pad_token = str(eos)
    vocabulary = tokenizer.get_vocab()
    if pad_token not in vocabulary:
        special = [str(token) for token in tokenizer.all_special_tokens]
        raise DataError(
            f"data.pad_token: '{pad_token}' is not among the {len(vocabulary)} tokens of '{name}'"
            f"{did_you_mean(pad_token, ['eos', *special]) or '.'} Its special tokens: "
            f"{', '.join(special) or 'none'}. A new token would need a new row in the embedding."
        )
    tokenizer.pad_token = pad_token


class TokenizedDataset(Dataset[dict[str, Any]]):
    """Tokenised samples in memory; an item is ``{"input_ids": int32 [T], ..., "labels": int}``.

    Four bytes a token (five with token types); the attention mask is made when padding.
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], offsets: np.ndarray, labels: np.ndarray
    ) -> None:
        self.columns = dict(columns)
        self.offsets = offsets
        """[N + 1]; sample i is ``[offsets[i], offsets[i + 1])`` of each column."""
        self.labels = labels
        """Class ids, int64 [N]."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self.offsets[index], self.offsets[index + 1]
        sample: dict[str, Any] = {name: flat[start:end] for name, flat in self.columns.items()}
        sample["labels"] = int(self.labels[index])
        return sample

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per sample, [N]."""
        return np.diff(self.offsets)


def lengths_of(data: Any) -> np.ndarray:
    """Tokens of each sample of tokenised data or of a subset of them, [N]; zeros on a rank that
    only counts samples."""
    if isinstance(data, Subset):
        return lengths_of(data.dataset)[np.asarray(data.indices)]
    return getattr(data, "lengths", np.zeros(len(data), np.int64))


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    input_names: Collection[str] | None = None,
) -> TokenizedDataset:
    """Tokenise the ``text`` (and ``text_pair``) of a split; cut texts are counted and logged once.

    Args:
        dataset: A split of :class:`~scpl_ds.data._base.Splits`.
        tokenizer: From :func:`load_tokenizer`.
        max_length: Longest sample in tokens, special tokens included.
        max_positions: ``config.max_position_embeddings`` of the model.
        vocab_size: ``config.vocab_size`` of the model.
        input_names: What the model's forward takes; keeps ``token_type_ids`` only if among them.
            None trusts the tokenizer, which for some models (DistilBERT with BERT's tokenizer)
            gives one thing too many.

    Raises:
        DataError: ``max_length`` is more than the model has positions, or leaves no room for text;
            a token is outside the model's vocabulary; a text gives no token at all.
    """
    check_max_length(tokenizer, max_length, max_positions)
    names = ["input_ids"]
    if "token_type_ids" in tokenizer.model_input_names and (
        input_names is None or "token_type_ids" in input_names
    ):
        names.append("token_type_ids")
    flat: dict[str, list[np.ndarray]] = {name: [] for name in names}
    lengths: list[int] = []
    truncated = 0
    for start in range(0, len(dataset), _BATCH):
        rows = dataset[start : start + _BATCH]
        texts, pairs = list(rows["text"]), rows.get("text_pair")
        encoded = _encode(tokenizer, texts, pairs, max_length)
        for name in names:
            dtype = np.int32 if name == "input_ids" else np.int8
            flat[name] += [np.asarray(ids, dtype=dtype) for ids in encoded[name]]
        sizes = [len(ids) for ids in encoded["input_ids"]]
        lengths += sizes
        at_limit = [i for i, size in enumerate(sizes) if size >= max_length]
        if at_limit:  # only these can have been cut: look at their full length
            full = _encode(
                tokenizer,
                [texts[i] for i in at_limit],
                None if pairs is None else [pairs[i] for i in at_limit],
                None,
            )
            truncated += sum(len(ids) > max_length for ids in full["input_ids"])
    if truncated:
        log.warning(
            "%d of %d samples (%.1f %%) are longer than data.max_length %d tokens and were cut.",
            truncated,
            len(dataset),
            100 * truncated / len(dataset),
            max_length,
        )
    tokenized = TokenizedDataset(
        {name: np.concatenate(parts) for name, parts in flat.items()},
        np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        np.asarray(dataset.with_format("numpy")["label"][:], dtype=np.int64),
    )
    _check_ids(tokenized, dataset, vocab_size)
    return tokenized


def _check_ids(
    tokenized: TokenizedDataset, dataset: datasets.Dataset, vocab_size: int | None
) -> None:
    none = np.flatnonzero(tokenized.lengths == 0)
    if len(none):
        raise DataError(
            f"Sample {none[0]} ({dataset[int(none[0])]['text'][:40]!r}) gives no token at all, as "
            f"do {len(none)} of {len(tokenized)} samples; take them out of the data."
        )
    ids = tokenized.columns["input_ids"]
    if vocab_size is not None and ids.max() >= vocab_size:
        place = int(ids.argmax())
        sample = int(np.searchsorted(tokenized.offsets, place, side="right")) - 1
        raise DataError(
            f"Sample {sample} has token id {ids[place]}, but the model's vocabulary has "
            f"{vocab_size} tokens: this tokenizer belongs to another model. Use the one "
            f"saved with the model."
        )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int | None,
) -> Mapping[str, Any]:
    return tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )


def check_max_length(
    tokenizer: PreTrainedTokenizerBase, max_length: int, max_positions: int | None
) -> None:
    """
    Raises:
        DataError: ``max_length`` is more than the model has positions, or leaves no room for text.
    """
    limits = {"the model": max_positions, "its tokenizer": tokenizer.model_max_length}
    for owner, limit in limits.items():
        if limit is not None and limit < _UNLIMITED and max_length > limit:
            raise DataError(
                f"data.max_length: {max_length} tokens, but {owner} takes at most {limit} "
                f"positions. Set data.max_length to {limit} or less."
            )
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= special:
        raise DataError(
            f"data.max_length: {max_length} leaves no room for text: the tokenizer adds {special} "
            f"special tokens to every sample. Set at least {special + 1}."
        )


class Collator:
    """Samples of a :class:`TokenizedDataset` -> one padded batch, padded to its longest sample.

    Pads on the side the tokenizer says. Returns ``input_ids`` and ``attention_mask`` int64 [B, T],
    ``token_type_ids`` where samples have them, ``labels`` int64 [B].
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, pad_to_multiple_of: int | None = None
    ) -> None:
        pad = tokenizer.pad_token_id
        if pad is None:
            raise DataError("The tokenizer has no pad token; set data.pad_token: eos.")
        # Plain values only: loader workers are sent this object.
        assert isinstance(pad, int)
        self.pad = {"input_ids": pad, "token_type_ids": tokenizer.pad_token_type_id}
        self.left = tokenizer.padding_side == "left"
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in samples[0] if name != "labels"]
        lengths = [len(sample["input_ids"]) for sample in samples]
        width = -(-max(lengths) // self.multiple) * self.multiple
        shape = (len(samples), width)
        arrays = {name: np.full(shape, self.pad[name], dtype=np.int64) for name in names}
        arrays["attention_mask"] = np.zeros(shape, dtype=np.int64)
        for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
            place = slice(width - length, width) if self.left else slice(0, length)
            for name in names:
                arrays[name][row, place] = sample[name]
            arrays["attention_mask"][row, place] = 1
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["labels"] = torch.tensor([sample["labels"] for sample in samples], dtype=torch.int64)
        return batch
