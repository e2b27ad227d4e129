"""Fine-tune Hugging Face transformers in pipeline stages that never wait for a backward pass."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scpl_ds.build import PipelineModule, initialize
    from scpl_ds.early_exit import EarlyExitModel
    from scpl_ds.engine import Engine
    from scpl_ds.partition.layer_list import LayerSpec, TiedLayerSpec
    from scpl_ds.recipe import Recipe, load_recipe
    from scpl_ds.trainer import fit
    from scpl_ds.trainer_hf import Trainer

__version__ = "0.1.0"

_HOME = {
    "EarlyExitModel": "scpl_ds.early_exit",
    "Engine": "scpl_ds.engine",
    "LayerSpec": "scpl_ds.partition.layer_list",
    "PipelineModule": "scpl_ds.build",
    "Recipe": "scpl_ds.recipe",
    "TiedLayerSpec": "scpl_ds.partition.layer_list",
    "Trainer": "scpl_ds.trainer_hf",
    "fit": "scpl_ds.trainer",
    "initialize": "scpl_ds.build",
    "load_recipe": "scpl_ds.recipe",
}

__all__ = [
    "EarlyExitModel",
    "Engine",
    "LayerSpec",
    "PipelineModule",
    "Recipe",
    "TiedLayerSpec",
    "Trainer",
    "__version__",
    "fit",
    "initialize",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: ``import scpl_ds`` alone costs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'scpl_ds' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
