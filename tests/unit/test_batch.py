"""What flows between stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scpl_ds.batch import MicroBatch, Tag, as_inputs
from scpl_ds.errors import DataError


def test_a_dict_of_tensors_is_taken_as_it_is():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.zeros(2)}
    inputs = as_inputs(batch)
    assert inputs == batch and inputs is not batch


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_pair_is_deepspeeds_inputs_and_labels(kind: type):
    data, labels = torch.rand(2, 3), torch.tensor([0, 1])
    inputs = as_inputs(kind([data, labels]))
    assert inputs["inputs"] is data and inputs["labels"] is labels


def test_the_inputs_of_a_pair_may_be_a_dict():
    ids, labels = torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1])
    assert set(as_inputs(({"input_ids": ids}, labels))) == {"input_ids", "labels"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.ones(2), "a dict of tensors or an .inputs, labels. pair, got Tensor"),
        ((torch.ones(2),), "pair, got tuple"),
        ({"text": ["a", "b"]}, "'text' of a batch is a list, not a tensor"),
        ((torch.ones(2), [0, 1]), "'labels' of a batch is a list"),
    ],
)
def test_anything_else_is_refused_by_what_it_is(item: Any, message: str):
    with pytest.raises(DataError, match=message):
        as_inputs(item)


def test_what_the_next_stage_gets_carries_no_gradient_and_the_same_inputs():
    hidden = torch.ones(2, 3, requires_grad=True) * 2
    batch = MicroBatch({"labels": torch.tensor([0, 1])}, Tag(3, 1, 7))
    following = batch.with_hidden_states(hidden)
    assert following.hidden_states is not None and not following.hidden_states.requires_grad
    assert following.tag == batch.tag and following.labels is batch.labels
    assert batch.hidden_states is None


def test_moving_a_micro_batch_moves_all_its_tensors():
    batch = MicroBatch(
        {"labels": torch.ones(2)}, Tag(0, 0, 0), torch.ones(2, 3), {"ids": torch.ones(2)}
    ).to(torch.device("meta"))
    assert batch.hidden_states is not None and batch.labels is not None
    devices = {batch.labels.device, batch.hidden_states.device, batch.extras["ids"].device}
    assert devices == {torch.device("meta")}
