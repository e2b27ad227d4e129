"""The model's config after data and tokenizer have been put in."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import BertForSequenceClassification

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.config import load_config
from tests.support.tiny import bert_config


def saved(folder: Path, **options: object) -> str:
    bert_config(**options).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_the_loss_is_that_of_one_class_a_sample_whatever_the_checkpoint_was_trained_for(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A regression checkpoint trained on MSE in silence; a multi-label one died at step 1."""
    path = saved(tmp_path, problem_type=kind, num_labels=1)
    with caplog.at_level(logging.INFO, "scpl_ds"):
        config = load_config(path, num_labels=3)
    assert (config.problem_type, config.num_labels) == ("single_label_classification", 3)
    (record,) = caplog.records
    assert kind in record.getMessage()


@pytest.mark.parametrize("kind", [None, "single_label_classification"])
def test_an_ordinary_checkpoint_is_taken_without_a_word(
    kind: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = saved(tmp_path, problem_type=kind)
    with caplog.at_level(logging.INFO, "scpl_ds"):
        config = load_config(path, num_labels=2, label_names=["neg", "pos"])
    assert config.problem_type == "single_label_classification"
    assert config.id2label == {0: "neg", 1: "pos"}
    assert not caplog.records


def test_without_classes_the_config_stays_as_it_is(tmp_path: Path):
    assert load_config(saved(tmp_path, problem_type="regression")).problem_type == "regression"


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_a_model_object_with_another_loss_is_refused(kind: str):
    """``initialize`` used to train it on that loss, or to end in a traceback at step 1."""
    model = BertForSequenceClassification(bert_config(problem_type=kind, num_labels=2))
    with pytest.raises(PartitionError, match=f"problem_type is '{kind}'.*single_label_classificat"):
        analyze(model)
