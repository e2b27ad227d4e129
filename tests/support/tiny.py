"""A run small enough for a test: a tiny BERT with its tokenizer, two classes of made-up
sentences."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, BertConfig, PretrainedConfig, PreTrainedTokenizerFast

from scpl_ds.cli import main
from scpl_ds.partition._hf import quiet_transformers
from scpl_ds.trackers._base import Tracker

GOOD = ("good", "fine", "great", "lovely", "kind")
BAD = ("bad", "poor", "awful", "nasty", "cold")
PLAIN = tuple(f"word{n}" for n in range(30))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, *GOOD, *BAD, *PLAIN)
POSITIONS = 32


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """One token a word; ``[CLS] ... [SEP]`` around a text."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))  # pyright: ignore
    given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", **options}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=POSITIONS,
        model_input_names=names,
        **{name: token for name, token in given.items() if token is not None},
    )


def bert_config(**options: Any) -> BertConfig:
    """Four layers of width 16, with dropout."""
    given: dict[str, Any] = {
        "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
    }  # fmt: skip
    return BertConfig(**{**given, **options})


def save_model(folder: Path, config: PretrainedConfig | None = None) -> Path:
    """A checkpoint without a classifier on top, as a pretrained encoder is, and its tokenizer."""
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        AutoModel.from_config(config or bert_config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def sentences(count: int, *, seed: int) -> list[tuple[str, int]]:
    """Texts of 3 to 12 words, one or two of which tell the class; labels 0, 1, 0, 1 ..."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = draw.choices(PLAIN, k=draw.randint(2, 10))
        for word in draw.choices((BAD, GOOD)[label], k=draw.randint(1, 2)):
            words.insert(draw.randint(0, len(words)), word)
        rows.append((" ".join(words), label))
    return rows


def write_csv(path: Path, rows: list[tuple[Any, Any]], header: str = "text,label") -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


def make(folder: Path, **options: Any) -> dict[str, Any]:
    """Model, data and a recipe over them, two stages in plain torch, 8 steps an epoch.

    Args:
        folder: Gets ``model/``, ``train.csv`` and ``dev.csv``; the run goes to ``run/``.
        **options: Of the model's config.
    """
    save_model(folder / "model", bert_config(**options))
    write_csv(folder / "train.csv", sentences(64, seed=1))
    write_csv(folder / "dev.csv", sentences(21, seed=2))
    return {
        "model": {"name_or_path": str(folder / "model")},
        "scpl": {"stages": 2, "sharding": "none", "objective": {"name": "supcon"}},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 8,
            "optimizer": {"type": "AdamW", "params": {"lr": 3.0e-3, "weight_decay": 0.01}},
        },
        "data": {
            "name": "csv",
            "train_file": str(folder / "train.csv"),
            "eval_file": str(folder / "dev.csv"),
            "max_length": 16,
        },
        "train": {
            "output_dir": str(folder / "run"),
            "num_train_epochs": 1,
            "logging_steps": 4,
            "disable_tqdm": True,
        },
        "trackers": [],
    }


def put(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set; the value ``DROP`` removes one."""
    result = copy.deepcopy(recipe)
    for path, value in changes.items():
        *parents, last = path.split(".")
        section: Any = result
        for part in parents:
            section = section.setdefault(part, {})
        if value is DROP:
            section.pop(last, None)
        else:
            section[last] = value
    return result


DROP = object()


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    """JSON is YAML."""
    path.write_text(json.dumps(recipe, indent=1))
    return path


def recipe_for(base: dict[str, Any], sharding: str, run: Path, **changes: Any) -> dict[str, Any]:
    """``base`` under a backend (``deepspeed``: ZeRO-1) into a run folder."""
    zero = {"stage": 1 if sharding == "deepspeed" else 0}
    common = {"scpl.sharding": sharding, "deepspeed.zero_optimization": zero}
    return put(base, {**common, "train.output_dir": str(run), **changes})


def train(recipe: dict[str, Any], *overrides: str) -> int:
    """``scpl-ds train`` in a world of its own; the recipe lies beside the run folder."""
    run = Path(recipe["train"]["output_dir"])
    run.parent.mkdir(parents=True, exist_ok=True)
    path = write_recipe(run.with_suffix(".yaml"), recipe)
    with own_world():
        return main(["train", str(path), *overrides])


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Everything a checkpoint holds, optimizer state included, by ``<file>/<name>``."""
    files = sorted(checkpoint.glob("*.safetensors"))
    assert files, checkpoint
    return {f"{f.name}/{name}": t for f in files for name, t in load_file(f).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Equal to the bit."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


@contextlib.contextmanager
def own_world() -> Iterator[None]:
    """One thread, and no process group left behind: the next run of this process makes its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


class Bomb(Tracker):
    """Stops the process after step ``Bomb.at`` the way a person does, by an interrupt."""

    at = 0

    def start(self, config: Any, **_: Any) -> None:
        """Nothing to open."""

    def log(self, metrics: Any, step: int) -> None:
        """Nothing to write."""

    def tick(self, step: int) -> None:
        if step == type(self).at:
            raise KeyboardInterrupt
