"""Plain text files for language models: ``data: {name: text, train: a.txt, eval: b.txt}``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

from datasets import Dataset
from pydantic import model_validator

from scpl_ds.data._base import DataOptions, DataSource, Splits, Texts
from scpl_ds.data.files import FilePair, existing
from scpl_ds.errors import DataError


class PlainTextOptions(FilePair, DataOptions):
    """Options of ``text``."""

    document: Literal["file", "paragraph", "line"] = "file"
    """What is one document: the whole file, what stands between empty lines, or a line. The model
    sees no text of another document, and learns where each ends."""

    @model_validator(mode="after")
    def _a_file(self) -> PlainTextOptions:
        if self.train_file is None and self.eval_file is None:
            raise ValueError("needs train_file (or eval_file, to evaluate only)")
        return self


class PlainTextSource(DataSource):
    """UTF-8 text, one or many documents a file."""

    Options: ClassVar[type[DataOptions]] = PlainTextOptions
    options: PlainTextOptions

    def load(self) -> Splits:
        """
        Raises:
            DataError: Always: there are no labels.
        """
        raise DataError(
            "data.name: 'text' has no labels. Use model.task: causal-lm, or csv, tsv, jsonl, "
            "parquet or hf with a label column."
        )

    def load_texts(self) -> Texts:
        train, held_out = (
            None if path is None else self._read(path)
            for path in (self.options.train_file, self.options.eval_file)
        )
        unit = {"file": "document", "paragraph": "paragraph", "line": "line"}
        files = {"train": self.options.train_file, "eval": self.options.eval_file}
        what = unit[self.options.document]
        origin = {split: f"{path}, {what}" for split, path in files.items() if path is not None}
        return self.limit(Texts("text", train, held_out, origin))

    def _read(self, path: Path) -> Dataset:
        existing(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at position "
                f"{error.start}. Save it as UTF-8."
            ) from error
        splits = {
            "file": lambda: [text],
            "paragraph": lambda: re.split(r"\n\s*\n", text),
            "line": text.splitlines,
        }
        found = [(n, part) for n, part in enumerate(splits[self.options.document](), 1)]
        kept = [(n, part) for n, part in found if part.strip()]
        if not kept:
            raise DataError(f"{path} holds no text.")
        return Dataset.from_dict({"text": [part for _, part in kept], "row": [n for n, _ in kept]})
