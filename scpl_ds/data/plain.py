"""Plain text files for language models: ``data: {name: text, train: a.txt, eval: b.txt}``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from datasets import Dataset, IterableDataset
from pydantic import model_validator

from scpl_ds.data._base import DataOptions, DataSource, Splits, Streamed, Texts, TextStream
from scpl_ds.data._readers import existing, reading
from scpl_ds.data.files import FilePair
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
        if self.streaming and self.document == "file":
            raise ValueError("streaming needs document: paragraph or line, not the file as a whole")
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
        return self._texts(self.options.train_file, self.options.eval_file)

    def stream_texts(self) -> Streamed:
        train, held_out = self.options.train_file, self.options.eval_file
        stream = None
        if train is not None:
            existing(train)
            given = {"path": train, "document": self.options.document}
            rows = IterableDataset.from_generator(_documents, gen_kwargs=given)
            stream = TextStream("text", rows, {"text": "text"}, self._origin(train), numbered=True)
        return Streamed(stream, None if held_out is None else self._texts(None, held_out))

    def _texts(self, train: Path | None, held_out: Path | None) -> Texts:
        files = {"train": train, "eval": held_out}
        found = {split: None if path is None else self._read(path) for split, path in files.items()}
        origin = {split: self._origin(path) for split, path in files.items() if path is not None}
        return self.limit(Texts("text", found["train"], found["eval"], origin))

    def _origin(self, path: Path) -> str:
        return f"{path}, {'document' if self.options.document == 'file' else self.options.document}"

    def _read(self, path: Path) -> Dataset:
        existing(path)
        rows = list(_documents(path, self.options.document))
        if not rows:
            raise DataError(f"{path} holds no text.")
        return Dataset.from_list(rows)


def _documents(path: Path, document: str) -> Iterator[dict[str, Any]]:
    """The documents of a file that are not empty, each with its number in ``row``."""
    with reading(path), path.open(encoding="utf-8-sig") as file:
        units = [file.read()] if document == "file" else file
        if document == "paragraph":
            units = _paragraphs(file)
        for number, text in enumerate(units, 1):
            if text.strip():
                yield {
                    "text": text.removesuffix("\n") if document == "line" else text,
                    "row": number,
                }


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """What stands between empty lines."""
    found: list[str] = []
    for line in lines:
        if line.strip():
            found.append(line)
        elif found:
            yield "".join(found).removesuffix("\n")
            found = []
    if found:
        yield "".join(found)
