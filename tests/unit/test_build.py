"""The Python API as a DeepSpeed user meets it: ``initialize`` and ``PipelineModule``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import scpl_ds
from scpl_ds import LayerSpec, PipelineModule, TiedLayerSpec
from scpl_ds.errors import DataError, PartitionError, RecipeError
from tests.support import tiny

CLASSES, WIDTH = 3, 8


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with tiny.own_world():
        yield


def config(stages: int = 2, *, accumulation: int = 1, **scpl: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 12,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "scpl": {"stages": stages, "sharding": "none", "objective": "supcon", **scpl},
    }


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny.bert_config(num_labels=CLASSES))


def texts(rows: int = 12) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = torch.randint(4, len(tiny.WORDS), (rows, 6), generator=generator)
        yield {"input_ids": ids, "labels": torch.arange(rows) % CLASSES}


def blobs(rows: int = 12, *, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Points around one centre per class, for ever."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    while True:
        labels = torch.randperm(rows, generator=generator) % CLASSES
        yield centres[labels] + torch.randn(rows, WIDTH, generator=generator), labels


def mlp() -> list[Any]:
    return [
        LayerSpec(nn.Linear, WIDTH, 16),
        nn.ReLU(),
        LayerSpec(nn.Linear, 16, 16),
        torch.tanh,
        LayerSpec(nn.Linear, 16, CLASSES),
    ]


def pipeline(layers: list[Any] | None = None, **kwargs: Any) -> PipelineModule:
    given = {"loss_fn": F.cross_entropy, "input_example": torch.zeros(2, WIDTH), **kwargs}
    return PipelineModule(layers or mlp(), **given)


# -- a Hugging Face model ------------------------------------------------------------------


def test_a_hugging_face_model_trains_as_it_is():
    model = bert()
    engine, optimizer, loader, lr_at = scpl_ds.initialize(model=model, config=config())
    batches = texts()
    losses = [engine.train_batch(batches) for _ in range(2)]
    assert all(loss.dim() == 0 and not loss.requires_grad for loss in losses)
    assert engine.num_stages == 2 and engine.global_steps == 2
    assert engine.is_first_stage() and engine.is_last_stage()
    assert loader is None and lr_at(0) == 1e-2 and engine.get_lr() == [1e-2]
    assert optimizer is engine.optimizer and isinstance(optimizer, torch.optim.AdamW)
    assert set(engine.metrics()) >= {"stage0/loss", "stage1/loss", "head/loss", "stage0/grad_norm"}


def test_a_config_file_and_deepspeeds_args_do_as_well(tmp_path: Path):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config(accumulation=2)))

    class Args:
        deepspeed_config = str(path)

    for kwargs in ({"config": path}, {"config": str(path)}, {"args": Args()}):
        engine, *_ = scpl_ds.initialize(model=bert(), **kwargs)
        assert engine.gradient_accumulation_steps() == 2
        assert engine.train_micro_batch_size_per_gpu() == 12 and engine.train_batch_size() == 24


def test_detached_features_give_the_last_stages_layers_no_gradient_of_the_task_loss():
    found = {}
    for detach in (True, False):
        made = config(head={"detach_features": detach}, objective={"name": "supcon"})
        engine, *_ = scpl_ds.initialize(model=bert(), config=made)
        stage = engine.stages[-1].module
        stage.objective = None  # what is left is the task loss
        stage({**next(texts())}, torch.randn(12, 6, 16))["loss"].backward()
        grads = {n: p.grad is not None for n, p in stage.body.named_parameters()}  # type: ignore[attr-defined]
        found[detach] = {n: has for n, has in grads.items() if ".layer." in n}
        assert all(has for n, has in grads.items() if "classifier" in n)
    assert found[True] and not any(found[True].values())
    assert all(found[False].values())


def test_eval_batch_returns_what_deepspeeds_returns():
    model = bert().eval()
    engine, *_ = scpl_ds.initialize(model=model, config=config(accumulation=2))
    both = list(itertools.islice(texts(), 2))
    with torch.no_grad():
        wanted = [model(**batch) for batch in both]
    mean = torch.stack([output.loss for output in wanted]).mean()
    loss = engine.eval_batch(iter(both))
    assert loss.shape == ()
    torch.testing.assert_close(loss, mean, rtol=0, atol=0)
    loss, logits = engine.eval_batch(iter(both), return_logits=True)
    torch.testing.assert_close(logits, torch.cat([o.logits for o in wanted]), rtol=0, atol=0)
    assert engine.eval_batch(iter(both), compute_loss=False) is None
    each = engine.eval_batch(iter(both), reduce_output=None)
    assert each.shape == (2,)


def test_the_end_of_the_data_is_stop_iteration_before_the_step():
    engine, *_ = scpl_ds.initialize(model=bert(), config=config(accumulation=2))
    data = itertools.islice(texts(), 3)
    engine.train_batch(data)
    with pytest.raises(StopIteration, match="the data ended in step 1"):
        engine.train_batch(data)
    assert engine.global_steps == 1


def test_a_batch_without_labels_is_refused_by_what_it_holds():
    engine, *_ = scpl_ds.initialize(model=bert(), config=config())
    batch = next(texts())
    del batch["labels"]
    with pytest.raises(DataError, match=r"no 'labels' in micro-batch 0 of step 0.*input_ids"):
        engine.train_batch(iter([batch]))


def test_train_batch_without_data_says_how_to_give_some():
    engine, *_ = scpl_ds.initialize(model=bert(), config=config())
    with pytest.raises(DataError, match="pass data_iter, or call set_dataiterator"):
        engine.train_batch()


# -- a list of layers ----------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True, "both"])
def test_a_list_of_layers_learns_in_stages(detach: bool | str):
    made = config(head={"detach_features": detach})
    engine, *_ = scpl_ds.initialize(model=pipeline(), config=made)
    batches = blobs()
    history: dict[str, list[float]] = {"head/loss": [], "stage0/loss": []}
    for _ in range(60):
        engine.train_batch(batches)
        for name, values in history.items():
            values.append(float(engine.metrics()[name]))
    for name, share in (("head/loss", 0.5), ("stage0/loss", 0.95)):
        assert sum(history[name][-10:]) < share * sum(history[name][:10]), name
    loss, logits = engine.eval_batch(blobs(seed=5), return_logits=True, num_micro_batches=10)
    labels = torch.cat([labels for _, labels in itertools.islice(blobs(seed=5), 10)])
    assert (logits.argmax(-1) == labels).float().mean() > 0.8
    assert loss < 0.8


def test_images_learn_in_stages():
    layers = [
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, CLASSES),
    ]  # fmt: skip

    def images() -> Iterator[tuple[Tensor, Tensor]]:
        for points, labels in blobs():
            yield points[:, None, :, None].expand(-1, -1, -1, 4).contiguous(), labels

    example = torch.zeros(2, 1, WIDTH, 4)
    module = pipeline(layers, partition_method=[[0, 4], [4, 5]], input_example=example)
    engine, *_ = scpl_ds.initialize(model=module, config=config())
    batches = images()
    first = float(engine.train_batch(batches))
    for _ in range(60):
        last = float(engine.train_batch(batches))
    assert last < 0.7 * first


def test_partition_type_balances_the_layers_of_that_class():
    module = pipeline(partition_method="type:linear")
    engine, *_ = scpl_ds.initialize(model=module, config=config(3))
    owned = [[n for n in s.module.body.layers] for s in engine.stages]  # type: ignore[attr-defined]
    assert [sum(i in "024" for i in names) for names in owned] == [1, 1, 1]
    with pytest.raises(PartitionError, match=r"type:conv.*no layer's class matches.*Linear"):
        scpl_ds.initialize(model=pipeline(partition_method="type:conv"), config=config())


def test_num_stages_of_the_module_wins_over_the_configs():
    engine, *_ = scpl_ds.initialize(model=pipeline(num_stages=3), config=config(2))
    assert engine.num_stages == 3


def tied(second: int) -> list[Any]:
    layers: list[Any] = [LayerSpec(nn.Linear, WIDTH, WIDTH) for _ in range(5)]
    layers[0] = TiedLayerSpec("shared", nn.Linear, WIDTH, WIDTH)
    layers[second] = TiedLayerSpec("shared", nn.Linear, WIDTH, WIDTH)
    return [*layers, LayerSpec(nn.Linear, WIDTH, CLASSES)]


def test_a_tie_across_stages_is_refused_by_name():
    module = pipeline(tied(second=4), partition_method=[[0, 3], [3, 6]])
    with pytest.raises(PartitionError, match=r"TiedLayerSpec\('shared'\) ties layers 0 and 4"):
        scpl_ds.initialize(model=module, config=config())


def test_a_tie_within_a_stage_is_one_weight_through_training():
    module = pipeline(tied(second=2), partition_method=[[0, 3], [3, 6]])
    engine, *_ = scpl_ds.initialize(model=module, config=config())
    engine.train_batch(blobs())
    layers = engine.stages[0].module.body.layers  # type: ignore[attr-defined]
    assert layers["0"].weight is layers["2"].weight
    assert layers["0"].bias is not layers["2"].bias


def test_a_head_with_weights_needs_an_input_example():
    with pytest.raises(RecipeError, match="input_example=<one batch of inputs>"):
        scpl_ds.initialize(model=pipeline(input_example=None), config=config())
    engine, *_ = scpl_ds.initialize(model=pipeline(), config=config())
    names = engine.stages[0].module.checkpoint_names().values()
    assert any(name.startswith("scpl_heads.layer_") for name in names)


def test_a_head_without_weights_needs_none():
    plain = {"name": "supcon", "projection": "identity", "layer_norm": False}
    made = config(objective=plain)
    engine, *_ = scpl_ds.initialize(model=pipeline(input_example=None), config=made)
    engine.train_batch(blobs())


def test_deepspeeds_own_layer_specs_are_taken():
    from deepspeed.runtime.pipe.module import LayerSpec as TheirLayer
    from deepspeed.runtime.pipe.module import TiedLayerSpec as TheirTied

    layers = [
        TheirTied("shared", nn.Linear, WIDTH, WIDTH), nn.ReLU(),
        TheirTied("shared", nn.Linear, WIDTH, WIDTH), TheirLayer(nn.Linear, WIDTH, CLASSES),
    ]  # fmt: skip
    module = pipeline(layers, partition_method=[[0, 3], [3, 4]])
    engine, *_ = scpl_ds.initialize(model=module, config=config())
    engine.train_batch(blobs())
    with pytest.raises(PartitionError, match="'shared'"):
        cut = pipeline(layers, partition_method=[[0, 2], [2, 4]])
        scpl_ds.initialize(model=cut, config=config())


def test_a_list_of_layers_without_a_loss_is_refused():
    with pytest.raises(RecipeError, match=r"needs a loss_fn\(outputs, labels\)"):
        PipelineModule(mlp())


def test_more_stages_than_layers_are_refused():
    with pytest.raises(PartitionError, match="5 layers cannot be cut into 6 stages; use 1 to 5"):
        scpl_ds.initialize(model=pipeline(), config=config(6))


# -- optimizer, data, config ---------------------------------------------------------------


def test_a_function_makes_each_stages_optimizer():
    made: list[torch.optim.Optimizer] = []

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.5))
        return made[-1]

    engine, optimizer, *_ = scpl_ds.initialize(
        model=pipeline(), config=config(), optimizer=sgd, lr_scheduler=lambda step: 0.1 / (step + 1)
    )
    assert len(made) == 2 and optimizer is made[-1]
    engine.train_batch(blobs())
    engine.train_batch(blobs())
    assert made[0].param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("what", ["optimizer", "model_parameters"])
def test_an_optimizer_over_all_stages_is_refused(what: str):
    model = bert()
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    kwargs = {what: given if what == "optimizer" else model.parameters()}
    with pytest.raises(RecipeError, match=r"each stage has its own optimizer.*optimizer=lambda"):
        scpl_ds.initialize(model=model, config=config(), **kwargs)


def test_training_data_gives_a_loader_that_feeds_train_batch():
    points, labels = next(blobs(64))
    data = torch.utils.data.TensorDataset(points, labels)
    engine, _, loader, _ = scpl_ds.initialize(
        model=pipeline(), config=config(accumulation=2), training_data=data
    )
    assert loader is not None and loader.num_micro_batches_per_epoch == 4
    for _ in range(3):  # more than an epoch of 2 steps
        engine.train_batch()
    assert engine.samples_seen == 3 * 24 and loader.position["epoch"] == 1


def test_set_batch_fn_says_how_a_batch_becomes_inputs():
    engine, *_ = scpl_ds.initialize(model=pipeline(), config=config())
    engine.set_batch_fn(lambda item: {"inputs": item["x"], "labels": item["y"]})
    engine.train_batch({"x": points, "y": labels} for points, labels in blobs())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scpl": None}, "scpl: is required"),
        ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu: is required"),
        ({"gradient_cliping": 1}, "did you mean 'gradient_clipping'"),
    ],
)
def test_a_bad_config_is_refused(change: dict[str, Any], word: str):
    with pytest.raises(RecipeError, match=word):
        scpl_ds.initialize(model=pipeline(), config={**config(), **change})


def test_what_is_missing_is_named():
    with pytest.raises(RecipeError, match="needs a model"):
        scpl_ds.initialize(config=config())
    with pytest.raises(RecipeError, match="needs config="):
        scpl_ds.initialize(model=bert())


# -- checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", ["none", "deepspeed"])
def test_an_engine_that_loads_goes_on_as_the_one_that_saved(sharding: str, tmp_path: Path):
    def engine() -> scpl_ds.Engine:
        made = config(sharding=sharding, head={"detach_features": "both"})
        return scpl_ds.initialize(model=pipeline(), config=made).engine

    first, batches = engine(), list(itertools.islice(blobs(), 4))
    for batch in batches[:2]:
        first.train_batch(iter([batch]))
    folder = first.save_checkpoint(tmp_path, client_state={"note": "mine"})
    assert folder == tmp_path / "checkpoint-2"
    assert (tmp_path / "latest").read_text() == "checkpoint-2"
    first.save_checkpoint(tmp_path, tag="best", save_latest=False)
    for batch in batches[2:]:
        first.train_batch(iter([batch]))
    first.save_checkpoint(tmp_path, tag="end")

    for tag in (None, "checkpoint-2", "best"):
        second = engine()
        (tmp_path / "latest").write_text("checkpoint-2")
        path, state = second.load_checkpoint(tmp_path, tag)
        assert path == tmp_path / (tag or "checkpoint-2") and second.global_steps == 2
        assert state == ({} if tag == "best" else {"note": "mine"})
        for batch in batches[2:]:
            second.train_batch(iter([batch]))
        second.save_checkpoint(tmp_path, tag="again")
        tiny.assert_same(tiny.tensors_of(tmp_path / "again"), tiny.tensors_of(tmp_path / "end"))
