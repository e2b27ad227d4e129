"""One training of ``scpl-ds bench quality``: the engine, no folder, scored at its end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.prepared import Data, make_eval_loader, make_loaders
from scpl_ds.data.stream import Stream
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.errors import DataError
from scpl_ds.evaluation import evaluate
from scpl_ds.recipe import Recipe, recipe_from_mapping
from scpl_ds.setup import cut_model, load_data, make_engine, start_world

_SPLIT_SEED = 0
"""The validation samples are the same for all methods and seeds."""


def train_and_score(
    recipe: Recipe, validation: float, *, also: Sequence[Path] = (), untrained: bool = False
) -> dict[str, Any]:
    """Train a recipe on this process alone and score it once, at its end.

    Args:
        recipe: With an evaluation split, which is the test set.
        validation: Share of the training data that is held out.
        also: Plain texts that a language model is scored on too.
        untrained: Score it without a step of training.

    Returns:
        ``validation_accuracy``, ``test_accuracy`` (in [0, 1]), ``samples_per_s`` and ``seconds`` of
        the training steps, ``steps``, and ``exit_accuracies`` (test accuracy after each layer with
        a local head that classifies). Of a language model ``validation_perplexity`` and
        ``test_perplexity`` in the place of accuracies, ``tokens_per_s``, and ``also_perplexity``,
        a number for each text of ``also`` by the file's name without its ending.

    Raises:
        DataError: There is no evaluation split, nothing is left to train on, or a text of ``also``
            cannot be read.
    """
    mesh, device = start_world(recipe)
    data = load_data(recipe, mesh)
    if isinstance(data.train, Stream):
        raise DataError("bench quality splits and counts the data; set data.streaming: false.")
    if isinstance(data.train, range) or data.facts.num_eval == 0:
        raise DataError(
            f"data: '{recipe.data.name}' has no evaluation split, which is the test set here. Give "
            "one, for example data.eval_file=test.csv."
        )
    others = {path.stem: _other_text(recipe, path, mesh) for path in also}
    learned, held_out = _split(data, validation)
    model = cut_model(recipe, data.facts)
    train, validate = make_loaders(recipe, learned, mesh, device)
    test = make_eval_loader(recipe, data, mesh)
    assert validate is not None and test is not None and isinstance(train, BatchLoader)
    per_epoch = train.num_micro_batches_per_epoch // recipe.deepspeed.batch(1).accumulation
    steps = recipe.train.max_steps
    if steps <= 0:
        steps = max(1, round(per_epoch * recipe.train.num_train_epochs))
    engine = make_engine(recipe, model, mesh, device, total_steps=steps)
    batches = iter(train)
    began = time.monotonic()
    for _ in range(0 if untrained else steps):
        engine.train_batch(batches)
    engine.drain()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - began
    found = evaluate(engine, validate)
    tested = evaluate(engine, test)
    own: dict[str, Any] = {}
    for name, score in (("validation", found), ("test", tested)):
        metrics = score.metrics()
        what = "perplexity" if "val/perplexity" in metrics else "accuracy"
        own[f"{name}_{what}"] = metrics[f"val/{what}"]
    if found.tokens:
        own["tokens_per_s"] = engine.tokens_seen / seconds
    if others:
        scores = {name: evaluate(engine, loader) for name, loader in others.items()}
        own["also_perplexity"] = {n: s.metrics()["val/perplexity"] for n, s in scores.items()}
    return {
        **own,
        "samples_per_s": engine.samples_seen / seconds,
        "seconds": seconds,
        "steps": 0 if untrained else steps,
        "exit_accuracies": {
            str(layer): right / tested.total for layer, right in sorted(tested.exits.items())
        },
        "validation_samples": held_out,
    }


def _other_text(recipe: Recipe, path: Path, mesh: Mesh) -> BatchLoader:
    """Batches of a text that no method learns from, cut into pieces as long as the recipe's."""
    raw = recipe.to_mapping()
    kept = ("max_length", "max_eval_samples", "packing", "pad_token")
    options = {key: value for key, value in raw["data"].items() if key in kept}
    text = str(path)
    raw["data"] = {**options, "name": "text", "train": text, "eval": text, "document": "file"}
    other = recipe_from_mapping(raw, where=f"bench quality --also {path}")
    loader = make_eval_loader(other, load_data(other, mesh), mesh)
    assert loader is not None
    return loader


def _split(data: Data, validation: float) -> tuple[Data, int]:
    """The training data without the held-out ones, which are evaluated; and how many those are."""
    assert isinstance(data.train, Sized) and not isinstance(data.train, range | Stream)
    order = torch.randperm(
        len(data.train), generator=torch.Generator().manual_seed(_SPLIT_SEED)
    ).tolist()
    count = max(1, round(len(order) * validation))
    if count >= len(order):
        raise DataError(f"{len(order)} training samples leave none beside {count} for validation.")
    held_out, kept = sorted(order[:count]), sorted(order[count:])
    facts = dataclasses.replace(data.facts, num_train=len(kept), num_eval=count)
    train: Any = Subset(data.train, kept)
    evaluated: Any = Subset(data.train, held_out)
    return Data(facts, data.tokenizer, train, evaluated), count
