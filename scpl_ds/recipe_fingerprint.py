"""What of a recipe determines the trained numbers, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from scpl_ds.ds_keys import FILLS

_NOT_IN_FINGERPRINT = {
    "scpl": (
        "pipeline_ranks",
        "schedule",
        "max_in_flight",
        "transport",
        "timeout_s",
        "step_in_backward",
        "sync",
    ),
    "deepspeed": [
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "disable_python_gc",
        "log_level",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "comms_logger",
        "flops_profiler",
        "timers",
        "checkpoint",
    ],
    "train": [
        "output_dir",
        "run_name",
        "logging_steps",
        "logging_first_step",
        "eval_on_start",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_async",
        "save_deepspeed_files",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "resume_from_checkpoint",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "disable_tqdm",
        "profile",
        "profile_steps",
        "diagnostics",
        "sample_prompts",
        "sample_max_new_tokens",
        "sample_predictions",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "export",
        "export_dir",
        "per_device_eval_batch_size",
    ],
}


_ADDED: dict[str, dict[str, Any]] = {
    "scpl": {
        "method": "scpl",
        "freeze_stages": 0,
        "polish": 0.0,
        "lookahead": 0,
        "head_lr": 1.0,
        "local_lr": 1.0,
    },
    "train": {"group_by_length": False},
    "data": {
        "packing": False,
        "completion_only": True,
        "streaming": False,
        "shuffle_buffer": 10_000,
    },
}
"""Keys that older recipes do not have, and what they mean then."""


def fingerprint_of(recipe: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> str:
    """sha256 over a recipe as plain data.

    Args:
        recipe: ``Recipe.to_mapping()``.
        deepspeed: Its ``deepspeed`` section with every ``"auto"`` and ``train`` value filled in.
    """
    parts = what_counts({**recipe, "deepspeed": deepspeed})
    parts["scpl"]["objective"] = _as_computed(parts["scpl"]["objective"])
    for fill in FILLS.values():
        for key in fill.train_keys:  # already in parts["deepspeed"]
            parts["train"].pop(key, None)
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def what_counts(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Of some sections of a recipe as plain data the keys that the trained numbers depend on, but
    for those that only say what older recipes left unsaid."""
    parts: dict[str, Any] = {}
    for name, section in recipe.items():
        if name == "trackers":
            continue
        left_out, unsaid = _NOT_IN_FINGERPRINT.get(name, ()), _ADDED.get(name, {})
        parts[name] = {
            key: value
            for key, value in section.items()
            if key not in left_out and (key not in unsaid or value != unsaid[key])
        }
    return parts


def _as_computed(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Without how many pieces the same objective is computed in."""
    kept = {key: value for key, value in objective.items() if key != "chunk_size"}
    if "parts" in kept:
        kept["parts"] = [_as_computed(part) for part in kept["parts"]]
    return kept
