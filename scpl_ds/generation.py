"""Text from a language model: a finished run's as a whole, a running one's in its stages."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from scpl_ds.data.text import load_tokenizer
from scpl_ds.distributed.collectives import broadcast_object, gather_objects
from scpl_ds.engine import Engine
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
    for number, length in enumerate(inputs["attention_mask"].sum(1).tolist(), 1):
        _need_room(
            f"generate: prompt {number}", length, "--max-new-tokens", max_new_tokens, model.config
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        found = model.to(device).generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            **(sampling or {"do_sample": False}),
        )
    start = inputs["input_ids"].shape[1]
    return [continuation(tokenizer, row, start) for row in found.tolist()]


def continuation(tokenizer: Any, ids: Sequence[int], start: int) -> str:
    """The text of the tokens from ``start`` on, with the space before it: SentencePiece writes a
    word's space into the word's token, and decoders leave it out at the start of a text."""
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:start], ids)
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


class Samples:
    """What a model in stages goes on with after fixed prompts, while it is trained.

    The likeliest token every time, as ``generate(do_sample=False)`` takes it. No rank ever holds
    the whole model: the prompts, padded on the right to the longest and the room for what comes,
    go through the stages as one evaluation micro-batch for every token. There is no cache of keys
    and values, so a token costs a forward pass over that width.

    Args:
        tokenizer: None on ranks without one.
        prompts: Texts.
        max_new_tokens: Longest continuation, in tokens.
        config: The model's, for the tokens that end a text and for its positions.
        generation: Its generation config, whose tokens that end a text go before.

    Raises:
        DataError: A prompt gives no token, or leaves too few positions.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompts: Sequence[str],
        max_new_tokens: int,
        config: Any,
        generation: Any = None,
    ) -> None:
        self.tokenizer, self.prompts, self.max_new_tokens = tokenizer, prompts, max_new_tokens
        self._ids: list[list[int]] = []
        self._ends = _ends(generation) or _ends(config.get_text_config())
        if tokenizer is None:
            return
        self._ends |= {tokenizer.eos_token_id} - {None} if not self._ends else set()
        self._ids = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
        for number, ids in enumerate(self._ids):
            who = f"train.sample_prompts[{number}]"
            _need_room(who, len(ids), "train.sample_max_new_tokens", max_new_tokens, config)

    def take(self, engine: Engine) -> list[dict[str, str]]:
        """``prompt`` and ``text`` of every prompt, on rank 0; elsewhere nothing. Every rank calls
        it, between two steps."""
        mesh = engine.mesh
        given, ends = broadcast_object(mesh, (self._ids, self._ends))
        rows = [list(ids) for ids in given]
        starts = [len(row) for row in rows]
        width = max(starts) + self.max_new_tokens
        for _ in range(self.max_new_tokens):
            (output,) = engine.evaluate(_as_batch(rows, width, engine), 1)
            own: list[int] | None = None
            if output.logits is not None:
                last = torch.tensor([len(row) - 1 for row in rows])
                own = output.logits[torch.arange(len(rows)), last].argmax(-1).tolist()
            # Data-parallel ranks have the same weights; one answer keeps them at the same prompts.
            tokens = next(t for t in gather_objects(mesh, own) if t is not None)
            for row, start, token in zip(rows, starts, tokens, strict=True):
                if len(row) == start or row[-1] not in ends:
                    row.append(token)
            if all(len(r) > s and r[-1] in ends for r, s in zip(rows, starts, strict=True)):
                break
        if mesh.rank != 0:
            return []
        return [
            {"prompt": prompt, "text": continuation(self.tokenizer, row, start)}
            for prompt, row, start in zip(self.prompts, rows, starts, strict=True)
        ]


def _need_room(who: str, length: int, key: str, most: int, config: Any) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not length:
        raise DataError(f"{who} gives no token at all.")
    if positions is not None and length + most > positions:
        raise DataError(
            f"{who} has {length} tokens; with {key} {most} that is more than the model's "
            f"{positions} positions. Shorten one of the two."
        )


def _ends(config: Any) -> set[int]:
    """Tokens that end a text."""
    found = getattr(config, "eos_token_id", None)
    if found is None:
        return set()
    return set(found) if isinstance(found, list) else {found}


def _as_batch(
    rows: Sequence[Sequence[int]], width: int, engine: Engine
) -> Iterator[dict[str, torch.Tensor]] | None:
    """The prompts so far as one micro-batch, where data are read. What pads is masked out."""
    if not engine.is_first_stage():
        return None
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return iter([{"input_ids": ids, "attention_mask": mask}])


def _as_message(tokenizer: Any, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
