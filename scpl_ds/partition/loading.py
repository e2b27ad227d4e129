"""Reading one stage's tensors from a Hugging Face checkpoint, and naming them as in one again.

``from_pretrained`` sees a class whose constructor also takes away what other stages own. It then
asks the files for what is left, so shards, dtypes, renamed keys, fused experts, ties and the
drawing of a missing head all stay Hugging Face's work, and only this stage's bytes are read.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import model_class, one_line, quiet_transformers, skeleton
from scpl_ds.partition._trace import Anatomy
from scpl_ds.partition.lora import Adapters, adapt
from scpl_ds.partition.stage_module import (
    Relay,
    StageModule,
    check_span,
    drop_partners,
    prune,
    stage_from_model,
    warn_untied,
)

__all__ = ["export_state_dict", "load_stage", "stage_from_model", "tied_weights"]

log = logging.getLogger(__name__)


def load_stage(
    path: str | Path,
    task: str,
    anatomy: Anatomy,
    start: int,
    end: int,
    *,
    config: PretrainedConfig,
    dtype: torch.dtype | None = None,
    seed: int,
    adapters: Adapters | None = None,
    only_read: bool = False,
    replaced: bool = False,
    **from_pretrained_kwargs: Any,
) -> StageModule:
    """Layers ``[start, end)`` of a checkpoint as a stage, in eval mode, reading only their tensors.

    Tensors are private: two stages in one process share nothing. On CPU they are mapped from the
    file and take memory when first touched. A tie that crosses stages is broken into two copies,
    the config's ``tie_word_embeddings`` becomes False and one warning says so. A head that the
    checkpoint lacks is drawn under ``seed``, without touching the caller's random state, and is
    equal to the bit whatever the number of stages.

    Args:
        path: A folder or hub name, as ``from_pretrained`` takes it.
        task: ``sequence-classification`` or ``causal-lm``.
        anatomy: Of the same config and task.
        start: First layer of the stage.
        end: One past its last layer.
        config: The model's config (``num_labels`` set); not changed.
        dtype: Of the weights; None keeps the checkpoint's, and so does ``adapters.base_dtype``,
            which then is made of it.
        seed: Torch seed for weights that the checkpoint does not have.
        adapters: Trained in the place of the layers' weights, which then stay one in a tie.
        only_read: It is not trained, so a tie that it breaks is nothing to warn of.
        replaced: Its weights are going to be those of a checkpoint of a run, so what is drawn here
            is nothing to tell of.
        **from_pretrained_kwargs: Passed on (``attn_implementation``, ``revision``, ``token`` ...).

    Raises:
        PartitionError: There is no checkpoint at ``path``, it lacks tensors other than the
            epilogue's, or its shapes are not the config's.
    """
    check_span(anatomy, start, end)
    base_class = model_class(config, task)
    relay = Relay()

    class Pruned(base_class):  # type: ignore[misc, valid-type]
        def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)  # on the meta device, inside from_pretrained
            prune(self, anatomy, start, end, relay)

    for attribute in ("__name__", "__qualname__", "__module__"):  # HF looks things up by them
        setattr(Pruned, attribute, getattr(base_class, attribute))
    if dtype is not None and (adapters is None or adapters.base_dtype is None):
        from_pretrained_kwargs["dtype"] = dtype
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            loaded: Any = Pruned.from_pretrained(
                str(path),
                config=config,
                output_loading_info=True,
                # So that the shapes are reported; any of them is refused below.
                ignore_mismatched_sizes=True,
                **from_pretrained_kwargs,
            )
        except OSError as error:
            raise PartitionError(
                f"no checkpoint for layers [{start}, {end}) at '{path}': {one_line(error)}. "
                "Set model.name_or_path to a folder or hub name with config.json and weights."
            ) from error
        # Not narrower: what is damaged, or no tensor and refused, is said in a dozen classes.
        except Exception as error:
            raise PartitionError(
                f"the checkpoint '{path}' cannot be read as '{anatomy.model_type}': "
                f"{one_line(error)}. Set model.name_or_path to a checkpoint of this architecture."
            ) from error
    model, info = loaded
    model.__class__ = base_class
    _refuse_mismatched(path, anatomy, info["mismatched_keys"])
    drawn = _drawn(path, anatomy, start, end, model, set(info["missing_keys"]))
    drop_partners(model, anatomy, start, end)
    if drawn and not (only_read or replaced):
        log.info("'%s' has no %s: drawn from the seed.", path, ", ".join(drawn))
    if adapters is None and not only_read:
        warn_untied(anatomy, start, end)
    if adapters is not None:
        adapt(model, anatomy, adapters, drawn)
    return StageModule(model, anatomy, start, end, relay)


def export_state_dict(
    config: PretrainedConfig, task: str, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """In-memory Hugging Face names -> the names and layouts that a checkpoint file has.

    Works on any part of a model that holds whole layers, so each stage can export its own; the
    parts never collide. Tensors that share memory are copied, as safetensors asks.

    Args:
        config: The model's config.
        task: ``sequence-classification`` or ``causal-lm``.
        tensors: By in-memory names, as :meth:`StageModule.hf_state_dict` gives them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = skeleton(config, task)
    renamed = revert_weight_conversion(model, {k: t.detach() for k, t in tensors.items()})
    seen: set[int] = set()
    exported: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        exported[name] = tensor.contiguous().clone() if shared else tensor.contiguous()
    return exported


def tied_weights(config: PretrainedConfig, task: str) -> dict[str, str]:
    """Tied parameter -> the one it is tied to, in the whole model that ``config`` describes."""
    return dict(getattr(skeleton(config, task), "all_tied_weights_keys", None) or {})


def _drawn(
    path: str | Path,
    anatomy: Anatomy,
    start: int,
    end: int,
    model: PreTrainedModel,
    missing: set[str],
) -> list[str]:
    """What of the head the checkpoint lacks; refuses that it lacks anything else."""
    owned = {name for name in model.state_dict() if anatomy.owns(name, start, end)}
    heads = sorted(n for n in missing & owned if anatomy.section(n) == "epilogue")
    lost = sorted((missing & owned) - set(heads))
    if lost:
        raise PartitionError(
            f"the checkpoint '{path}' lacks {len(lost)} of the {len(owned)} tensors of layers "
            f"[{start}, {end}) of '{anatomy.model_type}' ({', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}): it belongs to another model, or is incomplete. "
            "Set model.name_or_path to a checkpoint of this architecture."
        )
    return heads


def _refuse_mismatched(path: str | Path, anatomy: Anatomy, keys: Iterable[Sequence[Any]]) -> None:
    wrong = sorted((str(name), list(found), list(asked)) for name, found, asked in keys)
    if not wrong:
        return
    listed = ", ".join(f"{n} is {found}, not {asked}" for n, found, asked in wrong[:3])
    if all(anatomy.section(name) == "epilogue" for name, _, _ in wrong):
        advice = "Set model.num_labels to what it has, or take a checkpoint without a head."
    else:
        advice = "Its config.json does not belong to its weights; download or convert it again."
    raise PartitionError(
        f"the checkpoint '{path}' does not fit '{anatomy.model_type}' as configured, in "
        f"{len(wrong)} tensor(s): {listed}{', ...' if len(wrong) > 3 else ''}. {advice}"
    )
