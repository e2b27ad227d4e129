"""A small script for ``scpl_ds.Trainer``: the tiny model, made-up sentences, two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

import scpl_ds
from tests.support import tiny

SCPL = {"stages": 2, "objective": {"name": "supcon"}, "timeout_s": 25}


def save_whole(folder: Path) -> Path:
    """The tiny model with its classifier, so that nothing is drawn when it is read."""
    tiny.save_model(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        model.save_pretrained(folder)
    return folder


def model_in(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def data(count: int, *, seed: int) -> Dataset:
    """Token ids and labels, and a column that no model takes."""
    tokenizer, rows = tiny.tokenizer(), tiny.sentences(count, seed=seed)
    samples = [
        {**tokenizer(text, truncation=True, max_length=16), "label": label, "text": text}
        for text, label in rows
    ]
    return Dataset.from_list(samples)


def arguments(run: Path, **changes: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(run),
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 3e-3,
        "weight_decay": 0.01,
        "num_train_epochs": 1,
        "logging_steps": 4,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(**{**given, **changes})


def trainer(folder: Path, run: Path, **changes: Any) -> scpl_ds.Trainer:
    """64 training and 21 evaluation samples. ``changes``: ``scpl``, what ``Trainer`` takes by its
    name, and fields of ``TrainingArguments``."""
    own = ("model", "compute_metrics", "callbacks", "eval_dataset", "train_dataset")
    scpl = {**SCPL, **changes.pop("scpl", {})}
    given = {name: changes.pop(name) for name in own if name in changes}
    given = {
        "model": folder and model_in(folder),
        "train_dataset": data(64, seed=1),
        "eval_dataset": data(21, seed=2),
        **given,
    }
    return scpl_ds.Trainer(
        args=arguments(run, **changes), processing_class=tiny.tokenizer(), scpl=scpl, **given
    )


def accuracy(predicted: Any) -> dict[str, float]:
    assert len(predicted.predictions) == len(predicted.label_ids)
    right = np.argmax(predicted.predictions, axis=-1) == predicted.label_ids
    return {"right": float(right.mean()), "first": float(predicted.label_ids[0])}


class Diary(TrainerCallback):
    """What it was told, and by whom it is asked for something."""

    def __init__(self, **ask: dict[int, str]) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []
        self._ask = ask
        """Event -> step -> what it then sets in ``control``."""

    def _note(self, event: str, state: Any, control: Any) -> Any:
        self.events.append((event, state.global_step))
        word = self._ask.get(event, {}).get(state.global_step)
        if word is not None:
            setattr(control, word, True)
        return control

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("train_begin", state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("train_end", state, control)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("epoch_begin", state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("epoch_end", state, control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("step_begin", state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("step_end", state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("evaluate", state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("save", state, control)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._note("push_begin", state, control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        self.logs.append(dict(logs))
        return self._note("log", state, control)

    def steps(self, event: str) -> list[int]:
        return [step for name, step in self.events if name == event]
