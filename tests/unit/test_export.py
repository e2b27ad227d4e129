"""From a checkpoint to a Hugging Face folder: ties, and what a failure leaves behind."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from scpl_ds import export_shards
from scpl_ds.checkpoint import Share, Writer
from scpl_ds.errors import CheckpointError
from scpl_ds.export import export_checkpoint, load_exported
from scpl_ds.optim import OptimizerState
from scpl_ds.partition.anatomy import anatomy_of
from scpl_ds.partition.loading import load_stage
from tests.support.models import BY_TYPE, batch, save

TASK = "causal-lm"


def checkpoint_of(
    folder: Path, model_type: str, bounds: tuple[int, ...], *, tie: bool = True
) -> dict[str, Tensor]:
    """Write ``folder/in`` and its stages as ``folder/checkpoint-1``; the head of the last of
    several stages has moved away from the embeddings, as training does it. Returns all tensors."""
    config = BY_TYPE[model_type].config(tie_word_embeddings=tie)
    path = save(config, TASK, folder / "in")
    anatomy = anatomy_of(config, TASK)
    everything: dict[str, Tensor] = {}
    with Writer(folder / "checkpoint-1", is_coordinator=True) as writer:
        for index, (start, end) in enumerate(itertools.pairwise(bounds)):
            stage = load_stage(path, TASK, anatomy, start, end, config=config, seed=0)
            tensors = {n: t.detach().clone() for n, t in stage.hf_state_dict().items()}
            if len(bounds) > 2 and "lm_head.weight" in tensors:
                tensors["lm_head.weight"] += 1.0
            writer.write_stage(Share(index, tensors, OptimizerState(1, {})))
            everything |= tensors
        writer.finish(
            step=1, bounds=bounds, client_state={}, save_latest=True, model_files=model_files(path)
        )
    return everything


def model_files(path: Path) -> Path:
    """Only config.json, as a run keeps it."""
    folder = path.parent / "files"
    AutoConfig.from_pretrained(path).save_pretrained(folder)
    return folder


def embedding_and_head(model: Any) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
def test_the_export_of_several_stages_says_that_it_is_not_tied(model_type: str, tmp_path: Path):
    """Its config.json kept ``tie_word_embeddings: true``; readers that obey it lost the head."""
    wanted = checkpoint_of(tmp_path, model_type, (0, 1, 3))
    out = export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    model = load_exported(out, TASK)
    model.tie_weights()  # obeys the flag
    embedding, head = embedding_and_head(model)
    torch.testing.assert_close(head, wanted["lm_head.weight"], rtol=0, atol=0)
    torch.testing.assert_close(embedding, head - 1.0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_export_of_one_stage_stays_tied(model_type: str, tmp_path: Path):
    checkpoint_of(tmp_path, model_type, (0, 3))
    out = export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is True
    embedding, head = embedding_and_head(load_exported(out, TASK))
    assert embedding is head
    whole, again = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("in", "out"))
    inputs = batch(TASK, "right")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, whole(**inputs).logits)


def test_a_model_that_never_was_tied_stays_so(tmp_path: Path):
    checkpoint_of(tmp_path, "llama", (0, 3), tie=False)
    out = export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is False


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path):
    """It left ``out.partial`` with half a model, in the working directory if ``out`` was there."""
    checkpoint_of(tmp_path, "llama", (0, 1, 3))
    file = tmp_path / "checkpoint-1" / "stage-1.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
    before = names(tmp_path)
    with pytest.raises(CheckpointError, match=r"stage-1\.safetensors is damaged"):
        export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    assert names(tmp_path) == before


def test_a_changed_config_is_refused(tmp_path: Path):
    """Another size, or another activation, would be exported as if it had been trained."""
    checkpoint_of(tmp_path, "llama", (0, 1, 3))
    file = tmp_path / "checkpoint-1" / "model" / "config.json"
    file.write_bytes(file.read_bytes().replace(b"silu", b"selu"))
    with pytest.raises(CheckpointError, match=r"model/config\.json is damaged: its checksum"):
        export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_the_one_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    checkpoint_of(tmp_path, "llama", (0, 1, 3))
    out = export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_shards, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(tmp_path / "checkpoint-1", out, task=TASK)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert names(tmp_path) == ["checkpoint-1", "files", "in", "latest", "out"]


def test_an_export_over_an_earlier_one_leaves_a_neighbour_of_a_like_name_alone(tmp_path: Path):
    """``out.old`` was taken for its own and removed."""
    checkpoint_of(tmp_path, "llama", (0, 3))
    for _ in range(2):
        export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
        (tmp_path / "out.old").mkdir(exist_ok=True)
        (tmp_path / "out.old" / "thesis.tex").write_text("mine")
    export_checkpoint(tmp_path / "checkpoint-1", tmp_path / "out", task=TASK)
    assert (tmp_path / "out.old" / "thesis.tex").read_text() == "mine"
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))
