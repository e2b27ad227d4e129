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
from scpl_ds.errors import CheckpointError, DataError, PartitionError, RecipeError
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_refused_instead_of_training_in_half(dtype: torch.dtype):
    """transformers 5 loads a checkpoint in its own dtype; it used to train in pure bf16."""
    advice = r"from_pretrained\(\.\.\., dtype=torch.float32"
    with pytest.raises(RecipeError, match=rf"the model is in {dtype} .*{advice}"):
        scpl_ds.initialize(model=bert().to(dtype), config=config())
    for layers in (
        [nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES, dtype=dtype)],
        [LayerSpec(nn.Linear, WIDTH, 16, dtype=dtype), nn.Linear(16, CLASSES)],
    ):
        with pytest.raises(RecipeError, match=rf"{dtype} \('layers\.[01]\.weight'\).*{advice}"):
            module = pipeline(layers, partition_method="uniform", input_example=None)
            objective = {"name": "supcon", "projection": "identity", "layer_norm": False}
            scpl_ds.initialize(model=module, config=config(objective=objective))


def test_a_frozen_stage_with_nothing_to_train_is_refused_by_its_layers():
    """It used to end in torch's 'optimizer got an empty parameter list'."""
    model = bert()
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:2]):  # pyright: ignore
        part.requires_grad_(False)
    made = config(objective={"name": "supcon", "projection": "identity", "layer_norm": False})
    with pytest.raises(
        PartitionError, match=r"stage 0 \(layers 0 to 1\) has nothing to train.*[Uu]nfreeze"
    ):
        scpl_ds.initialize(model=model, config=made)
    engine, *_ = scpl_ds.initialize(
        model=model, config={**made, "scpl": {**made["scpl"], "partition": [[0, 3], [3, 4]]}}
    )
    engine.train_batch(texts())


@pytest.mark.parametrize("detach", [False, True])
def test_initialize_counts_every_local_head_in_the_cut(detach: bool):
    """As a recipe does: it counted none, and nobody counted that of a detached last stage."""
    objective = {"name": "supcon", "projection": "mlp", "hidden_dim": 4096, "projection_dim": 4096}
    made = config(2, objective=objective, head={"detach_features": detach})
    engine, *_ = scpl_ds.initialize(model=bert(), config=made)
    head = engine.stages[0].module.objective
    assert head is not None and engine.plan.head_flops == head.flops(1, 1) > 0
    # Stage 0 has a head dearer than all layers together. So has the last stage, when it has one.
    assert engine.plan.bounds == ((0, 2, 4) if detach else (0, 1, 4))


def test_initialize_leaves_the_scripts_random_numbers_alone():
    model = bert()
    before = torch.get_rng_state()
    scpl_ds.initialize(model=model, config=config())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pair_for_a_hugging_face_model_is_refused_with_what_to_do():
    """HF said 'You have to specify exactly one of input_ids or inputs_embeds'."""
    engine, *_ = scpl_ds.initialize(model=bert(), config=config())
    batch = next(texts())
    with pytest.raises(DataError, match=r"'input_ids'.*'attention_mask'.*set_batch_fn"):
        engine.train_batch(iter([(batch["input_ids"], batch["labels"])]))
    engine.train_batch(iter([({"input_ids": batch["input_ids"]}, batch["labels"])]))
    engine.set_batch_fn(lambda pair: {"input_ids": pair[0], "labels": pair[1]})
    engine.train_batch(iter([(batch["input_ids"], batch["labels"])]))


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


def test_num_stages_of_the_module_is_enough():
    """'scpl.stages is required', though the module had it."""
    made = config()
    del made["scpl"]["stages"]
    for num_stages in (1, 3):
        engine, *_ = scpl_ds.initialize(model=pipeline(num_stages=num_stages), config=made)
        assert engine.num_stages == num_stages
    with pytest.raises(RecipeError, match=r"scpl.stages: is required"):
        scpl_ds.initialize(model=pipeline(), config=made)
    made["scpl"]["pipeline_ranks"] = 3
    with pytest.raises(RecipeError, match="pipeline_ranks: 3 is more than stages: 2"):
        scpl_ds.initialize(model=pipeline(num_stages=2), config=made)


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


def test_a_tie_within_a_stage_is_one_module_as_in_deepspeed():
    """Only ``tied_weight_attr`` was shared; DeepSpeed (pipe/module.py, _build) shares it all."""
    module = pipeline(tied(second=2), partition_method=[[0, 3], [3, 6]])
    engine, *_ = scpl_ds.initialize(model=module, config=config())
    body = engine.stages[0].module.body
    layers = body.layers  # type: ignore[attr-defined]
    before = layers["0"].weight.detach().clone()
    engine.train_batch(blobs())
    assert sorted(layers) == ["0", "1"] and not torch.equal(layers["0"].weight, before)
    x, _ = next(blobs())
    found = body({"inputs": x}, None).hidden_states
    wanted = layers["0"](layers["1"](layers["0"](x)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_tie_with_a_forward_fn_has_the_width_that_it_gives():
    """The trace for the width used to call the layer itself."""
    transpose = TiedLayerSpec(
        "shared", nn.Linear, WIDTH, 16, forward_fn=lambda layer, x: x @ layer.weight
    )
    layers = [TiedLayerSpec("shared", nn.Linear, WIDTH, 16), transpose, nn.Linear(WIDTH, CLASSES)]
    module = pipeline(layers, partition_method=[[0, 2], [2, 3]])
    engine, *_ = scpl_ds.initialize(model=module, config=config())
    assert engine.stages[0].module.body.hidden_size == WIDTH
    engine.train_batch(blobs())


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


@pytest.mark.parametrize(
    ("layers", "word"),
    [
        (nn.Linear(WIDTH, CLASSES), "a Linear is neither a Hugging Face model nor a list of lay"),
        (torch.tanh, "neither a Hugging Face model nor a list"),
        ("bert-base-uncased", "a str is neither .*from_pretrained"),
    ],
)
def test_a_model_that_is_no_list_is_refused_by_what_it_is(layers: Any, word: str):
    """It was "TypeError: 'Linear' object is not iterable"."""
    for make in (lambda: scpl_ds.initialize(model=layers, config=config()),
                 lambda: PipelineModule(layers, loss_fn=F.cross_entropy)):  # fmt: skip
        with pytest.raises(RecipeError, match=word):
            make()


def test_a_sequential_is_a_list_of_layers():
    layers: Any = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    engine, *_ = scpl_ds.initialize(model=pipeline(layers), config=config())
    engine.train_batch(blobs())


def test_an_interval_of_checkpoints_below_zero_is_refused():
    """DeepSpeed's default, 0, is taken; it was "unexpected keyword argument"."""
    assert pipeline().activation_checkpoint_interval == 0
    with pytest.raises(RecipeError, match=r"activation_checkpoint_interval: -1 must be 0"):
        pipeline(activation_checkpoint_interval=-1)


def test_a_last_stage_with_nothing_to_train_is_refused_by_its_layers():
    layers = [nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES), nn.Flatten()]
    module = pipeline(layers, partition_method=[[0, 2], [2, 3]])
    with pytest.raises(PartitionError, match=r"stage 1 \(layer 2\) has nothing to train"):
        scpl_ds.initialize(model=module, config=config())


def test_a_batch_norm_is_not_touched_by_looking_for_the_width():
    """num_batches_tracked went up once for every boundary."""
    norm = nn.BatchNorm1d(16)
    layers = [nn.Linear(WIDTH, 16), norm, nn.ReLU(), nn.Linear(16, CLASSES)]
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    scpl_ds.initialize(model=pipeline(layers, partition_method="uniform"), config=config(2))
    tiny.assert_same(dict(norm.state_dict()), before)
    assert norm.training and norm.num_batches_tracked is not None
    assert type(norm.num_batches_tracked) is torch.Tensor


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


@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
@pytest.mark.parametrize("total", ["auto", None])
def test_a_schedule_that_needs_the_runs_length_is_not_guessed(kind: str, total: str | None):
    """It trained at a learning rate of 0, silently: the length was taken to be one step."""
    params: dict[str, Any] = {"warmup_num_steps": 2}
    if kind == "WarmupDecayLR":
        params["warmup_max_lr"] = "auto"
    if total:
        params["total_num_steps"] = total
    made = {**config(), "scheduler": {"type": kind, "params": params}}
    with pytest.raises(RecipeError, match=rf"total_num_steps: {kind} .*or pass lr_scheduler="):
        scpl_ds.initialize(model=pipeline(), config=made)
    *_, lr_at = scpl_ds.initialize(model=pipeline(), config=made, lr_scheduler=lambda step: 0.5)
    assert lr_at(7) == 0.5
    params["total_num_steps"] = 10
    *_, lr_at = scpl_ds.initialize(model=pipeline(), config=made)
    assert lr_at(3) > lr_at(6) > 0


OPTIMIZERS = [
    ("AdamW", {}), ("AdamW", {"amsgrad": True}), ("Adam", {"adam_w_mode": False}), ("SGD", {}),
    ("SGD", {"momentum": 0.9}), ("Adagrad", {"weight_decay": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "params"), OPTIMIZERS)
@pytest.mark.parametrize(("sharding", "zero"), [("none", 0), ("deepspeed", 0), ("deepspeed", 1)])
def test_every_optimizer_trains_under_every_backend_or_is_refused(
    kind: str, params: dict[str, Any], sharding: str, zero: int
):
    made = config(sharding=sharding)
    made["optimizer"] = {"type": kind, "params": {"lr": 1e-2, **params}}
    made["zero_optimization"] = {"stage": zero}
    if (kind, zero) == ("Adagrad", 1):  # crashed in the first step
        with pytest.raises(RecipeError, match=r"optimizer.type: Adagrad .*zero_optimization.stage"):
            scpl_ds.initialize(model=pipeline(), config=made)
        return
    engine, *_ = scpl_ds.initialize(model=pipeline(), config=made)
    weights = [dict(stage.parameters_by_name()) for stage in engine.stages]
    batches = blobs()
    for _ in range(2):
        engine.train_batch(batches)
    for stage, before in zip(engine.stages, weights, strict=True):
        after = stage.parameters_by_name()
        assert all(not torch.equal(after[n], t) for n, t in before.items() if t.ndim > 1)


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
    assert (tmp_path / "latest").read_text().split()[0] == "checkpoint-2"
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


KEPT_BY = [
    ("SGD", {"momentum": 0.9}, "momentum_buffer"),
    ("AdamW", {}, "exp_avg and exp_avg_sq"),
    ("AdamW", {"amsgrad": True}, "exp_avg, exp_avg_sq and max_exp_avg_sq"),
    ("Adagrad", {}, "sum"),
]


@pytest.mark.parametrize(
    "sharding, zero, saved, loaded",
    [
        *(("none", 0, a, b) for a, b in [(0, 1), (1, 0), (1, 2), (2, 1), (3, 1), (1, 3), (1, 1)]),
        *(("deepspeed", 0, a, b) for a, b in [(0, 1), (1, 3), (2, 2)]),
        *(("deepspeed", 1, a, b) for a, b in [(0, 1), (1, 2), (1, 1)]),
    ],
)
def test_the_state_of_another_optimizer_is_refused(
    sharding: str, zero: int, saved: int, loaded: int, tmp_path: Path
):
    """It loaded in silence and ended in "KeyError: 'exp_avg'" at the next step, or never."""

    def engine(number: int) -> scpl_ds.Engine:
        kind, params, _ = KEPT_BY[number]
        made = config(sharding=sharding) | {"zero_optimization": {"stage": zero}}
        made["optimizer"] = {"type": kind, "params": {"lr": 1e-2, **params}}
        return scpl_ds.initialize(model=pipeline(), config=made).engine

    first, batch = engine(saved), next(blobs())
    first.train_batch(iter([batch]))
    first.save_checkpoint(tmp_path)
    second = engine(loaded)
    if saved != loaded:
        there, here = KEPT_BY[saved][2], KEPT_BY[loaded][2]
        with pytest.raises(CheckpointError, match=rf"has {there}\b.* keeps {here}\b.*saved it"):
            second.load_checkpoint(tmp_path)
        second.load_checkpoint(tmp_path, load_optimizer_states=False)
    else:
        second.load_checkpoint(tmp_path)
    second.train_batch(iter([batch]))
