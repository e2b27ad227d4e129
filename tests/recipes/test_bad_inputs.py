"""What cannot be trained is refused by `scpl-ds` itself: exit code 2, one message, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scpl_ds.cli import main
from tests.support import tiny
from tests.support.tiny import DROP, put, sentences, write_csv, write_recipe

Recipe = dict[str, Any]
LAYERS = 6


class Case(NamedTuple):
    """One bad input: what is changed, and what the message must say."""

    name: str
    words: tuple[str, ...]
    changes: dict[str, Any] = {}
    prepare: Callable[[Path, Recipe], dict[str, Any]] | None = None
    """Makes files in the test's folder; returns more changes."""
    overrides: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A good recipe and its files; copied by what damages them."""
    return tiny.make(tmp_path_factory.mktemp("good"), num_hidden_layers=LAYERS)


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with tiny.own_world():
        yield


# -- what the cases make -------------------------------------------------------------------


def rows(*lines: tuple[Any, Any], header: str = "text,label") -> Callable[..., dict[str, Any]]:
    """Other training data."""

    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        path = write_csv(folder / "mine.csv", list(lines), header)
        return {"data.train_file": str(path), "data.eval_file": DROP}

    return prepare


def model(change: Callable[[Path], None]) -> Callable[..., dict[str, Any]]:
    """Another model folder."""

    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        copy = folder / "model"
        shutil.copytree(recipe["model"]["name_or_path"], copy)
        change(copy)
        return {"model.name_or_path": str(copy)}

    return prepare


def config(**values: Any) -> Callable[..., dict[str, Any]]:
    """Another config.json in the model folder; None takes a key out."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        given = json.loads(path.read_text()) | values
        path.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))

    return model(change)


def without(*names: str) -> Callable[..., dict[str, Any]]:
    return model(lambda folder: [(folder / name).unlink() for name in names] and None)


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_pad_token(folder: Path) -> None:
    tiny.tokenizer(pad_token=None).save_pretrained(folder)


def foreign_tokenizer(folder: Path, recipe: Recipe) -> dict[str, Any]:
    more = tiny.tokenizer()
    more.add_tokens(["zebra"])
    more.save_pretrained(folder / "tokenizer")
    data = write_csv(folder / "mine.csv", [*sentences(20, seed=1), ("zebra good", 1)])
    return {
        "model.tokenizer_name_or_path": str(folder / "tokenizer"),
        "data.train_file": str(data),
    }


def a_file(key: str) -> Callable[..., dict[str, Any]]:
    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        (folder / "taken").write_text("mine")
        return {key: str(folder / "taken")}

    return prepare


def my_folder(key: str) -> Callable[..., dict[str, Any]]:
    """A folder that holds something of the user's."""

    def prepare(folder: Path, recipe: Recipe) -> dict[str, Any]:
        (folder / "home").mkdir()
        (folder / "home" / "thesis.tex").write_text("mine")
        (folder / "home" / "recipe.yaml").write_text("mine")
        return {key: str(folder / "home")}

    return prepare


def empty_file(folder: Path, recipe: Recipe) -> dict[str, Any]:
    (folder / "empty.csv").touch()
    return {"data.train_file": str(folder / "empty.csv")}


EIGHT = sentences(8, seed=3)
FLOATS = [(text, label + 0.5) for text, label in EIGHT]

CASES = [
    # the recipe
    Case("unknown-key", ("scpl.stage: unknown key; did you mean 'stages'",), {"scpl.stage": 2}),
    Case("unknown-section", ("trian: unknown key; did you mean 'train'",), {"trian": {}}),
    Case(
        "unknown-deepspeed-key",
        ("deepspeed.optimizer.params.learning_rate: unknown key; did you mean 'lr'",),
        {"deepspeed.optimizer.params.learning_rate": 1e-3},
    ),
    Case("bad-type", ("scpl.stages", "two"), {"scpl.stages": "two"}),
    Case(
        "bad-type-for-deepspeed",
        ("deepspeed.gradient_clipping: must be a number", "off"),
        {"deepspeed.gradient_clipping": "off"},
    ),
    Case(
        "bad-option",
        ("scpl.objective.temperature: must be greater than 0, got -1",),
        {"scpl.objective.temperature": -1},
    ),
    Case("missing-section", ("deepspeed: is required",), {"deepspeed": DROP}),
    Case(
        "train-and-deepspeed-disagree",
        ("train.learning_rate: is 0.1, but deepspeed.optimizer.params.lr is 0.003",),
        {"train.learning_rate": 0.1},
    ),
    Case("unknown-tracker", ("tensorbord", "Known: console"), {"trackers": ["tensorbord"]}),
    Case(
        "unknown-partition-method",
        ("scpl.partition: unknown method 'flop'; did you mean 'flops'",),
        {"scpl.partition": "flop"},
    ),
    Case(
        "zero-3",
        ("deepspeed.zero_optimization.stage: ZeRO stage 3 is planned; use stage 0 or 1",),
        {"scpl.sharding": "deepspeed", "deepspeed.zero_optimization": {"stage": 3}},
    ),
    Case("bf16", ("deepspeed.bf16: mixed precision is",), {"deepspeed.bf16": {"enabled": True}}),
    Case("fp16", ("deepspeed.fp16: mixed precision is",), {"deepspeed.fp16": {"enabled": True}}),
    Case(
        "a-key-that-would-do-nothing",
        ("deepspeed.dataloader_drop_last: False is not supported",),
        {"deepspeed.dataloader_drop_last": False},
    ),
    Case(
        "causal-lm",
        ("model.task: 'causal-lm'", "Use sequence-classification"),
        {"model.task": "causal-lm"},
    ),
    Case(
        "unknown-override",
        ("train.max_step: unknown key; did you mean 'max_steps'",),
        overrides=("train.max_step=3",),
    ),
    Case(
        "override-is-not-yaml", ("scpl.stages", "not valid YAML"), overrides=("scpl.stages=[2",)
    ),
    Case(
        "batch-sizes-do-not-fit",
        ("deepspeed.train_batch_size: 30 is not", "8", "= 24", "Drop train_batch_size"),
        {"deepspeed.train_batch_size": 30, "deepspeed.gradient_accumulation_steps": 3},
    ),
    Case("output-dir-is-a-file", ("train.output_dir", "is a file"), {}, a_file("train.output_dir")),
    Case(
        "output-dir-holds-a-recipe-of-mine",
        ("train.output_dir", "recipe.yaml that is not of a run"),
        {},
        my_folder("train.output_dir"),
    ),
    Case(
        "export-dir-holds-something-else",
        ("train.export_dir", "thesis.tex", "name another folder"),
        {},
        my_folder("train.export_dir"),
    ),
    # stages and ranks
    Case("more-stages-than-layers", ("6 layers", "7"), {"scpl.stages": 7}),
    Case(
        "more-ranks-than-stages",
        ("scpl.pipeline_ranks: 3 is more than stages: 2",),
        {"scpl.pipeline_ranks": 3},
    ),
    Case(
        "world-size-does-not-fit",
        ("scpl.pipeline_ranks: 2 pipeline ranks", "need 2 ranks, but WORLD_SIZE is 1"),
        {"scpl.pipeline_ranks": 2},
    ),
    Case(
        "cut-with-a-gap",
        ("scpl.partition", "[3, 6] must start at layer 2"),
        {"scpl.partition": [[0, 2], [3, 6]]},
    ),
    Case(
        "cut-does-not-cover-the-model",
        ("scpl.partition ends at layer 5, but the model has 6 layers",),
        {"scpl.partition": [[0, 2], [2, 5]]},
    ),
    # data
    Case(
        "missing-data-file",
        ("nowhere.csv does not exist", "data.train_file"),
        {"data.train_file": "nowhere.csv"},
    ),
    Case("empty-file", ("empty.csv is empty (0 bytes)",), {}, empty_file),
    Case("no-rows", ("mine.csv: no rows",), {}, rows()),
    Case("one-class", ("All 2 training samples have label 0",), {}, rows(("a", 0), ("b", 0))),
    Case(
        "label-out-of-range",
        ("mine.csv, line 10: label 2", "model.num_labels is 2", "labels run from 0 to 1"),
        {"model.num_labels": 2},
        rows(*EIGHT, ("word1", 2)),
    ),
    Case("class-that-never-occurs", ("class 1 never occurs",), {}, rows(("a", 0), ("b", 2))),
    Case("regression", ("label 0.5 is not a whole number", "regression"), {}, rows(*FLOATS)),
    Case("empty-text", ("mine.csv, line 10: column 'text' is empty",), {}, rows(*EIGHT, (" ", 0))),
    Case(
        "no-text-column",
        ("data.text_column: 'text' is not a column", "Columns found: review, label"),
        {},
        rows(*EIGHT, header="review,label"),
    ),
    Case(
        "no-label-column",
        ("data.label_column: 'label' is not a column; did you mean 'labels'", "labels"),
        {},
        rows(*EIGHT, header="text,labels"),
    ),
    Case(
        "fewer-samples-than-a-batch",
        ("8 training samples are fewer than one global batch: 16",),
        {"deepspeed.train_micro_batch_size_per_gpu": 16},
        rows(*EIGHT),
    ),
    Case(
        "longer-than-the-model",
        ("data.max_length: 64", "at most 32 positions", "Set data.max_length to 32"),
        {"data.max_length": 64},
    ),
    # model and tokenizer
    Case("no-config", ("model.name_or_path", "config.json"), {}, without("config.json")),
    Case("no-weights", ("no checkpoint for layers",), {}, without("model.safetensors")),
    Case("broken-weights", ("cannot be read as 'bert'",), {}, model(truncated_weights)),
    Case(
        "no-tokenizer",
        ("No tokenizer for", "tokenizer.json"),
        {},
        without("tokenizer.json", "tokenizer_config.json"),
    ),
    Case("no-pad-token", ("no pad token", "data.pad_token: eos"), {}, model(no_pad_token)),
    Case(
        "tokenizer-of-another-model",
        ("token id 44", "vocabulary has 44 tokens", "another model"),
        {},
        foreign_tokenizer,
    ),
    Case("weights-of-another-size", ("is [16", "not [32"), {}, config(hidden_size=32)),
    Case("encoder-decoder", ("encoder-decoder",), {}, config(model_type="t5", d_model=16)),
    Case("shared-layers", ("albert",), {}, config(model_type="albert", embedding_size=16)),
    Case(
        "remote-code",
        ("gives no model config",),
        {},
        config(model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
    ),
    Case(
        "quantised",
        ("quantised", "original checkpoint"),
        {},
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    ),
    # going on
    Case(
        "nothing-to-resume",
        ("There is no checkpoint", "run"),
        {"train.resume_from_checkpoint": True},
    ),
]


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that is refused and leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    began = time.monotonic()
    try:
        code = main(argv)
    except SystemExit as error:  # argparse
        code = error.code
    assert time.monotonic() - began < 20
    said = capsys.readouterr()
    assert code == 2, said.err
    assert said.out == ""
    assert "Traceback" not in said.err
    assert said.err.count("scpl-ds: ") == 1, said.err
    assert sorted(folder.rglob("*")) == before
    return said.err


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_bad_input_is_refused_before_anything_is_trained_or_written(
    case: Case, base: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = put(base, {"train.output_dir": str(tmp_path / "run"), **case.changes})
    if case.prepare is not None:
        recipe = put(recipe, case.prepare(tmp_path, recipe))
    path = write_recipe(tmp_path / "mine.yaml", recipe)
    message = refused(["train", str(path), *case.overrides], tmp_path, capsys)
    assert message.startswith("scpl-ds: "), f"something else was said first: {message}"
    for word in case.words:
        assert word in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "nowhere.yaml"], ("nowhere.yaml does not exist",)),
        (["nowhere.yaml"], ("nowhere.yaml does not exist",)),
        (["train", "broken.yaml"], ("broken.yaml is not valid YAML", "line 3")),
        (["train", "good.yaml", "scpl.stages"], ("scpl.stages", "key=value")),
        (["train", "good.yaml", "--max_steps=3"], ("--max_steps=3",)),
        (["eval", "nowhere"], ("nowhere is not a run folder", "scpl-ds train RECIPE")),
        (["export", "nowhere", "out"], ("nowhere is not a run folder",)),
        (["export", "nowhere", "out", "a=1"], ("takes no overrides",)),
        (["plan", "good.yaml", "scpl.stages=9"], ("6 layers", "9")),
        (["plan", "good.yaml", "--ranks", "0"], ("ranks",)),
        (["trian", "good.yaml"], ("trian",)),
        ([], ("COMMAND",)),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_a_bad_command_line_is_refused(
    argv: list[str],
    words: tuple[str, ...],
    base: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "good.yaml", base)
    (tmp_path / "broken.yaml").write_text("model: {name_or_path: demo}\nscpl: {stages: 2\n")
    message = refused(argv, tmp_path, capsys)
    for word in words:
        assert word in message


def test_ranks_that_do_not_fit_are_refused_before_a_world_is_made(
    base: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Nobody listens at that address: a rendezvous would wait for ever."""
    for name, value in rank_env(rank=0, world_size=3, port=1).items():
        monkeypatch.setenv(name, value)
    changes = {"scpl.pipeline_ranks": 2, "train.output_dir": str(tmp_path / "run")}
    path = write_recipe(tmp_path / "mine.yaml", put(base, changes))
    message = refused(["train", str(path)], tmp_path, capsys)
    assert "2 pipeline ranks x 1 dp rank need 2 ranks, but WORLD_SIZE is 3" in message


def rank_env(*, rank: int, world_size: int, port: int) -> dict[str, str]:
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in values.items()}


# -- as processes --------------------------------------------------------------------------


def start(argv: list[str], **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scpl_ds", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"scpl.stage": 2}, "scpl.stage: unknown key"),
        ({"scpl.stages": 7}, "6 layers"),
        ({"data.train_file": "nowhere.csv"}, "nowhere.csv does not exist"),
    ],
    ids=["recipe", "model", "data"],
)
def test_the_process_itself_ends_with_2_and_one_message(
    changes: dict[str, Any], word: str, base: Recipe, tmp_path: Path
):
    recipe = put(base, {"train.output_dir": str(tmp_path / "run"), **changes})
    process = start(["train", str(write_recipe(tmp_path / "mine.yaml", recipe))])
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("scpl-ds: ") and word in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_what_only_one_rank_can_see_ends_both_at_once_with_one_message(
    base: Recipe, tmp_path: Path
):
    """Data are read on the first stage's rank alone; the other would wait for its first batch."""
    changes = {"train.output_dir": str(tmp_path / "run"), "data.train_file": "nowhere.csv"}
    path = write_recipe(tmp_path / "mine.yaml", put(base, changes))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    ranks = [
        start(["train", str(path)], **rank_env(rank=rank, world_size=2, port=port))
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert time.monotonic() - began < 60  # the boundary's own timeout is 600
    assert said[0].startswith("scpl-ds: DataError") and "nowhere.csv does not exist" in said[0]
    assert said[1] == ""
    assert not (tmp_path / "run").exists()
