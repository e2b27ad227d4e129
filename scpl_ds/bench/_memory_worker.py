"""One rank of one row of ``scpl-ds bench memory``: ``RECIPE OUT STEPS``."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from scpl_ds.distributed.world import shut_down
from scpl_ds.engine import Engine
from scpl_ds.memory import Workload, predict
from scpl_ds.meter import MemoryWatch, give_back_freed_memory
from scpl_ds.recipe import Recipe, load_recipe
from scpl_ds.setup import Model, cut_model, make_engine, start_world


def main(recipe_file: str, out: str, steps: int) -> None:
    recipe = load_recipe(recipe_file)
    mesh, device = start_world(recipe)
    model = cut_model(recipe)
    workload = Workload.of(recipe, model, device.type)
    ranks = predict(workload, pipeline_ranks=mesh.pp_size, dp_size=mesh.dp_size)
    predicted = ranks[mesh.pp_rank]
    _warm_up(device)
    gc.collect()
    if device.type == "cpu":
        give_back_freed_memory()  # so that the resident set is what is alive
    watch = MemoryWatch(device)
    watch.restart()
    engine = make_engine(recipe, model, mesh, device, total_steps=max(steps, 2))
    data = _batches(recipe, model, workload.sequence_length)
    loading = watch.peak()
    between, peaks, seconds = [], [], []
    for _ in range(steps):
        watch.restart()
        began = time.monotonic()
        engine.train_batch(data)
        engine.drain()
        seconds.append(time.monotonic() - began)
        peaks.append(watch.peak())
        between.append(watch.now())
    tokens = recipe.deepspeed.batch(mesh.dp_size).global_batch * workload.sequence_length
    figures = {
        "parameter_bytes": _parameter_bytes(engine),
        # Of a step after the first, before which the optimizer has no state.
        "activation_and_gradient_bytes": max(
            peak - rest for peak, rest in zip(peaks[1:], between[:-1], strict=True)
        ),
        "peak_bytes": max(peaks),
        "loading_peak_bytes": loading,
        "predicted_peak_bytes": predicted.peak,
        "tokens_per_s": tokens / min(seconds[1:]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }
    (Path(out) / f"{mesh.rank}.json").write_text(json.dumps(figures))
    shut_down()


def _warm_up(device: torch.device) -> None:
    """Load what libraries load on first use, so that it is not counted as the run's; the backend
    has loaded its own in ``start_world``."""
    layer = torch.nn.Linear(64, 64, device=device)
    layer(torch.randn(64, 64, device=device)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def _batches(recipe: Recipe, model: Model, length: int) -> Iterator[dict[str, Tensor]]:
    """Random text of the longest length, for ever."""
    generator = torch.Generator().manual_seed(0)
    shape = (recipe.deepspeed.micro_batch_size, length)
    while True:
        ids = torch.randint(1, model.config.vocab_size, shape, generator=generator)
        labels = torch.randint(0, model.config.num_labels, shape[:1], generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _parameter_bytes(engine: Engine) -> int:
    """What this rank holds of its stages' parameters, as they are used in forward."""
    total = 0
    for stage in engine.stages:
        for parameter in stage.module.parameters():
            shard = getattr(parameter, "ds_tensor", None)  # DeepSpeed's ZeRO-3
            if shard is None:
                shard = getattr(parameter, "_local_tensor", parameter)  # FSDP2
            total += shard.numel() * shard.element_size()
    return total


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
