"""The main job on 2 x 2 ranks: two stages, each on two data-parallel ranks under ZeRO-1."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scpl_ds.evaluation import evaluate_run
from scpl_ds.recipe import recipe_from_mapping
from scpl_ds.run_folder import open_run
from scpl_ds.trainer import fit
from tests.support.distributed import run_ranks
from tests.support.tiny import recipe_for

pytestmark = pytest.mark.forks

STAGES, DATA_PARALLEL, ROWS = 2, 2, 21
RANKS = STAGES * DATA_PARALLEL
SHOWN = 5  # of the rows, with what the model says of them
STEPS = 4  # 64 rows in global batches of 8 x 2


@pytest.fixture(scope="module")
def run(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; each rank left what ``fit`` returned there as ``rank<n>.json``."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    more = {"trackers": [{"name": "jsonl"}], "train.sample_predictions": SHOWN}
    recipe = recipe_from_mapping(recipe_for(base, "deepspeed", folder, **more))

    def body() -> None:
        result = fit(recipe)
        (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))

    run_ranks(RANKS, body)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, base: dict[str, Any]) -> dict[str, Tensor]:
    """Logits [21, 2] and labels [21] of the export, row by row, as anybody would score it."""
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    with open(base["data"]["eval_file"]) as file:
        rows = list(csv.DictReader(file))
    limits = {"truncation": True, "max_length": base["data"]["max_length"]}
    with torch.inference_mode():
        logits = [
            model(**tokenizer(row["text"], return_tensors="pt", **limits)).logits for row in rows
        ]
    return {
        "logits": torch.cat(logits),
        "labels": torch.tensor([int(row["label"]) for row in rows]),
    }


def test_every_rank_gets_the_result_that_is_written(run: Path):
    written = json.loads((run / "result.json").read_text())
    told = [json.loads((run / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    assert told == [written] * RANKS
    assert (written["stages"], written["ranks"], written["steps"]) == (STAGES, RANKS, STEPS)


def test_the_accuracy_is_that_of_the_export_in_one_process(run: Path, exported: dict[str, Tensor]):
    right = int((exported["logits"].argmax(-1) == exported["labels"]).sum())
    result = json.loads((run / "result.json").read_text())
    assert result["eval_accuracy"] == right / ROWS
    assert result["stage_eval_accuracy"] == right / ROWS


def test_the_predictions_that_are_shown_are_those_of_the_export(
    run: Path, base: dict[str, Any], exported: dict[str, Tensor]
):
    """Rows and answers come from different ranks: a shift by one would show here."""
    lines = [json.loads(line) for line in (run / "tables.jsonl").read_text().splitlines()]
    shown = [line for line in lines if line["name"] == "predictions" and line["step"] == STEPS]
    assert len(shown) == SHOWN
    with open(base["data"]["eval_file"]) as file:
        texts = [" ".join(row["text"].split()[:14]) for row in csv.DictReader(file)]
    for line in shown:
        row = texts.index(line["text"].removeprefix("[CLS] ").removesuffix(" [SEP]"))
        best = exported["logits"][row].softmax(-1).max(-1)
        assert line["label"] == str(int(exported["labels"][row]))
        assert line["prediction"] == str(int(best.indices))
        assert line["probability"] == pytest.approx(float(best.values), abs=1e-5)


def test_evaluation_over_the_ranks_counts_every_row_once(run: Path, exported: dict[str, Tensor]):
    """A row left out or counted twice would move the mean loss."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (scored,) = [row for row in rows if "val/loss" in row]
    wanted = float(F.cross_entropy(exported["logits"], exported["labels"]))
    assert scored["step"] == STEPS
    assert scored["val/loss"] == pytest.approx(wanted, rel=1e-5)  # padded otherwise: not bitwise


def test_metrics_jsonl_has_each_stages_loss_at_every_step(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "lr" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    wanted = {"stage0/loss", "stage1/loss", "head/loss", "stage0/grad_norm", "stage1/grad_norm"}
    assert all(wanted <= row.keys() for row in steps)


def test_eval_writes_the_logits_of_every_row_in_the_order_of_the_data(
    run: Path, exported: dict[str, Tensor], tmp_path: Path
):
    """Each data-parallel rank scores a shard; rank 0 puts them together."""
    file = tmp_path / "logits.safetensors"

    def body() -> None:
        _, recipe = open_run(run)
        scores = evaluate_run(recipe, run / f"checkpoint-{STEPS}", logits_file=file)
        assert scores["samples"] == ROWS

    run_ranks(RANKS, body)
    found = load_file(file)
    assert found["logits"].shape == (ROWS, 2)
    assert torch.equal(found["labels"], exported["labels"])
    # Rows are padded to their micro-batch here: equal but for the order of additions.
    torch.testing.assert_close(found["logits"], exported["logits"], rtol=1e-5, atol=1e-6)
