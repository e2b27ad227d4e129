"""The model's config as this run needs it: number of labels, label names, padding token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import one_line

log = logging.getLogger(__name__)

SINGLE_LABEL = "single_label_classification"
"""``config.problem_type`` of what is trained here: cross-entropy over one class a sample."""


def load_config(
    name_or_path: str,
    *,
    revision: str | None = None,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    pad_token_id: int | None = None,
) -> PretrainedConfig:
    """The config of a hub name or folder, with what the data and the tokenizer say put in.

    Args:
        name_or_path: As ``from_pretrained`` takes it.
        revision: Branch, tag or commit on the hub.
        num_labels: Classes of the head, and cross-entropy over them whatever loss the checkpoint
            was trained with; None leaves both as the config has them.
        label_names: Class id -> name; ids beyond them are called ``LABEL_<id>``.
        pad_token_id: The tokenizer's; None leaves the config's. Classifiers that look for the last
            token need it.

    Raises:
        PartitionError: There is no config, or it cannot be read.
    """
    try:
        config = AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=False
        )
    # transformers raises OSError, ValueError or KeyError, depending on what is missing or broken.
    except Exception as error:
        raise PartitionError(
            f"model.name_or_path: '{name_or_path}' gives no model config ({one_line(error)}). "
            "Name a hub model, a folder with config.json, or an embedded one (`demo`, `demo-lm`). "
            "Without a network, download the model first and set HF_HUB_OFFLINE=1."
        ) from error
    if num_labels is not None:
        _train_on_classes(config, name_or_path)
    if num_labels is not None and num_labels != config.num_labels:
        config.num_labels = num_labels
    if num_labels is not None and label_names:
        unused = (f"LABEL_{k}" for k in range(len(label_names), num_labels))
        names = [*label_names, *unused][:num_labels]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    if pad_token_id is not None:
        config.get_text_config().pad_token_id = pad_token_id
    return config


def check_problem_type(config: PretrainedConfig) -> None:
    """Refuse a model object whose own loss is not cross-entropy over classes.

    Raises:
        PartitionError: Its ``problem_type`` is regression or multi-label classification.
    """
    kind = getattr(config, "problem_type", None)
    if kind not in (None, SINGLE_LABEL):
        raise PartitionError(
            f"model.config.problem_type is '{kind}', but the stages' losses need one class a "
            f'sample. Set model.config.problem_type = "{SINGLE_LABEL}" if the labels are class ids '
            "(int64 from 0); other tasks cannot be trained."
        )


def _train_on_classes(config: PretrainedConfig, name: str) -> None:
    before = getattr(config, "problem_type", None)
    if before not in (None, SINGLE_LABEL):
        log.info(  # on all ranks alike: INFO is what rank 0 alone shows
            "'%s' was trained for %s; here its head is trained with cross-entropy over classes.",
            name, before,
        )  # fmt: skip
    config.problem_type = SINGLE_LABEL


def refuse_encoder(config: PretrainedConfig, name_or_path: str) -> None:
    """Refuse to train as a language model what sees the tokens it is to predict.

    Raises:
        PartitionError: The architecture has a masked-language-model head too, and its config does
            not say ``is_decoder``, without which it attends in both directions.
    """
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes:
        raise PartitionError(
            f"model.task: causal-lm: '{name_or_path}' ('{config.model_type}') reads a text in both "
            "directions, so every position would see the token it is to predict. Use a decoder "
            "(GPT-2, Llama, Qwen, ...), model.task: sequence-classification, or a config with "
            "is_decoder: true."
        )


def generation_config(name_or_path: str, *, revision: str | None = None) -> GenerationConfig | None:
    """How the model generates (tokens that end a text among it), where its folder says so.

    Some models have stop tokens there that their config does not name.
    """
    try:
        more: dict[str, Any] = {} if revision is None else {"revision": revision}
        return GenerationConfig.from_pretrained(name_or_path, **more)
    except OSError:
        return None
