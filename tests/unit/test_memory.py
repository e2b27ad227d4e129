"""Memory is predicted from tensors without values, and agrees with what real ones take."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPTJConfig

from scpl_ds.build_plan import plan_stages
from scpl_ds.cli import main
from scpl_ds.errors import PartitionError, ScplError
from scpl_ds.memory import Prediction, RankMemory, Workload, footprint, predict
from scpl_ds.memory_report import compare, describe, fitting, predicted, render_fitting
from scpl_ds.memory_sizes import parse_size, show_size
from scpl_ds.memory_track import FusedAttention, LiveBytes
from scpl_ds.partition.anatomy import Anatomy, anatomy_of
from scpl_ds.recipe import recipe_from_ds_config
from scpl_ds.sharding._footprint import Setting
from tests.support import tiny, tiny_lm
from tests.support.tiny import write_recipe

HALF = {"bf16": {"enabled": True}}
TASK, ROOT = "sequence-classification", Path(__file__).parents[2]


def bert(layers: int = 4) -> BertConfig:
    return BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip


@functools.cache
def anatomy_with(layers: int) -> tuple[BertConfig, Anatomy]:
    return bert(layers), anatomy_of(bert(layers), TASK)


def workload(
    stages: int = 1, zero: int = 0, *, layers: int = 4, rows: int = 8, **options: Any
) -> Workload:
    """Options of the ``scpl`` section; ``ds``: more keys of the config."""
    more = options.pop("ds", {})
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "zero_optimization": {"stage": zero},
        "scpl": {"stages": stages, "sharding": "none", **options},
        **more,
    }
    scpl, section = recipe_from_ds_config(config, stages=None)
    model, anatomy = anatomy_with(layers)
    plan = plan_stages(anatomy, scpl, model)
    return Workload(model, TASK, anatomy, plan, scpl, section, sequence_length=32)


def one(work: Workload, dp_size: int = 1) -> RankMemory:
    return predict(work, pipeline_ranks=1, dp_size=dp_size)[0]


def test_parameters_and_optimizer_are_counted_to_the_byte():
    memory, model = one(workload()), BertForSequenceClassification(bert())
    numbers = sum(p.numel() for p in model.parameters())
    assert memory.parameters == 4 * numbers + sum(b.nbytes for b in model.buffers())
    assert memory.optimizer == 2 * 4 * numbers  # Adam's two moments
    assert memory.gradients == 4 * numbers
    assert memory.head == 0 and memory.boundary == 0


def test_the_tracker_counts_a_storage_once_and_only_while_it_lives():
    weight = torch.zeros(100, 100)
    with LiveBytes([weight]) as tracker:
        made = weight + 1
        view = made.t()
        assert tracker.live == 40_000  # a view is no new memory, and `weight` was there before
        del made
        assert tracker.live == 40_000
        del view
        assert tracker.live == 0
    assert tracker.peak == 40_000


def test_what_a_fake_stage_keeps_is_what_a_real_one_keeps():
    """The same live bytes, with and without values, as autograd says it saves."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert()).train()
    ids = torch.randint(0, 500, (8, 32))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = torch.zeros(8, dtype=torch.long)
    known = [*model.parameters(), *model.buffers(), *inputs.values(), labels]
    tracker = LiveBytes(known)
    hooks = tracker.watch(model)
    saved: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in known}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with tracker, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, labels=labels).loss
        assert tracker.live == pytest.approx(sum(saved.values()), rel=0.02)
        loss.backward()
    for hook in hooks:
        hook.remove()
    (size,), _ = Prediction(workload()).sizes()
    assert size.most(lambda made: made) == pytest.approx(tracker.peak, rel=0.02)
    assert tracker.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def test_equal_stages_are_run_once(monkeypatch: pytest.MonkeyPatch):
    runs: list[int] = []
    original = LiveBytes.watch
    monkeypatch.setattr(
        LiveBytes, "watch", lambda self, module: (runs.append(1), original(self, module))[1]
    )
    predict(workload(8, layers=8), pipeline_ranks=1, dp_size=1)
    assert len(runs) == 3  # first, middle, last


def test_activations_grow_by_the_same_bytes_with_every_layer():
    two, three, four = (one(workload(layers=n)).activations for n in (2, 3, 4))
    assert three - two == four - three > 0


def test_more_stages_on_a_rank_need_less_for_a_step():
    needs = [one(workload(k, layers=8, rows=64)).activation_and_gradient for k in (1, 2, 4, 8)]
    assert needs == sorted(needs, reverse=True)
    assert needs[2] <= 0.45 * needs[0]


def test_gradients_of_all_stages_live_together_only_when_asked():
    apart, together = (one(workload(4, step_in_backward=flag)) for flag in (True, False))
    assert together.gradients > 2 * apart.gradients
    assert together.peak > apart.peak


def test_checkpointing_leaves_fewer_activations():
    work = workload(layers=8)
    with_it = dataclasses.replace(work, gradient_checkpointing=True)
    assert one(with_it).activations < 0.5 * one(work).activations


def test_a_gpu_keeps_no_attention_matrices():
    with FusedAttention(), LiveBytes() as tracker:
        q = torch.zeros(1, 1, 256, 8, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    assert tracker.peak < 256 * 256 * 4


def test_a_language_model_is_predicted_for_a_gpu_that_is_not_here():
    """What its head lends to the lens used to be on the GPU, beside everything else on the CPU."""
    config = tiny_lm.model().config
    scpl, section = recipe_from_ds_config(
        {
            "train_micro_batch_size_per_gpu": 4,
            "scpl": {"stages": 2, "sharding": "none", "objective": "logit_lens"},
        },
        stages=None,
    )
    anatomy = anatomy_of(config, "causal-lm")
    cut = plan_stages(anatomy, scpl, config)
    work = Workload(config, "causal-lm", anatomy, cut, scpl, section, sequence_length=32)
    here = predict(work, pipeline_ranks=2, dp_size=1)
    there = predict(dataclasses.replace(work, device_type="cuda"), pipeline_ranks=2, dp_size=1)
    assert [r.parameters for r in there] == [r.parameters for r in here]
    assert all(r.head > 0 and r.peak > 0 for r in there[:1])


def test_every_zero_stage_keeps_less_between_steps():
    between = [
        one(workload(zero=zero, sharding="deepspeed"), dp_size=4).resident for zero in (0, 1)
    ]
    assert between[1] < 0.7 * between[0]
    three = one(workload(zero=3, sharding="deepspeed"), dp_size=4)
    assert three.parameters < one(workload(zero=2, sharding="deepspeed"), dp_size=4).parameters / 3


def test_bf16_halves_weights_and_offload_moves_the_optimizer_to_the_host():
    full = one(workload(zero=2, sharding="deepspeed"), dp_size=2)
    half = one(workload(zero=2, sharding="deepspeed", ds={"bf16": {"enabled": True}}), dp_size=2)
    assert half.parameters == pytest.approx(full.parameters / 2, rel=0.01)
    assert half.optimizer == full.optimizer  # masters and moments stay fp32
    away = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    offloaded = one(workload(sharding="deepspeed", ds=away), dp_size=2)
    assert offloaded.optimizer == 0 and offloaded.host > full.optimizer


def test_a_backend_without_a_formula_is_said_to_be_unknown():
    work = workload()
    (size,), _ = Prediction(work).sizes()
    setting = Setting(work.section, 1, 2, 0, accumulates=False, on_cpu=True)
    with pytest.raises(ScplError, match="does not say how much memory it needs"):
        footprint("scpl_ds.sharding._base:StageBackend", size, setting)


@pytest.mark.parametrize(
    "text, size",
    [("80GiB", 80 * 2**30), ("24 GB", 24 * 10**9), ("512mib", 512 * 2**20), ("4096", 4096)],
)
def test_sizes_are_read_with_their_units(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "80 apples", "GiB", "-1GiB", "0"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="80GiB"):
        parse_size(text)


def test_when_nothing_fits_what_to_change_is_said_with_numbers():
    work = workload(2, zero=1, sharding="deepspeed")
    choices = fitting(work, pipeline_ranks=2, dp_size=2)
    names = {choice.name for choice in choices}
    assert {"ddp", "deepspeed ZeRO-3", "deepspeed ZeRO-3 + optimizer and param offload"} <= names
    assert "fsdp, stage 2 (whole from forward to backward)" in names
    ranks = {"pipeline_ranks": 2, "dp_size": 2}
    least = min(choice.peak for choice in choices)
    assert "Nothing fits" not in render_fitting(choices, work, memory=least, **ranks)
    text = render_fitting(choices, work, memory=least - 1, **ranks)
    assert "scpl.stages: 4 on 8 ranks: " in text and ", fits" in text
    assert "another objective" in text
    assert ", does not fit" in render_fitting(choices, work, memory=1, **ranks)
    assert show_size(1536) == "1.50 KiB"


def test_what_the_recipe_excludes_is_said_with_the_key():
    choices = fitting(work := workload(ds=HALF), pipeline_ranks=1, dp_size=1)
    text = render_fitting(choices, work, memory=2**40, pipeline_ranks=1, dp_size=1)
    assert "deepspeed ZeRO-0" not in {choice.name for choice in choices}
    assert "  deepspeed ZeRO-0: deepspeed.bf16: " in text


def test_a_change_that_is_not_possible_leaves_the_others(monkeypatch: pytest.MonkeyPatch):
    """CTRL has no gradient checkpointing: nothing at all used to be printed."""
    monkeypatch.setattr(BertModel, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(BertForSequenceClassification, "supports_gradient_checkpointing", False)
    text = describe(workload(2), pipeline_ranks=1, dp_size=1, memory=1)
    assert "memory of each rank" in text and "scpl.stages: 4 on 2 ranks" in text
    assert "gradient_checkpointing" not in text


def test_a_model_without_sdpa_is_predicted_with_eager_attention():
    config = GPTJConfig(
        vocab_size=500, n_embd=64, n_layer=4, n_head=4, rotary_dim=8, num_labels=3, pad_token_id=0
    )
    anatomy, base = anatomy_of(config, TASK), workload()
    plan = plan_stages(anatomy, base.scpl, config)
    work = dataclasses.replace(
        base, config=config, anatomy=anatomy, plan=plan, attn_implementation="flash_attention_2"
    )
    assert one(work).peak > 0


def test_a_model_that_cannot_be_made_is_no_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("rope")

    monkeypatch.setattr(BertForSequenceClassification, "_from_config", fail)
    with pytest.raises(PartitionError, match="cannot be predicted"):
        one(workload())
    found = predicted(workload(), 1, 1)
    assert isinstance(found, str) and "cannot be predicted" in found
    assert "1.00 GiB; not predicted" in compare(found, [2**30], dp_size=1, device_type="cpu")
    assert "not predicted" in describe(workload(), pipeline_ranks=1, dp_size=1)


def test_the_global_batch_is_shared_by_the_data_parallel_ranks():
    """Used to be refused: the batch was counted as that of one rank."""
    sizes = {"train_batch_size": 16, "gradient_accumulation_steps": 1}
    assert one(workload(2, ds=sizes), dp_size=2).peak == one(workload(2), dp_size=2).peak


def test_a_queue_is_counted_in_fp32_beside_bf16_weights():
    queue = {"name": "supcon", "feature_queue": 1000}
    half = {"zero": 1, "sharding": "deepspeed", "ds": HALF}
    without, with_it = (
        one(workload(2, **half, **more)).resident for more in ({}, {"objective": queue})
    )
    assert with_it - without == 1000 * (64 * 4 + 8)


def test_fp32_sums_of_bf16_gradients_live_beside_the_buckets():
    """DeepSpeed's flat buffer of them is there from the first bucket on: calibrated on a Llama."""
    away = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    work = workload(rows=1, sharding="deepspeed", ds={**HALF, **away})
    (size,), _ = Prediction(work).sizes()
    assert one(work).activation_and_gradient >= (2 + 2 + 4) * size.trained


def test_plan_prints_the_memory_of_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with tiny.own_world():
        recipe = str(write_recipe(tmp_path / "r.yaml", tiny.make(tmp_path)))
        assert main(["plan", recipe, "--memory", "1GiB", "--device", "cuda"]) == 0
        shown = capsys.readouterr().out
        assert "memory of each rank" in shown and "fits 1.00 GiB" in shown and "on cuda" in shown
        with pytest.raises(SystemExit, match="2"):
            main(["plan", recipe, "--memory", "plenty"])
    assert "--memory: must be a size such as 80GiB" in capsys.readouterr().err


_MEASURE = """
import gc, json, sys, torch
torch.set_num_threads(1)
from transformers import BertConfig, BertForSequenceClassification
import scpl_ds
from scpl_ds.meter import MemoryWatch, give_back_freed_memory
give_back_freed_memory()
layer = torch.nn.Linear(64, 64)
layer(torch.randn(8, 64)).sum().backward()
torch.optim.AdamW(layer.parameters(), fused=True).step()
gc.collect()
watch = MemoryWatch(torch.device("cpu"))
config, ds = json.loads(sys.argv[1])
engine, *_ = scpl_ds.initialize(
    model=BertForSequenceClassification(BertConfig(**config)), config=ds
)
gc.collect()
ids = torch.randint(0, 500, (16, 128))
batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "labels": torch.arange(16) % 3}
for _ in range(2):
    watch.restart()
    engine.train_batch(iter([batch]))
print(json.dumps({"peak": watch.peak(), "now": watch.now()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 4])
def test_the_predicted_peak_is_within_15_percent_of_the_measured(stages: int):
    shape = {
        "vocab_size": 8000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "intermediate_size": 2048, "num_labels": 3,
    }  # fmt: skip
    ds = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": 0},
        "scpl": {"stages": stages, "sharding": "none"},
    }
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, json.dumps([shape, ds])],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    scpl, section = recipe_from_ds_config(ds, stages=None)
    config = BertConfig(**shape)
    anatomy = anatomy_of(config, TASK)
    plan = plan_stages(anatomy, scpl, config)
    work = Workload(config, TASK, anatomy, plan, scpl, section, sequence_length=128)
    memory = one(work)
    gc.collect()
    assert memory.peak == pytest.approx(measured["peak"], rel=0.15)
    step = measured["peak"] - measured["now"]
    assert memory.activation_and_gradient == pytest.approx(step, rel=0.15)
