"""The data of a run: read, checked, tokenised, and handed out in micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scpl_ds.data._base import DataOptions, Texts, TextStream, check_labels, drawn
from scpl_ds.data._columns import ColumnOptions
from scpl_ds.data._identity import checksum_of
from scpl_ds.data.demo import resolve_model_path
from scpl_ds.data.language import (
    LanguageCollator,
    LanguageDataset,
    RowWriter,
    tokenize_texts,
)
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.stream import Position, Stream
from scpl_ds.data.stream_loader import StreamLoader
from scpl_ds.data.text import (
    Collator,
    TokenizedDataset,
    check_max_length,
    lengths_of,
    load_tokenizer,
    tokenize,
)
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import CheckpointError, DataError, RecipeError
from scpl_ds.partition.anatomy import anatomy_of
from scpl_ds.partition.config import load_config, refuse_encoder
from scpl_ds.partition.packing import keeps_documents_apart
from scpl_ds.partition.plan import LayerTimes
from scpl_ds.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AHEAD = 2  # micro-batches that are ready before a GPU asks for them


Tokenized = TokenizedDataset | LanguageDataset


@dataclasses.dataclass(frozen=True)
class Facts:
    """What every rank must know about data that only first-stage ranks read."""

    num_labels: int | None
    """None: a language model, which has no classes."""
    label_names: tuple[str, ...]
    pad_token_id: int | None
    """None: whoever gave the data pads by itself."""
    num_train: int | None
    """None: a stream, of whose length nobody knows."""
    num_eval: int
    majority_accuracy: float | None
    """Accuracy of always answering the most frequent label of the evaluation split; None for a
    language model."""
    times: LayerTimes | None = None
    """With ``scpl.partition: time``, what rank 0 measured."""
    kept_bounds: tuple[int, ...] | None = None
    """Or the cut that a resumed or scored run has already."""
    train_checksum: str | None = None
    """Of the tokenised training samples, or of some of a script's; None of a stream, of samples
    that change, or where nothing is trained."""


@dataclasses.dataclass
class Data:
    """Tokenised splits, or a stream, on first-stage ranks; only their sizes elsewhere."""

    facts: Facts
    tokenizer: Any
    train: Tokenized | Stream | range | Dataset[Any]
    eval: Tokenized | range | Dataset[Any]
    input_names: Collection[str] = ()
    """What the model's forward takes, where data are read."""
    collate: Callable[[list[Any]], dict[str, Tensor]] | None = None
    """Of a script that gave its own; else the recipe's."""


@dataclasses.dataclass
class _Reading:
    """What it takes to tokenise for a recipe's model."""

    options: DataOptions
    tokenizer: Any
    positions: int | None
    vocab_size: int
    input_names: Collection[str]
    config: PretrainedConfig


def read(recipe: Recipe, trained: Path | None) -> Data:
    """Load, check and tokenise the data of a recipe.

    Args:
        recipe: Names the data, the model and its tokenizer.
        trained: As in ``setup.load_data``.
    """
    model, options = recipe.model, _options(recipe)
    tokenizer = load_tokenizer(
        model.tokenizer_name_or_path or model.name_or_path,
        pad_token=options.pad_token,
        revision=model.revision,
    )
    config = load_config(resolve_model_path(model.name_or_path), revision=model.revision)
    if model.task == "causal-lm":
        refuse_encoder(config, model.name_or_path)
    # With the attention too, so that one that is not there is refused before minutes of tokenising.
    attention = model.attn_implementation
    reading = _Reading(
        options,
        tokenizer,
        getattr(config.get_text_config(), "max_position_embeddings", None),
        config.get_text_config().vocab_size,
        anatomy_of(config, model.task, attn_implementation=attention).forward_keys,
        config,
    )
    found = (_texts if model.task == "causal-lm" else _labelled)(recipe, reading, trained)
    found.input_names = reading.input_names
    if trained is None and found.facts.num_train == 0:
        raise DataError(f"data: '{recipe.data.name}' has no training split.")
    if isinstance(data := found.train, TokenizedDataset | LanguageDataset):
        labels = data.labels if isinstance(data, TokenizedDataset) else None
        checksum = checksum_of(data.columns, data.offsets, labels)
        found.facts = dataclasses.replace(found.facts, train_checksum=checksum)
    return found


def _texts(recipe: Recipe, reading: _Reading, trained: Path | None) -> Data:
    options = reading.options
    if options.packing:
        _check_packing(recipe, reading, evaluated_only=trained is not None)
    check_max_length(reading.tokenizer, options.max_length, reading.positions)
    stream: TextStream | None = None
    texts: Texts | None
    if options.streaming:
        stream, texts = recipe.data.create().stream_texts()
    else:
        texts = recipe.data.create().load_texts()

    def ids(split: str) -> LanguageDataset | range:
        unwanted = split == "train" and trained is not None
        if texts is None or getattr(texts, split) is None or unwanted:
            return range(0)
        found = tokenize_texts(
            texts,
            split,
            reading.tokenizer,
            max_length=options.max_length,
            packing=options.packing,
            completion_only=options.completion_only,
            vocab_size=reading.vocab_size,
            drop_invalid=_drops(options),
        )
        most = options.max_train_samples if split == "train" else options.max_eval_samples
        if texts.kind != "text" or most is None or most >= len(found):
            return found
        return found.take(drawn(len(found), most, options.seed))

    train, held_out = ids("train"), ids("eval")
    pad = reading.tokenizer.pad_token_id
    facts = Facts(None, (), pad, len(train), len(held_out), None)
    if stream is None or trained is not None:
        return Data(facts, reading.tokenizer, train, held_out)
    facts = dataclasses.replace(facts, num_train=None)
    streamed = _stream(stream, recipe, reading)
    next(streamed.samples(Position()))  # what is wrong with the first rows is said before the model
    return Data(facts, reading.tokenizer, streamed, held_out)


def _check_packing(recipe: Recipe, reading: _Reading, *, evaluated_only: bool) -> None:
    """Refuse rows in which documents would see each other."""
    model = recipe.model
    if "position_ids" not in reading.input_names:
        raise DataError(
            f"data.packing: the model '{model.name_or_path}' takes no position_ids, which keep "
            "packed documents apart. Set data.packing: false."
        )
    found = keeps_documents_apart(reading.config, attn_implementation=model.attn_implementation)
    if not found.apart:
        raise DataError(
            f"data.packing: would let documents see each other in '{model.name_or_path}' "
            f"(model type {reading.config.model_type}): {found.why}. Set data.packing: false."
        )
    sizes = {"train.per_device_eval_batch_size": recipe.eval_batch_size}
    if not evaluated_only:
        key = "deepspeed.train_micro_batch_size_per_gpu"
        sizes = {key: recipe.deepspeed.micro_batch_size, **sizes}
    many = [f"{key} is {size}" for key, size in sizes.items() if size > 1]
    if "flash" in (model.attn_implementation or "") and many:
        raise DataError(
            f"data.packing: with attn_implementation {model.attn_implementation} transformers "
            f"keeps documents apart in micro-batches of one row only, but {' and '.join(many)}. "
            "Set these to 1 and data.max_length higher, or model.attn_implementation: sdpa, or "
            "data.packing: false."
        )


def _stream(source: TextStream, recipe: Recipe, reading: _Reading) -> Stream:
    options = reading.options
    write = RowWriter(
        source.kind,
        reading.tokenizer,
        options.max_length,
        options.completion_only,
        reading.vocab_size,
        _drops(options),
    )
    return Stream(
        source,
        write,
        packing=options.packing,
        buffer=options.shuffle_buffer,
        seed=recipe.train.order_seed,
    )


def _drops(options: DataOptions) -> bool | None:
    """``drop_invalid_rows``; None of a source that does not have it."""
    return options.drop_invalid_rows if isinstance(options, ColumnOptions) else None


def _labelled(recipe: Recipe, reading: _Reading, trained: Path | None) -> Data:
    model, options, choice = recipe.model, reading.options, recipe.data
    classes = None if trained is None else _classes(trained)
    if classes and isinstance(options, ColumnOptions) and options.label_names is None:
        # Without it a file in which a class is missing would get other ids than in training.
        options = options.model_copy(update={"label_names": classes})
        choice = choice.model_copy(update={"options": options})
    splits = choice.create().load()
    num_labels = check_labels(splits, len(classes) if classes else model.num_labels)

    def ids(split: Any) -> TokenizedDataset | range:
        if split is None:
            return range(0)
        return tokenize(
            split,
            reading.tokenizer,
            max_length=options.max_length,
            max_positions=reading.positions,
            vocab_size=reading.vocab_size,
            input_names=reading.input_names,
        )

    train, held_out = ids(None if trained else splits.train), ids(splits.eval)
    majority = None
    if isinstance(held_out, TokenizedDataset):
        majority = float(np.bincount(held_out.labels).max() / len(held_out))
    pad = reading.tokenizer.pad_token_id
    names = classes or tuple(splits.label_names)
    facts = Facts(num_labels, names, pad, len(train), len(held_out), majority)
    return Data(facts, reading.tokenizer, train, held_out)


def _classes(trained: Path) -> tuple[str, ...]:
    """Names of the classes of a trained model, by id."""
    if not (trained / "config.json").is_file():
        raise CheckpointError(
            f"{trained} has no config.json, which names the classes; checkpoints of `scpl-ds "
            "train` have one. Score another checkpoint, or train again."
        )
    config: Any = load_config(str(trained))
    return tuple(str(config.id2label[k]) for k in range(config.num_labels))


def _options(recipe: Recipe) -> DataOptions:
    options = recipe.data.options
    if not isinstance(options, DataOptions):
        raise RecipeError(
            f"data.name: the Options of '{recipe.data.name}' must derive from "
            "scpl_ds.data._base.DataOptions (max_length, pad_token ...)."
        )
    return options


def make_loaders(
    recipe: Recipe, data: Data, mesh: Mesh, device: torch.device
) -> tuple[BatchLoader | StreamLoader, BatchLoader | None]:
    """Training and evaluation loaders. On ranks that read no data they only count.

    For a GPU a thread collates ahead into pinned memory. Beside a CPU's milliseconds to seconds a
    step the fraction of one that collating takes is not worth a thread (docs/profiling.md).
    """
    sizes = recipe.deepspeed.batch(mesh.dp_size)
    cuda = device.type == "cuda"
    held_out = make_eval_loader(recipe, data, mesh)
    if data.facts.num_train is None:
        stream = data.train if isinstance(data.train, Stream) else None
        streamed = StreamLoader(
            stream,
            micro_batch_size=sizes.micro_batch,
            collate=_collator(recipe, data),
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            global_batch_size=sizes.global_batch,
            num_workers=recipe.train.dataloader_num_workers,
            ahead=AHEAD if cuda else 0,
            pin_memory=cuda,
        )
        return streamed, held_out
    assert not isinstance(data.train, Stream)
    train = BatchLoader(
        data.train,
        micro_batch_size=sizes.micro_batch,
        shuffle=True,
        drop_last=True,
        global_batch_size=sizes.global_batch,
        ahead=AHEAD if cuda else 0,
        pin_memory=cuda,
        lengths=lengths_of(data.train) if recipe.train.group_by_length else None,
        checksum=data.facts.train_checksum,
        **_loading(recipe, data, mesh),
    )
    return train, held_out


def saved_position(loader: BatchLoader | StreamLoader, mesh: Mesh) -> dict[str, Any]:
    """What a checkpoint keeps of where training stands in the data; every rank calls it."""
    if isinstance(loader, BatchLoader):
        return loader.position
    return loader.saved(gather_objects(mesh, loader.position))


def make_eval_loader(recipe: Recipe, data: Data, mesh: Mesh) -> BatchLoader | None:
    """Loader of the evaluation data, None where there are none."""
    if data.facts.num_eval == 0:
        return None
    return BatchLoader(
        data.eval,
        micro_batch_size=recipe.eval_batch_size,
        shuffle=False,
        drop_last=False,
        **_loading(recipe, data, mesh),
    )


def whole_eval_loader(recipe: Recipe, data: Data) -> BatchLoader:
    """Loader of all evaluation data for one rank alone, which must have read them."""
    size, collate = recipe.eval_batch_size, _collator(recipe, data)
    return BatchLoader(
        data.eval, micro_batch_size=size, dp_rank=0, dp_size=1, seed=0, shuffle=False,
        collate=collate, drop_last=False,
    )  # fmt: skip


def _loading(recipe: Recipe, data: Data, mesh: Mesh) -> dict[str, Any]:
    """What the two loaders have in common."""
    return {
        "dp_rank": mesh.dp_rank,
        "dp_size": mesh.dp_size,
        "seed": recipe.train.order_seed,
        "collate": _collator(recipe, data),
        "num_workers": recipe.train.dataloader_num_workers,
    }


def _collator(recipe: Recipe, data: Data) -> Any:
    if data.collate is not None:
        return data.collate
    if data.tokenizer is None:
        return _no_batch
    multiple = _options(recipe).pad_to_multiple_of
    if recipe.model.task != "causal-lm":
        return Collator(data.tokenizer, pad_to_multiple_of=multiple)
    takes = "position_ids" in data.input_names
    return LanguageCollator(data.tokenizer, pad_to_multiple_of=multiple, with_positions=takes)


def _no_batch(samples: list[Any]) -> Any:
    raise AssertionError("only first-stage ranks read data")
