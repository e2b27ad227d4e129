"""``scpl.partition: time``: a cut by what the layers take here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

import scpl_ds
from scpl_ds import LayerSpec, PipelineModule
from scpl_ds.build_times import Stopwatch
from scpl_ds.checkpoint_files import seal
from scpl_ds.cli import main
from scpl_ds.distributed.collectives import gather_objects
from scpl_ds.errors import PartitionError
from scpl_ds.partition.anatomy import anatomy_of
from scpl_ds.partition.plan import LayerTimes, Timing, make_plan, render_plan, time_cut
from scpl_ds.recipe import recipe_from_ds_config
from tests.support import models, tiny
from tests.support.distributed import distributed

CPU = torch.device("cpu")


@pytest.fixture
def world() -> Iterator[None]:
    with tiny.own_world():
        yield


class SlowLayer(BertLayer):
    """Computes twenty times what it returns."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(19):
            super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class SlowLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        outputs = [super(SlowLinear, self).forward(input) for _ in range(40)]
        return torch.stack(outputs).mean(0)


def bert(slow: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 256}
    model = BertForSequenceClassification(tiny.bert_config(num_labels=3, **size))
    model.bert.encoder.layer[slow].__class__ = SlowLayer
    return model


def config(**scpl: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 12,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scpl": {"stages": 2, "sharding": "none", "partition": "time", **scpl},
    }


def times(*seconds: float, prologue: float = 0, epilogue: float = 0, head: float = 0) -> LayerTimes:
    def timing(total: float) -> Timing:
        return Timing(total / 4, total * 3 / 4)

    return LayerTimes(
        tuple(map(timing, seconds)),
        timing(prologue),
        timing(epilogue),
        (timing(head),) * len(seconds),
        "8 x 16 on cpu, float32",
    )


@pytest.mark.parametrize(
    ("measured", "on_last", "bounds"),
    [
        (times(1, 1, 1, 1), False, (0, 2, 4)),
        (times(4, 1, 1, 1), False, (0, 1, 4)),
        (times(1, 1, 1, 1, prologue=2), False, (0, 1, 4)),
        (times(1, 1, 1, 1, epilogue=2), False, (0, 3, 4)),
        (times(1, 1, 1, 1, head=2), False, (0, 1, 4)),
        (times(1, 1, 1, 1, head=2), True, (0, 2, 4)),
    ],
)
def test_the_cut_makes_the_slowest_stage_as_fast_as_can_be(measured, on_last, bounds):
    assert time_cut(measured, 2, head_on_last=on_last) == bounds


def test_a_stage_without_anything_to_train_is_no_choice():
    learns = [True, False, False, True]
    assert time_cut(times(9, 1, 1, 1), 2, head_on_last=False, learns=learns) == (0, 1, 4)
    with_late = time_cut(times(1, 1, 1, 9), 2, head_on_last=False, learns=learns)
    assert with_late == (0, 3, 4)


def test_time_without_times_says_what_to_use():
    anatomy = anatomy_of(tiny.bert_config(), "sequence-classification")
    with pytest.raises(PartitionError, match=r"here are none. Use flops, parameters, uniform"):
        make_plan(anatomy, 2, "time")


def test_the_table_shows_the_time_of_every_stage():
    anatomy = anatomy_of(tiny.bert_config(), "sequence-classification")
    measured = times(4e-3, 1e-3, 1e-3, 1e-3, head=5e-4)
    plan = make_plan(anatomy, 2, "time", times=measured)
    lines = render_plan(plan, anatomy).splitlines()
    assert "cut by time" in lines[0] and lines[1].split()[-2:] == ["ranks", "time"]
    assert [line.split("  ")[-1].strip() for line in lines[2:4]] == ["4.5 ms", "3 ms"]
    assert (
        lines[4]
        == "time: forward and backward of 8 x 16 on cpu, float32; this cut: [[0, 1], [1, 4]]"
    )


@pytest.mark.parametrize(("slow", "bounds"), [(0, (0, 1, 4)), (3, (0, 3, 4))])
def test_a_slow_layer_of_a_hugging_face_model_gets_a_stage_of_its_own(world, slow, bounds):
    """Its parameters and FLOPs by shape are those of the others."""
    engine = scpl_ds.initialize(model=bert(slow), config=config()).engine
    assert engine.plan.bounds == bounds
    assert engine.plan.method == "time"


@pytest.mark.parametrize(("slow", "bounds"), [(0, (0, 1, 4)), (3, (0, 3, 4))])
def test_a_slow_layer_of_a_list_gets_a_stage_of_its_own(world, slow, bounds):
    layers: list[Any] = [LayerSpec(nn.Linear, 128, 128) for _ in range(4)]
    layers[slow] = LayerSpec(SlowLinear, 128, 128)
    module = PipelineModule(layers, loss_fn=F.cross_entropy, input_example=torch.zeros(64, 128))
    engine = scpl_ds.initialize(
        model=module, config={**config(), "train_micro_batch_size_per_gpu": 256}
    ).engine
    assert engine.plan.bounds == bounds


def test_measuring_changes_neither_the_model_nor_the_random_numbers(world):
    norm = nn.BatchNorm1d(8)
    layers: list[Any] = [nn.Linear(8, 8), norm, nn.Dropout(), nn.Linear(8, 3)]
    before = {name: t.clone() for layer in layers for name, t in layer.state_dict().items()}
    stopwatch = Stopwatch(*recipe_from_ds_config(config()), CPU)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    plan = stopwatch.layers(layers, torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)
    after = {name: t for layer in layers for name, t in layer.state_dict().items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for layer in layers for p in layer.parameters())
    assert plan.times is not None and plan.times.setting == "12 x 8 on cpu, float32"


def test_a_list_without_an_example_is_refused_by_name(world):
    module = PipelineModule([nn.Linear(4, 4), nn.Linear(4, 3)], loss_fn=F.cross_entropy)
    with pytest.raises(PartitionError, match=r"partition: time .* input_example="):
        scpl_ds.initialize(model=module, config=config())


def test_a_layer_that_gives_a_tuple_is_refused_by_name(world):
    layers: list[Any] = [nn.Linear(4, 4), lambda x: (x, x), lambda xs: xs[0], nn.Linear(4, 3)]
    module = PipelineModule(layers, loss_fn=F.cross_entropy, input_example=torch.zeros(2, 4))
    with pytest.raises(PartitionError, match=r"layer 1 .*returns a tuple"):
        scpl_ds.initialize(model=module, config=config())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["bert", "modernbert", "gpt2", "llama", "gemma3_text", "mixtral"])
def test_a_model_is_measured_from_its_config_alone(kind, precision):
    """Random weights of one layer at a time, in the types of the run."""
    config_ = models.BY_TYPE[kind].config(num_labels=3)
    task = "sequence-classification"
    written = {
        **config(sharding="deepspeed"),
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": {"stage": 1},
    }
    stopwatch = Stopwatch(*recipe_from_ds_config(written), CPU)
    anatomy = anatomy_of(config_, task)
    measured = stopwatch.config(config_, task, anatomy, sequence_length=12)
    assert len(measured.layers) == 3
    for part in (*measured.layers, measured.heads[0]):
        assert part.forward > 0 and part.backward > 0
    expected = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert measured.setting == f"12 x 12 on cpu, {expected}"


def test_layers_that_are_alike_get_one_time():
    # A vocabulary whose gradient takes longer than the layers, and so stands out of any noise.
    sizes = {"num_hidden_layers": 5, "vocab_size": 100_000}
    config_ = models.BY_TYPE["bert"].config(num_labels=3, **sizes)
    stopwatch = Stopwatch(*recipe_from_ds_config(config()), CPU)
    anatomy = anatomy_of(config_, "sequence-classification")
    measured = stopwatch.config(config_, "sequence-classification", anatomy, sequence_length=12)
    assert len(set(measured.layers)) == 1
    assert measured.prologue.total > 0  # what the embedding takes on top of the layer


@distributed(2)
def test_all_ranks_cut_where_rank_0_measured():
    """Each rank alone would cut elsewhere: another layer of its model is slow."""
    rank = torch.distributed.get_rank()
    engine = scpl_ds.initialize(model=bert([0, 3][rank]), config=config(timeout_s=25)).engine
    assert gather_objects(engine.mesh, engine.plan.bounds) == [(0, 1, 4), (0, 1, 4)]


def test_plan_measures_here(tmp_path: Path, capsys):
    recipe = tiny.write_recipe(tmp_path / "mine.yaml", tiny.make(tmp_path))
    assert main(["plan", str(recipe), "scpl.partition=time"]) == 0
    out = capsys.readouterr().out
    assert "cut by time" in out and "forward and backward of 8 x 16 on cpu, float32" in out


def bounds_of(folder: Path) -> list[int]:
    return json.loads((folder / "manifest.json").read_text())["bounds"]


def test_a_resumed_run_keeps_its_cut_to_the_bit(tmp_path: Path):
    """The checkpoint is cut where nobody who measured equal layers would cut."""
    base = tiny.put(tiny.make(tmp_path), {"train.save_strategy": "steps", "train.save_steps": 4})
    odd = [[0, 1], [1, 4]]
    whole = tiny.put(base, {"scpl.partition": odd, "train.output_dir": str(tmp_path / "whole")})
    assert tiny.train(whole) == 0
    half = tmp_path / "whole" / "checkpoint-4"
    manifest = json.loads((half / "manifest.json").read_text())
    manifest["client_state"]["recipe"]["scpl"]["partition"] = "time"  # as if it had been measured
    del manifest["checksum"]
    (half / "manifest.json").write_text(seal(manifest))
    timed = {"scpl.partition": "time", "train.output_dir": str(tmp_path / "on")}
    again = tiny.put(base, {**timed, "train.resume_from_checkpoint": str(half)})
    assert tiny.train(again) == 0
    end = tmp_path / "on" / "checkpoint-8"
    assert bounds_of(end) == [0, 1, 4]
    tiny.assert_same(tiny.tensors_of(end), tiny.tensors_of(tmp_path / "whole" / "checkpoint-8"))


def test_a_run_over_time_is_scored_under_its_own_cut(tmp_path: Path, capsys):
    recipe = tiny.put(tiny.make(tmp_path), {"scpl.partition": "time", "train.max_steps": 2})
    assert tiny.train(recipe) == 0
    with tiny.own_world():
        assert main(["eval", str(tmp_path / "run")]) == 0
    assert "val/accuracy" in capsys.readouterr().out


def test_a_run_resumed_with_more_stages_measures_again(tmp_path: Path):
    recipe = tiny.put(tiny.make(tmp_path), {"scpl.partition": "time", "train.max_steps": 2})
    assert tiny.train(recipe) == 0
    assert (
        tiny.train(
            recipe, "train.resume_from_checkpoint=true", "train.max_steps=4", "scpl.stages=4"
        )
        == 0
    )
    assert bounds_of(tmp_path / "run" / "checkpoint-4") == [0, 1, 2, 3, 4]
