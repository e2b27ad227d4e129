"""A checkpoint in a hundred files, with the output matrix tied to the embeddings."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import anatomy_of
from scpl_ds.partition.loading import load_stage
from tests.support.models import BY_TYPE, build

TASK = "causal-lm"
DEPTH = {"llama": {"num_hidden_layers": 12}, "gpt2": {"n_layer": 12}}


def save_in_many_files(model_type: str, folder: Path) -> PreTrainedModel:
    config = BY_TYPE[model_type].config(tie_word_embeddings=True, **DEPTH[model_type])
    build(config, TASK).save_pretrained(folder, max_shard_size=64)  # bytes: a file a tensor
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("model_type", list(DEPTH))
def test_stages_read_their_tensors_from_a_hundred_files(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_in_many_files(model_type, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 100
    config = whole.config
    assert config.tie_word_embeddings is True
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in index  # the last stage finds it under the embeddings' name
    anatomy = anatomy_of(config, TASK)
    wanted = whole.state_dict()
    owners: dict[str, int] = {}
    with caplog.at_level(logging.WARNING):
        for start, end in itertools.pairwise((0, 1, 7, 12)):
            stage = load_stage(tmp_path, TASK, anatomy, start, end, config=config, seed=0)
            held = stage.hf_state_dict()
            for name, tensor in held.items():
                torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0, msg=name)
                owners[name] = owners.get(name, 0) + 1
            assert stage.model.config.tie_word_embeddings is False
    assert owners.keys() == wanted.keys() and set(owners.values()) == {1}
    assert sum("UNTIED" in record.message for record in caplog.records) == 1


def test_a_file_that_is_missing_is_named_in_one_line(tmp_path: Path) -> None:
    """transformers opens every file of the index, also those without a tensor of this stage."""
    config = save_in_many_files("llama", tmp_path).config
    gone = sorted(tmp_path.glob("*.safetensors"))[-1]
    gone.unlink()
    with pytest.raises(PartitionError) as caught:
        load_stage(tmp_path, TASK, anatomy_of(config, TASK), 0, 1, config=config, seed=0)
    assert gone.name in str(caught.value) and "\n" not in str(caught.value)
