"""Inputs that cannot be trained, and what the message about each must say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import tiny
from tests.support.tiny import DROP, sentences, write_csv

Recipe = dict[str, Any]
LAYERS = 6
"""Of the good model."""


class Case(NamedTuple):
    """One bad input: what is changed, and what the message must say."""

    name: str
    words: tuple[str, ...]
    changes: dict[str, Any] = {}  # noqa: RUF012 - never written to
    prepare: Callable[[Path, Recipe], dict[str, Any]] | None = None
    """Makes files in the test's folder; returns more changes."""
    overrides: tuple[str, ...] = ()


# -- what the cases make -------------------------------------------------------------------


def rows(*lines: tuple[Any, Any], header: str = "text,label") -> Callable[..., dict[str, Any]]:
    """Other training data."""

    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        path = write_csv(folder / "mine.csv", list(lines), header)
        return {"data.train_file": str(path), "data.eval_file": DROP}

    return prepare


def model(change: Callable[[Path], None]) -> Callable[..., dict[str, Any]]:
    """Another model folder."""

    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        copy = folder / "model"
        shutil.copytree(recipe["model"]["name_or_path"], copy)
        change(copy)
        return {"model.name_or_path": str(copy)}

    return prepare


def config(**values: Any) -> Callable[..., dict[str, Any]]:
    """Another config.json in the model folder; None takes a key out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        given = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))

    return model(change)


def without(*names: str) -> Callable[..., dict[str, Any]]:
    return model(lambda folder: [(folder / name).unlink() for name in names] and None)


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_pad_token(folder: Path) -> None:
    tiny.tokenizer(pad_token=None).save_pretrained(folder)


def foreign_tokenizer(folder: Path, recipe: Recipe) -> dict[str, Any]:
    more = tiny.tokenizer()
    more.add_tokens(["zebra"])
    more.save_pretrained(folder / "tokenizer")
    data = write_csv(folder / "mine.csv", [*sentences(20, seed=1), ("zebra good", 1)])
    return {
        "model.tokenizer_name_or_path": str(folder / "tokenizer"),
        "data.train_file": str(data),
    }


def a_file(key: str) -> Callable[..., dict[str, Any]]:
    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        (folder / "taken").write_text("mine")
        return {key: str(folder / "taken")}

    return prepare


def my_folder(key: str) -> Callable[..., dict[str, Any]]:
    """A folder that holds something of the user's."""

    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        (folder / "home").mkdir()
        (folder / "home" / "thesis.tex").write_text("mine")
        (folder / "home" / "recipe.yaml").write_text("mine")
        return {key: str(folder / "home")}

    return prepare


def empty_file(folder: Path, recipe: Recipe) -> dict[str, Any]:
    (folder / "empty.csv").touch()
    return {"data.train_file": str(folder / "empty.csv")}


EIGHT = sentences(8, seed=3)
FLOATS = [(text, label + 0.5) for text, label in EIGHT]

CASES = [
    # the recipe
    Case("unknown-key", ("scpl.stage: unknown key; did you mean 'stages'",), {"scpl.stage": 2}),
    Case("unknown-section", ("trian: unknown key; did you mean 'train'",), {"trian": {}}),
    Case(
        "unknown-deepspeed-key",
        ("deepspeed.optimizer.params.learning_rate: unknown key; did you mean 'lr'",),
        {"deepspeed.optimizer.params.learning_rate": 1e-3},
    ),
    Case("bad-type", ("scpl.stages", "two"), {"scpl.stages": "two"}),
    Case(
        "bad-type-for-deepspeed",
        ("deepspeed.gradient_clipping: must be a number", "off"),
        {"deepspeed.gradient_clipping": "off"},
    ),
    Case(
        "bad-option",
        ("scpl.objective.temperature: must be greater than 0, got -1",),
        {"scpl.objective.temperature": -1},
    ),
    Case("missing-section", ("deepspeed: is required",), {"deepspeed": DROP}),
    Case(
        "train-and-deepspeed-disagree",
        ("train.learning_rate: is 0.1, but deepspeed.optimizer.params.lr is 0.003",),
        {"train.learning_rate": 0.1},
    ),
    Case("unknown-tracker", ("tensorbord", "Known: console"), {"trackers": ["tensorbord"]}),
    Case(
        "unknown-partition-method",
        ("scpl.partition: unknown method 'flop'; did you mean 'flops'",),
        {"scpl.partition": "flop"},
    ),
    Case(
        "zero-3-without-a-backend",
        ("deepspeed.zero_optimization.stage: scpl.sharding 'none' keeps everything on every rank",),
        {"scpl.sharding": "none", "deepspeed.zero_optimization": {"stage": 3}},
    ),
    Case(
        "bf16-without-zero",
        ("deepspeed.bf16: DeepSpeed 0.19.8 without ZeRO accumulates gradients in bf16",),
        {"scpl.sharding": "deepspeed", "deepspeed.bf16": {"enabled": True}},
    ),
    Case(
        "fp16-without-zero",
        ("deepspeed.fp16: DeepSpeed 0.19.8 without ZeRO never scales the loss",),
        {"scpl.sharding": "deepspeed", "deepspeed.fp16": {"enabled": True}},
    ),
    Case(
        "a-key-that-would-do-nothing",
        ("deepspeed.dataloader_drop_last: False is not supported",),
        {"deepspeed.dataloader_drop_last": False},
    ),
    Case(
        "an-encoder-as-language-model",
        ("model.task: causal-lm", "in both directions"),
        {"model.task": "causal-lm"},
    ),
    Case(
        "unknown-override",
        ("train.max_step: unknown key; did you mean 'max_steps'",),
        overrides=("train.max_step=3",),
    ),
    Case("override-is-not-yaml", ("scpl.stages", "not valid YAML"), overrides=("scpl.stages=[2",)),
    Case(
        "batch-sizes-do-not-fit",
        ("deepspeed.train_batch_size: 30 is not", "8", "= 24", "Drop train_batch_size"),
        {"deepspeed.train_batch_size": 30, "deepspeed.gradient_accumulation_steps": 3},
    ),
    Case("output-dir-is-a-file", ("train.output_dir", "is a file"), {}, a_file("train.output_dir")),
    Case(
        "output-dir-holds-a-recipe-of-mine",
        ("train.output_dir", "recipe.yaml that is not of a run"),
        {},
        my_folder("train.output_dir"),
    ),
    Case(
        "export-dir-holds-something-else",
        ("train.export_dir", "thesis.tex", "name another folder"),
        {},
        my_folder("train.export_dir"),
    ),
    # stages and ranks
    Case("more-stages-than-layers", ("6 layers", "7"), {"scpl.stages": 7}),
    Case(
        "more-ranks-than-stages",
        ("scpl.pipeline_ranks: 3 is more than stages: 2",),
        {"scpl.pipeline_ranks": 3},
    ),
    Case(
        "world-size-does-not-fit",
        ("scpl.pipeline_ranks: 2 pipeline ranks", "need 2 ranks, but WORLD_SIZE is 1"),
        {"scpl.pipeline_ranks": 2},
    ),
    Case(
        "cut-with-a-gap",
        ("scpl.partition", "[3, 6] must start at layer 2"),
        {"scpl.partition": [[0, 2], [3, 6]]},
    ),
    Case(
        "cut-does-not-cover-the-model",
        ("scpl.partition ends at layer 5, but the model has 6 layers",),
        {"scpl.partition": [[0, 2], [2, 5]]},
    ),
    # data
    Case(
        "missing-data-file",
        ("nowhere.csv does not exist", "data.train_file"),
        {"data.train_file": "nowhere.csv"},
    ),
    Case("empty-file", ("empty.csv is empty (0 bytes)",), {}, empty_file),
    Case("no-rows", ("mine.csv: no rows",), {}, rows()),
    Case("one-class", ("All 2 training samples have label 0",), {}, rows(("a", 0), ("b", 0))),
    Case(
        "label-out-of-range",
        ("mine.csv, line 10: label 2", "model.num_labels is 2", "labels run from 0 to 1"),
        {"model.num_labels": 2},
        rows(*EIGHT, ("word1", 2)),
    ),
    Case("class-that-never-occurs", ("class 1 never occurs",), {}, rows(("a", 0), ("b", 2))),
    Case("regression", ("label 0.5 is not a whole number", "regression"), {}, rows(*FLOATS)),
    Case("empty-text", ("mine.csv, line 10: column 'text' is empty",), {}, rows(*EIGHT, (" ", 0))),
    Case(
        "no-text-column",
        ("data.text_column: 'text' is not a column", ". Columns found: review, label"),
        {},
        rows(*EIGHT, header="review,label"),
    ),
    Case(
        "no-label-column",
        ("data.label_column: 'label' is not a column; did you mean 'labels'", "labels"),
        {},
        rows(*EIGHT, header="text,labels"),
    ),
    Case(
        "fewer-samples-than-a-batch",
        ("8 training samples are fewer than one global batch: 16",),
        {"deepspeed.train_micro_batch_size_per_gpu": 16},
        rows(*EIGHT),
    ),
    Case(
        "longer-than-the-model",
        ("data.max_length: 64", "at most 32 positions", "Set data.max_length to 32"),
        {"data.max_length": 64},
    ),
    # model and tokenizer
    Case("no-config", ("model.name_or_path", "config.json"), {}, without("config.json")),
    Case("no-weights", ("no checkpoint for layers",), {}, without("model.safetensors")),
    Case("broken-weights", ("cannot be read as 'bert'",), {}, model(truncated_weights)),
    Case(
        "no-tokenizer",
        ("No tokenizer for", "tokenizer.json"),
        {},
        without("tokenizer.json", "tokenizer_config.json"),
    ),
    Case("no-pad-token", ("no pad token", "data.pad_token: eos"), {}, model(no_pad_token)),
    Case(
        "tokenizer-of-another-model",
        ("token id 44", "vocabulary has 44 tokens", "another model"),
        {},
        foreign_tokenizer,
    ),
    Case("weights-of-another-size", ("is [16", "not [32"), {}, config(hidden_size=32)),
    Case("encoder-decoder", ("encoder-decoder",), {}, config(model_type="t5", d_model=16)),
    Case("shared-layers", ("albert",), {}, config(model_type="albert", embedding_size=16)),
    Case(
        "remote-code",
        ("gives no model config",),
        {},
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
    ),
    Case(
        "quantised",
        ("quantised", "original checkpoint"),
        {},
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ),
    # going on
    Case(
        "nothing-to-resume",
        ("There is no checkpoint", "run"),
        {"train.resume_from_checkpoint": True},
    ),
]
