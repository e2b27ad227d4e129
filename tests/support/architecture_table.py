"""The page of tested architectures, from the list that the parity tests run over.

python -m tests.support.architecture_table > docs/architectures.md
"""

from __future__ import annotations

from scpl_ds.partition.anatomy import anatomy_of
from tests.support.models import ARCHITECTURES

_HEAD = """\
# Architectures

<!-- Written by `python -m tests.support.architecture_table > docs/architectures.md`; do not edit.
-->

`scpl_ds` has no table of architectures: it watches one forward of a model without weights and finds
the layers, what runs before them (prologue, first stage) and after them (epilogue, last stage). So
most encoder-only and decoder-only models of transformers work; `scpl-ds plan RECIPE` tells for
yours, without loading it.

The models below are tested on every change: a tiny random model in fp32, eval mode, is cut into 2
and 3 stages, and logits **and** loss must be equal to the bit to those of the whole Hugging Face
model, with no, left and right padding (`tests/parity/test_stage_chain.py`); and what the stages
export must give the same logits in plain transformers (`tests/parity/test_stage_loading.py`).
[census.md](census.md) has the same comparison for every model type.

| model | `model_type` | sequence-classification | causal-lm | prologue | layers | epilogue |
|---|---|---|---|---|---|---|
"""

_TAIL = """
"-": not tested; transformers has no such class, or the model is not used that way. The last three
columns are what was found for the last tested task; a module that is the same for every layer
(rotary table, dropout) has no parameters and is on every stage.

## What is refused, and why

"""

_REFUSED = [
    (
        "encoder-decoder (T5, BART, Whisper)",
        "two stacks of layers",
        "an encoder-only or decoder-only model",
    ),
    (
        "no stack, several stacks, shared layers (ALBERT, CANINE, XLM, vision + text)",
        "no single place to cut",
        "another model",
    ),
    (
        "layers not called once each, in order",
        "a stage would run twice or never",
        "another model",
    ),
    (
        "trained side inputs to layers (DeBERTa's relative attention, MPNet, Zamba)",
        "their gradient would cross stages",
        "another model; for DeBERTa `relative_attention=False`",
    ),
    (
        "a module with parameters used before and after the layers",
        "two stages would train it",
        "another model",
    ),
    (
        "parameters outside modules beside the layers (XLNet)",
        "no stage to give them to",
        "move them into a module",
    ),
    (
        "hidden states that are not [batch, positions, hidden] (DeepSeek V4)",
        "objectives need that shape",
        "another model",
    ),
    (
        "code from a model's own repository, quantised weights",
        "not tested, not trained",
        "the original checkpoint, a class in transformers",
    ),
]

_END = """
## Tied embeddings

With one stage a tie is kept. With more, the embedding is on the first stage and the output matrix
on the last: they start equal, train apart, one warning says so, and the export holds both with
`tie_word_embeddings: false`.

## Mixtures of experts

The load-balancing loss that transformers adds (`output_router_logits: true`) sees the routers of
the last stage only.
"""


def render() -> str:
    """The whole page, with a final newline."""
    rows = []
    for architecture in ARCHITECTURES:
        ticks = [
            "bitwise" if task in architecture.tasks else "-"
            for task in ("sequence-classification", "causal-lm")
        ]
        anatomy = anatomy_of(architecture.config(), architecture.tasks[-1])
        names = [
            ", ".join(f"`{n}`" for n in part)
            for part in (anatomy.prologue, (anatomy.layers,), anatomy.epilogue)
        ]
        rows.append(_row(architecture.title, f"`{architecture.model_type}`", *ticks, *names))
    refused = [_row("found in the model", "why", "what to do"), "|---|---|---|\n"]
    refused += [_row(*line) for line in _REFUSED]
    return "".join([_HEAD, *rows, _TAIL, *refused, _END])


def _row(*cells: str) -> str:
    """One line: a row that is wrapped is no longer a row."""
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    print(render(), end="")
