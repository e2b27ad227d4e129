"""A few evaluated texts, with what a classifier in stages says of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from scpl_ds.batch import Evaluated
from scpl_ds.data._base import drawn
from scpl_ds.data.loader import BatchLoader
from scpl_ds.data.prepared import Data
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.distributed.mesh import Mesh

LONGEST = 200
"""Characters of a text that are shown."""


class _Answer(NamedTuple):
    number: int
    label: int
    predicted: int
    probability: float


class Predictions:
    """Looks on while an evaluation runs, and picks the same samples out of each one.

    Args:
        data: Whose evaluation split is scored.
        loader: Of it, on this rank.
        count: Samples, drawn once: data often stand in the order of their labels.
    """

    def __init__(self, data: Data, loader: BatchLoader, count: int) -> None:
        total = loader.num_samples
        self._wanted = set(drawn(total, min(count, total), 0).tolist())
        self._data, self._first = data, loader.first_scored
        self._next = self._first
        self._found: list[_Answer] = []

    def see(self, output: Evaluated) -> None:
        """Take a micro-batch, in the order of the evaluation."""
        if output.logits is None or output.labels is None:
            return
        start, self._next = self._next, self._next + len(output.labels)
        for row in range(len(output.labels)):
            if start + row in self._wanted:
                self._found.append(_answer(start + row, output.logits[row], output.labels[row]))

    def take(self, mesh: Mesh) -> list[dict[str, str | float]]:
        """``text``, ``label``, ``prediction`` and ``probability`` of it, on rank 0; elsewhere
        nothing. Every rank calls it, after an evaluation.

        The text is what the model was given: cut to ``data.max_length`` tokens, lower case where
        the tokenizer says so.
        """
        parts = gather_objects(mesh, self._found)
        self._found, self._next = [], self._first
        if mesh.rank != 0:
            return []
        names = self._data.facts.label_names
        return [
            {
                "text": self._text(answer.number),
                "label": _name(names, answer.label),
                "prediction": _name(names, answer.predicted),
                "probability": answer.probability,
            }
            for answer in sorted(answer for part in parts for answer in part)
        ]

    def _text(self, index: int) -> str:
        ids = self._data.eval[index]["input_ids"]  # pyright: ignore - rank 0 reads the data
        text = str(self._data.tokenizer.decode(ids, skip_special_tokens=True))
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _answer(index: int, logits: Tensor, label: Tensor) -> _Answer:
    probabilities = logits.float().softmax(-1)
    best = int(probabilities.argmax())
    return _Answer(index, int(label), best, float(probabilities[best]))


def _name(names: tuple[str, ...], number: int) -> str:
    return names[number] if number < len(names) else str(number)
