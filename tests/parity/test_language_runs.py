"""Runs of language models: streamed data resume to the bit, samples are what the export says."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import scpl_ds
from scpl_ds.data.language import IGNORED, LanguageCollator, targets_of
from scpl_ds.errors import RecipeError
from tests.support import runs, tiny_lm
from tests.support.distributed import run_ranks

pytestmark = pytest.mark.forks
PROMPTS = ["the cat", "a dog ran to the red", "x"]
NEW = 12


def recipe(folder: Path, run: str, *, data: dict[str, Any] | None = None, **train: Any) -> Any:
    from scpl_ds.recipe import recipe_from_mapping

    if not (folder / "model").exists():
        tiny_lm.save(folder / "model")
        words = ["the cat sat on the mat", "a dog ran to the red house", "who knows"]
        lines = [{"text": f"{words[n % 3]} {n}"} for n in range(90)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "a.jsonl").write_text(text)
        (folder / "b.jsonl").write_text(text[:600].rpartition("\n")[0] + "\n")
    return recipe_from_mapping(
        {
            "model": {"name_or_path": str(folder / "model"), "task": "causal-lm"},
            "scpl": {
                "stages": 2, "sharding": "none",
                "objective": {"name": "logit_lens", "calibration": 64},
            },
            "deepspeed": {
                "train_micro_batch_size_per_gpu": 4,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
            },
            "data": {
                "name": "jsonl", "train": str(folder / "a.jsonl"), "eval": str(folder / "b.jsonl"),
                "max_length": 48, **(data or {}),
            },
            "train": {"max_steps": 20, "output_dir": str(folder / run), "disable_tqdm": True,
                      "lr_scheduler_type": "constant", **train},
        }
    )  # fmt: skip


def fitted(make: Callable[[], Any]) -> None:
    from scpl_ds.trainer import fit

    fit(make())


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks, pipeline", [(2, 2), (2, 1)], ids=["2 stages", "2 lanes"])
def test_a_streamed_run_goes_on_where_it_was_stopped_to_the_bit(
    tmp_path: Path, ranks: int, pipeline: int, packing: bool
) -> None:
    data = {"streaming": True, "shuffle_buffer": 16, "packing": packing}

    def asked(run: str, **train: Any) -> Any:
        found = recipe(tmp_path, run, data=data, save_steps=6, **train)
        scpl = found.scpl.model_copy(
            update={"pipeline_ranks": pipeline, "sharding": "none" if pipeline == 2 else "ddp"}
        )
        return found.model_copy(update={"scpl": scpl})

    asked("whole")  # the files are written once
    run_ranks(ranks, lambda: fitted(lambda: asked("whole", max_steps=14)), limit_s=120)
    stopped = tmp_path / "whole" / "checkpoint-6"
    run_ranks(
        ranks,
        lambda: fitted(lambda: asked("again", max_steps=14, resume_from_checkpoint=str(stopped))),
        limit_s=120,
    )
    wanted, found = (
        load_file(next((tmp_path / run / "export").glob("model*.safetensors")))
        for run in ("whole", "again")
    )
    runs.assert_equal(found, wanted)


def test_samples_over_two_ranks_are_what_the_export_generates(tmp_path: Path) -> None:
    options = {"sample_prompts": PROMPTS, "sample_max_new_tokens": NEW, "eval_steps": 10}
    recipe(tmp_path, "run")
    stop = tiny_lm.tokenizer().encode("o")
    config = next((tmp_path).rglob("generation_config.json"))
    config.write_text(json.dumps({"eos_token_id": [0, *stop], "pad_token_id": 0}))
    run_ranks(2, lambda: fitted(lambda: recipe(tmp_path, "run", **options)), limit_s=120)
    lines = (tmp_path / "run" / "tables.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["name"] == "samples"]
    assert [row["step"] for row in rows] == [10] * 3 + [20] * 3
    last = {row["prompt"]: row["text"] for row in rows[3:]}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").eval()
    assert model.generation_config.eos_token_id == [0, *stop]
    tokenizer = tiny_lm.tokenizer()
    for prompt in PROMPTS:
        batch: Any = tokenizer(prompt, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
        text = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        assert last[prompt] == text
    assert any(last.values())


def test_samples_end_where_the_model_ends_a_text(tmp_path: Path) -> None:
    """A model whose head always says token 0, the end: nothing is left of a continuation."""

    def body() -> None:
        from scpl_ds.generation import Samples

        model = tiny_lm.model(tied=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        config = runs.config(2, objective={"name": "logit_lens", "calibration": 64})
        engine = scpl_ds.initialize(model=model, config=config, seed=1).engine
        calls = []
        evaluate = engine.evaluate
        engine.evaluate = lambda *a: calls.append(1) or evaluate(*a)  # pyright: ignore
        rows = Samples(tiny_lm.tokenizer(), ["ab", "c"], 9, model.config).take(engine)
        assert rows == [{"prompt": "ab", "text": ""}, {"prompt": "c", "text": ""}]
        assert len(calls) == 1

    run_ranks(1, body)


@pytest.mark.parametrize(
    "section, message",
    [
        ({"train": {"sample_prompts": ["x"]}}, r"train\.sample_prompts: .*gives classes"),
        ({"data": {"name": "demo", "streaming": True}}, r"data\.streaming: is for .*causal-lm"),
    ],
)
def test_what_is_for_language_models_is_refused_for_classifiers(
    section: dict[str, Any], message: str
) -> None:
    from scpl_ds.recipe import recipe_from_mapping

    base: dict[str, Any] = {
        "model": {"name_or_path": "demo"}, "scpl": {"stages": 2}, "data": {"name": "demo"},
        "deepspeed": {"train_micro_batch_size_per_gpu": 4},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=message):
        recipe_from_mapping({**base, **section})


def test_samples_without_an_evaluation_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sample_prompts: are written at evaluations"):
        recipe(tmp_path, "run", sample_prompts=["x"], eval_strategy="no")


def test_a_stream_without_max_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.max_steps: is needed with data\.streaming"):
        recipe(tmp_path, "run", data={"streaming": True}, max_steps=-1)


def gpt2() -> GPT2LMHeadModel:
    """Learned positions, which padding on the left would shift."""
    torch.manual_seed(0)
    shape = GPT2Config(
        vocab_size=257, n_embd=32, n_layer=4, n_head=4, n_positions=64, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(shape)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_lm.model, gpt2], ids=["llama", "gpt2"])
def test_padding_on_either_side_gives_the_same_loss_per_token(
    make: Callable[[], PreTrainedModel], attention: str
) -> None:
    """Over two stages, as a run evaluates. On the left the last of the padding was taught the first
    token of the text, and a model with learned positions got those of the row."""

    def body() -> None:
        model = make()
        model.set_attn_implementation(attention)
        config = runs.config(2, objective={"name": "logit_lens", "calibration": 64})
        engine = scpl_ds.initialize(model=model, config=config, seed=1).engine
        tokenizer = tiny_lm.tokenizer()
        texts = ["the cat", "a", "a dog ran to the red house", "ab"]
        encoded: Any = tokenizer(texts)["input_ids"]
        samples = [{"input_ids": ids, "labels": ids} for ids in encoded]
        losses = []
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = LanguageCollator(tokenizer, pad_to_multiple_of=8)(samples)
            (output,) = engine.evaluate(iter([batch]), 1)
            assert output.logits is not None
            targets = targets_of(batch["labels"])
            learned = targets != IGNORED
            losses.append(
                F.cross_entropy(output.logits[learned], targets[learned], reduction="none")
            )
        assert len(losses[0]) == sum(len(text) - 1 for text in texts)
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)  # summed otherwise

    run_ranks(1, body)


def test_4096_tokens_train_a_step_in_bounded_memory() -> None:
    """Scores of every token for every other would take 4 heads x 4096^2 x 4 bytes = 256 MiB a
    layer."""

    def batches() -> Iterator[dict[str, Tensor]]:
        ids = torch.randint(1, 257, (1, 4096), generator=torch.Generator().manual_seed(0))
        while True:
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def body() -> None:
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            eos_token_id=0, pad_token_id=0, bos_token_id=None,
        )  # fmt: skip
        config = runs.config(2, objective={"name": "logit_lens", "calibration": 64})
        engine = scpl_ds.initialize(model=LlamaForCausalLM(shape), config=config, seed=1).engine
        data = batches()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        loss = engine.train_batch(data)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
        assert torch.isfinite(loss)
        assert grown < 250 * 1024, f"{grown / 1024:.0f} MiB"

    run_ranks(2, body)
