"""Text from a trained language model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scpl_ds.data.text import load_tokenizer
from scpl_ds.errors import DataError, RecipeError
from scpl_ds.export import export_checkpoint, load_exported
from scpl_ds.recipe import Recipe


def generate(
    recipe: Recipe,
    folder: Path,
    prompts: Sequence[str],
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """What a checkpoint of a run goes on with after each prompt, by transformers' ``generate``.

    The stages are put together on this process alone, which needs the memory of the whole model.

    Args:
        recipe: The run's.
        folder: The checkpoint.
        prompts: Texts, continued as one padded batch.
        chat: Write each as a user's message in the tokenizer's chat template.
        max_new_tokens: Longest continuation, in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: Of what is drawn.

    Raises:
        RecipeError: The run's task is not causal-lm.
        DataError: A prompt is empty, or there is no chat template.
    """
    if recipe.model.task != "causal-lm":
        raise RecipeError(
            f"generate: this run's model.task is '{recipe.model.task}', which gives classes, not "
            "text. Use a run of causal-lm."
        )
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt]:
        raise DataError(f"generate: prompt {empty[0]} of {len(prompts)} is empty.")
    with tempfile.TemporaryDirectory(prefix="scpl-generate-") as room:
        exported = export_checkpoint(folder, Path(room) / "export", task="causal-lm")
        tokenizer = load_tokenizer(str(exported))
        model = load_exported(exported, "causal-lm")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise DataError("generate --chat: the run's tokenizer has no chat template.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.padding_side = "left"  # what is generated stands right behind the prompt
    texts = [_as_message(tokenizer, prompt) for prompt in prompts] if chat else list(prompts)
    batch: Any = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not chat)
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        found = model.to(device).generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling or {"do_sample": False}),
        )
    return tokenizer.batch_decode(
        found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def _as_message(tokenizer: Any, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
