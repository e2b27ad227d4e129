"""A small model with dropout, its data, and the engine and the plain loop over the same cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

import scpl_ds
from scpl_ds.partition.anatomy import analyze
from scpl_ds.partition.stage_module import stage_from_model
from scpl_ds.recipe_scpl import ObjectiveChoice
from scpl_ds.stage import HEADS
from tests.support.models import build
from tests.support.reference import Batch, PlainLoop

LAYERS, CLASSES, MICRO_BATCH, SEED = 4, 3, 6, 11


def model(*, layers: int = LAYERS, dropout: float = 0.1) -> PreTrainedModel:
    """BERT with dropout everywhere; the same weights at every call."""
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, num_labels=CLASSES,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return build(config, "sequence-classification")


def batches(rows: int = MICRO_BATCH, *, seed: int = 3) -> Iterator[Batch]:
    """Padded micro-batches of changing length, for ever; class 0 shows in the first token."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        length = int(torch.randint(6, 14, (), generator=generator))
        ids = torch.randint(3, 99, (rows, length), generator=generator)
        labels = torch.randint(0, CLASSES, (rows,), generator=generator)
        ids[:, 0] = 3 + labels
        mask = torch.ones_like(ids)
        mask[1:, length - 2 :] = 0
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def lane(stream: Iterator[Batch], dp_rank: int, dp_size: int) -> Iterator[Batch]:
    """Every ``dp_size``-th micro-batch: what one data-parallel rank reads."""
    for number, batch in enumerate(stream):
        if number % dp_size == dp_rank:
            yield batch


def config(stages: int, *, accumulation: int = 1, **options: Any) -> dict[str, Any]:
    """A ds_config with an ``scpl`` block. Options: ``sharding``, ``zero``, ``detach``, ``clip``,
    ``eps``, ``objective`` (options of supcon, or any objective), ``pipeline_ranks``."""
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": options.pop("clip", 1.0),
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 2e-3, "weight_decay": 0.0, "eps": options.pop("eps", 1e-8)},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": 2e-3, "warmup_num_steps": 5, "warmup_type": "linear"},
        },
        "zero_optimization": {"stage": options.pop("zero", 0)},
        "scpl": {
            "stages": stages,
            "partition": "uniform",
            "objective": objective_of(options.pop("objective", {})),
            "head": {"detach_features": options.pop("detach", None)},
            "timeout_s": 25,
            **{"sharding": "none", **options},
        },
    }


def objective_of(asked: Any) -> Any:
    """What a recipe would say: a name, a list, a mapping, or options of supcon."""
    named = isinstance(asked, str | list) or "name" in asked
    return asked if named else {"name": "supcon", "projection": "mlp", **asked}


def engine(stages: int, **options: Any) -> scpl_ds.Engine:
    whole = model(dropout=options.pop("dropout", 0.1))
    return scpl_ds.initialize(model=whole, config=config(stages, **options), seed=SEED).engine


def plain_loop(
    like: scpl_ds.Engine,
    *,
    accumulation: int = 1,
    make: type[PlainLoop] = PlainLoop,
    **options: Any,
) -> PlainLoop:
    """The plain loop over the cut and the starting weights of an engine's configuration."""
    whole = model(dropout=options.pop("dropout", 0.1))
    objective = options.pop("objective", {})
    anatomy = analyze(whole)
    detach = options.pop("detach", False)
    bodies, heads = [], []
    for k in range(like.num_stages):
        start, end = like.plan.span(k)
        bodies.append(copy.deepcopy(stage_from_model(whole, anatomy, start, end)))
        head = None
        if end < anatomy.num_layers or detach is not False:
            torch.manual_seed((SEED * 1_000_003 + end) % 2**63)
            choice = ObjectiveChoice.model_validate(objective_of(objective))
            head = choice.create(hidden_size=anatomy.hidden_size, num_labels=CLASSES)
            head.attach(bodies[-1])
        heads.append(head)
    return make(
        bodies,
        heads,
        lr=like.lr_at,
        clip=options.pop("clip", 1.0),
        accumulation=accumulation,
        seed=SEED,
        detach=detach is True,
        **options,
    )


def weights_of_loop(loop: PlainLoop) -> dict[str, Tensor]:
    """All tensors under the names a checkpoint has."""
    result = {}
    for body, head in zip(loop.bodies, loop.heads, strict=True):
        result |= body.hf_state_dict()
        if head is not None:
            prefix = f"{HEADS}.layer_{body.end - 1}."
            result |= {prefix + name: tensor for name, tensor in head.state_dict().items()}
    return {name: tensor.detach() for name, tensor in result.items()}


def weights_of_engine(running: scpl_ds.Engine) -> dict[str, Tensor]:
    """This rank's tensors under the names a checkpoint has."""
    result: dict[str, Tensor] = {}
    for stage in running.stages:
        result |= stage.parameters_by_name()
    return result


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    """Bitwise unless a tolerance is given; names the first tensor that differs and by how much."""
    tolerance = {"rtol": 0.0, "atol": 0.0, **tolerance}
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
