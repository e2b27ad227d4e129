"""Packed documents must not see each other: who keeps them apart, and who is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, Lfm2Config, LlamaConfig, OPTConfig, OPTForCausalLM

from scpl_ds.data.prepared import read
from scpl_ds.errors import DataError
from scpl_ds.partition.packing import keeps_documents_apart
from scpl_ds.recipe import Recipe, recipe_from_mapping
from tests.support import tiny_lm


@pytest.mark.parametrize("attention", [None, "eager", "flash_attention_2"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_neox", "qwen3_moe", "gemma2"])
def test_architectures_that_mask_by_position_keep_documents_apart(
    name: str, attention: str | None
) -> None:
    """At the sizes of the released models: none of them is built."""
    found = keeps_documents_apart(CONFIG_MAPPING[name](), attn_implementation=attention)
    assert found.apart, found.why


@pytest.mark.parametrize("name", ["opt", "falcon", "biogpt", "openai-gpt", "xglm", "jamba"])
def test_architectures_that_do_not_are_found_out(name: str) -> None:
    found = keeps_documents_apart(CONFIG_MAPPING[name]())
    assert not found.apart and "changed the logits of the second" in found.why


def test_one_kind_of_layer_that_mixes_documents_is_enough() -> None:
    def found(kinds: list[str]) -> bool:
        config = Lfm2Config(layer_types=kinds, num_hidden_layers=len(kinds))
        return keeps_documents_apart(config).apart

    attention = ["full_attention"] * 12
    assert found(attention) and not found([*attention[1:], "conv"])


def test_the_model_asked_about_may_be_tiny_itself() -> None:
    config = LlamaConfig(
        vocab_size=30, hidden_size=12, num_attention_heads=1, num_hidden_layers=1,
        intermediate_size=8, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    before = config.to_dict()
    assert keeps_documents_apart(config).apart and config.to_dict() == before


def test_a_model_that_cannot_be_tried_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scpl_ds.partition.packing._MOST_PARAMETERS", 0)
    found = keeps_documents_apart(LlamaConfig())
    assert not found.apart and "could not be tried" in found.why


def recipe(folder: Path, *, attention: str | None = None, **deepspeed: int) -> Recipe:
    if not (folder / "config.json").exists():
        tiny_lm.save(folder)
    (folder / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    return recipe_from_mapping(
        {
            "model": {
                "name_or_path": str(folder), "task": "causal-lm", "attn_implementation": attention
            },
            "scpl": {"stages": 2},
            "deepspeed": {"train_micro_batch_size_per_gpu": 1, **deepspeed},
            "data": {
                "name": "text", "train": str(folder / "a.txt"), "document": "paragraph",
                "packing": True, "max_length": 16,
            },
        }
    )  # fmt: skip


def test_a_run_that_packs_for_opt_is_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=257, hidden_size=32, num_hidden_layers=2, ffn_dim=48, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    tiny_lm.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"see each other in .*model type opt.*packing: false"):
        read(recipe(tmp_path), None)


def test_packing_with_flash_attention_is_for_micro_batches_of_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scpl_ds.partition.anatomy._check_attention", lambda *_: None)  # no GPU
    flash = "flash_attention_2"
    assert len(read(recipe(tmp_path, attention=flash), None).train) > 0  # pyright: ignore[reportArgumentType]
    many = recipe(tmp_path, attention=flash, train_micro_batch_size_per_gpu=4)
    with pytest.raises(DataError, match=r"one row only, but .*_per_gpu is 4 and .*_size is 4"):
        read(many, None)
