"""Whether a model keeps documents apart that are packed into one row, found by trying.

transformers builds the mask between packed documents from ``position_ids``, in those architectures
that hand them to it. Others take ``position_ids`` and let the documents see each other without a
word, and a recurrent layer carries its state over. So a tiny random model of the same class is run:
what is said in the first document must not change the logits of the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from scpl_ds.partition._hf import (
    model_class,
    no_init_weights,
    one_line,
    quiet_transformers,
    skeleton,
    use_cache_off,
)

_MOST_LAYERS = 8
_MOST_PARAMETERS = 40_000_000
_VOCABULARY = 64
_WIDTHS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 64),
    "word_embed_proj_dim": 64,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "decoder_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 2, "num_kv_heads": 2,
    "rotary_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "hidden_size_per_layer_input": 16,
}  # fmt: skip
_FEEDS: dict[str, Any] = {
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("d_ff", "n_inner", "d_inner", "hidden_dim", "block_ff_dim"), 96),
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "num_kv_shared_layers": 0,
    "n_group": 1, "topk_group": 1, "vocab_size": _VOCABULARY, "vocab_size_per_layer_input":
    _VOCABULARY,
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_VARIANTS: tuple[dict[str, Any], ...] = (
    {**_WIDTHS, **_FEEDS},
    {**_WIDTHS, **_FEEDS, "num_key_value_heads": 4, "num_kv_heads": 4},
    {**_WIDTHS, **_FEEDS, "num_key_value_heads": 4, "num_kv_heads": 4, "rope_parameters": None},
    _FEEDS,  # the widths as they are: what hangs on them fits
    {"vocab_size": _VOCABULARY},
)
_WATCHED = "scpl_ds_watched"
_FIRST, _SECOND = 5, 6
"""Tokens of the two documents."""


class Apart(NamedTuple):
    """What was found."""

    apart: bool
    why: str
    """Where they are not: what was seen, or why nothing could be."""


def keeps_documents_apart(
    config: PretrainedConfig, *, attn_implementation: str | None = None
) -> Apart:
    """Try it on a tiny model of the config's class; takes less than a second.

    Args:
        config: Of a causal language model; not changed.
        attn_implementation: ``eager`` or ``sdpa``. FlashAttention, which needs a GPU, is tried as
            ``sdpa``, and must be handed the positions, from which it finds the documents; anything
            else is tried as transformers chooses.
    """
    flash = "flash" in (attn_implementation or "")
    chosen = attn_implementation if attn_implementation in ("eager", "sdpa") else None
    chosen = _WATCHED if flash else chosen
    problem, handed = "", _watched_attention()
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for small in _smaller(config):
            # A class refuses sizes that do not fit each other as it likes.
            try:
                model = _random(type(config).from_dict(small), chosen)
                logits = None if model is None else _logits(model)
            except Exception as error:
                problem = problem or f"{type(error).__name__}: {one_line(error)}"
                continue
            if logits is None:
                problem = problem or "a small one is not small"
            elif not bool(torch.isfinite(logits).all()):
                problem = problem or "its logits are not finite"
            elif not _differ(logits[0, _FIRST - 1], logits[2, _FIRST - 1]):
                problem = problem or "no token sees the ones before it"
            elif gap := _differ(logits[0, _FIRST:], logits[1, _FIRST:]):
                return Apart(
                    False,
                    f"other tokens in the first of two packed documents changed the logits of the "
                    f"second by {gap:.2g} of their size",
                )
            elif flash and not (handed and all(handed)):
                return Apart(False, "its attention is not handed the positions of its tokens")
            else:
                return Apart(True, "")
    return Apart(False, f"whether it keeps documents apart could not be tried: {problem}")


def _smaller(config: PretrainedConfig) -> Iterator[dict[str, Any]]:
    for sizes in _VARIANTS:
        yield _shrunk(config, sizes)


def _shrunk(config: PretrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """The config with the sizes it has, and its first layers, of each kind at least one."""
    known = config.to_dict()
    own = {name: known[name] for name in known if name not in config.sub_configs}
    kinds = own.get("layer_types") or ()
    whole = next((own[n] for n in _LAYERS if isinstance(own.get(n), int)), _MOST_LAYERS)
    seen = [place for place, kind in enumerate(kinds) if kind not in kinds[:place]]
    count = min(whole, max(2, seen[-1] + 1) if seen else _MOST_LAYERS)
    for name, value in own.items():
        if name in _LAYERS and isinstance(value, int):
            own[name] = count
        elif isinstance(value, list) and len(value) == whole > count:
            own[name] = value[:count]
        elif name == "per_layer_config" and isinstance(value, dict):
            own[name] = {place: part for place, part in value.items() if int(place) < count}
        elif name in sizes and (value is not None or name in ("head_dim", "num_key_value_heads")):
            own[name] = sizes[name]
            if isinstance(value, int) and sizes[name] is not None and "vocab" not in name:
                own[name] = min(value, sizes[name])
        elif "drop" in name and isinstance(value, float):
            own[name] = 0.0
        elif name.endswith("token_id"):
            own[name] = None if value is None and name != "pad_token_id" else 0
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            own[name] = _shrunk(part, sizes)
    return {name: value for name, value in own.items() if name != "quantization_config"}


def _random(config: PretrainedConfig, attention: str | None) -> Any:
    """The model in eval mode, with weights large enough to see what passes; None: too large."""
    size = sum(p.numel() for p in skeleton(config, "causal-lm").parameters())
    if size > _MOST_PARAMETERS:
        return None
    kwargs = {} if attention is None else {"attn_implementation": attention}
    with no_init_weights():
        cls = model_class(config, "causal-lm")
        model = cls._from_config(config, dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif parameter.dim() < 2:  # of a norm
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Two packed documents in three rows: as drawn, the first with other tokens, the first with
    another first token. [3, T, V]"""
    ids = torch.randint(3, _VOCABULARY - 1, (1, _FIRST + _SECOND)).repeat(3, 1)
    ids[1, :_FIRST] += 1
    ids[2, 0] += 1
    positions = torch.tensor([*range(_FIRST), *range(_SECOND)]).repeat(3, 1)
    return model(input_ids=ids, position_ids=positions, **use_cache_off(model)).logits.float()


def _watched_attention() -> list[bool]:
    """Make ``_WATCHED`` known to transformers: ``sdpa`` that notes of every call whether it was
    handed position_ids."""
    handed: list[bool] = []
    attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(*args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
        del softcap  # which sdpa does not know, and hides nobody
        handed.append(kwargs.get("position_ids") is not None)
        return attention(*args, **kwargs)

    AttentionInterface.register(_WATCHED, watched)
    AttentionMaskInterface.register(_WATCHED, sdpa_mask)
    return handed


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """By how much, as a part of their size; 0 where it is rounding."""
    gap = float((one - other).abs().max() / one.std().clamp_min(1e-12))
    return gap if gap > 1e-5 else 0.0
