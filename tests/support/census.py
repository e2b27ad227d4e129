"""Every model type that transformers has for a task: is a chain of two or three stages equal to it?

python -m tests.support.census > docs/census.md
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import datetime
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CONFIG_MAPPING, PretrainedConfig

from scpl_ds.errors import PartitionError
from scpl_ds.partition._hf import no_init_weights
from scpl_ds.partition.anatomy import anatomy_of, auto_class, model_class
from scpl_ds.partition.plan import make_plan
from scpl_ds.partition.stage_module import stage_from_model
from tests.support.models import PAD, VOCABULARY, batch, build

TASKS = ("causal-lm", "sequence-classification")
_LAYERS = 4
_LIMIT_PARAMETERS = 20_000_000
_LIMIT_SECONDS = 60
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64,
    "embedding_size": 64, "emb_dim": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "hidden_dim": 96,
    "intermediate_size": 96, "ffn_hidden_size": 96, "d_ff": 96, "n_inner": 96, "d_inner": 96,
    "feed_forward_proj": "gelu", "shared_expert_intermediate_size": 32, "moe_intermediate_size": 32,
    "num_hidden_layers": _LAYERS, "n_layer": _LAYERS, "n_layers": _LAYERS, "num_layers": _LAYERS,
    "encoder_layers": _LAYERS, "decoder_layers": _LAYERS, "decoder_ffn_dim": 96,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads":
    4, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 16, "d_kv": 16, "rotary_dim": 8, "max_position_embeddings": 256,
    "n_positions": 256, "n_ctx": 256, "num_experts": 4, "num_local_experts": 4, "n_routed_experts":
    4, "n_group": 1, "num_experts_per_tok": 2, "topk_group": 1, "moe_num_experts": 4, "moe_topk": 2,
    "moe_k": 2, "sliding_window": 8, "local_attention": 8, "attention_window": 8, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "type_vocab_size": 2, "num_buckets": 16, "state_size": 8, "mamba_n_heads": 8, "mamba_d_head":
    16, "mamba_d_state": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8,
    "num_query_groups": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD,
    "is_decoder": True, "add_cross_attention": False, "mlp_only_layers": [],
    "first_k_dense_replace": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """``status`` is equal, different, refused, failed (loudly, in a stage) or not built."""

    model_type: str
    task: str
    status: str
    reason: str = ""


def model_types(task: str) -> list[str]:
    """The model types in transformers' mapping of this task."""
    mapping = auto_class(task)._model_mapping
    return sorted(t for t, config in CONFIG_MAPPING.items() if config in mapping)


_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "num_kv_heads": 4, "moe_num_experts_per_tok": 2},
    {"num_key_value_heads": None, "head_dim": None, "layer_types": None},
    {"num_heads": 8, "head_dim": 16, "num_experts_per_tok": 1, "num_key_value_heads": 4},
    {"layer_types": None, "num_hidden_layers": None, "num_key_value_heads": 4},
    {"num_key_value_heads": 4, "head_dim": None, "intermediate_size": 128, "d_kv": None},
)


def tiny_config(model_type: str, task: str, variant: int = 0) -> PretrainedConfig:
    """A config of 4 small layers, made by shrinking the default one by the names of its fields."""
    defaults = CONFIG_MAPPING[model_type]()
    options = _shrunk(defaults, task)
    for name, value in _VARIANTS[variant].items():
        if value is None:
            options.pop(name, None)
        elif name in options:
            options[name] = value
    config = CONFIG_MAPPING[model_type](**options)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)
        part.pad_token_id = PAD
    return config


def _shrunk(defaults: PretrainedConfig, task: str) -> dict[str, Any]:
    known = defaults.to_dict()
    names = set(known) | set(getattr(defaults, "attribute_map", {}))
    options = {name: value for name, value in _SMALL.items() if name in names}
    if task != "causal-lm":
        options.pop("is_decoder", None)
    kinds = known.get("layer_types")
    if isinstance(kinds, list) and kinds:
        different = list(dict.fromkeys(kinds))
        options["layer_types"] = (different * _LAYERS)[:_LAYERS]
    for key in defaults.sub_configs:
        part = getattr(defaults, key, None)
        if isinstance(part, PretrainedConfig):
            options[key] = _shrunk(part, task)
    return options


def check(model_type: str, task: str) -> Outcome:
    """Build a tiny random model, cut it into 2 and 3 stages, compare logits and loss bit by bit."""
    first = None
    for variant in range(len(_VARIANTS)):
        outcome = _check(model_type, task, variant)
        first = first or outcome
        if outcome.status != "not built":
            return outcome
    assert first is not None
    return first


def _check(model_type: str, task: str, variant: int) -> Outcome:

    def outcome(status: str, error: object = "") -> Outcome:
        reason = " ".join(str(error).split())
        if isinstance(error, Exception) and not isinstance(error, PartitionError):
            reason = f"{type(error).__name__}: {reason}"
        return Outcome(model_type, task, status, reason[:240])

    try:
        config = tiny_config(model_type, task, variant)
        model_class(config, task)
    except PartitionError as error:
        return outcome("refused", error)
    except Exception as error:
        return outcome("not built", error)
    try:
        with FakeTensorMode(), no_init_weights():
            size = sum(
                p.numel() for p in model_class(config, task)(copy.deepcopy(config)).parameters()
            )
        if size > _LIMIT_PARAMETERS:
            return outcome("not built", f"the shrinker leaves {size / 1e6:.0f} M parameters")
        model = build(copy.deepcopy(config), task)
        batches = [batch(task, padding) for padding in ("none", "left", "right")]
        with torch.no_grad():
            wholes = [model(**inputs) for inputs in batches]
        if any(not torch.isfinite(w.logits).all() or w.loss is None for w in wholes[:1]):
            return outcome(
                "not built", "the tiny model's own logits are not finite, or it has no loss"
            )
    except Exception as error:
        return outcome("not built", error)
    try:
        anatomy = anatomy_of(config, task)
    except PartitionError as error:
        return outcome("refused", error)
    except Exception as error:
        return outcome("failed", error)
    try:
        for num_stages in range(2, min(3, anatomy.num_layers) + 1):
            plan = make_plan(anatomy, num_stages, "uniform")
            stages = [stage_from_model(model, anatomy, *plan.span(k)) for k in range(num_stages)]
            for inputs, whole in zip(batches, wholes, strict=True):
                hidden, output = None, None
                with torch.no_grad():
                    for stage in stages:
                        output = stage(inputs, hidden)
                        hidden = output.hidden_states
                assert output is not None
                assert output.logits is not None and output.loss is not None
                same = torch.equal(output.logits.nan_to_num(), whole.logits.nan_to_num())
                if not (same and torch.equal(output.loss.nan_to_num(), whole.loss.nan_to_num())):
                    gap = (output.logits - whole.logits).abs().max().item()
                    again = model(**inputs).logits
                    if not torch.equal(again.nan_to_num(), whole.logits.nan_to_num()):
                        return outcome(
                            "not built", "the whole model differs from itself when run twice"
                        )
                    return outcome("different", f"{num_stages} stages: logits differ by {gap:.3g}")
    except Exception as error:
        return outcome("failed", error)
    return outcome("equal")


def census(*, progress: bool = False) -> list[Outcome]:
    """Every model type of both tasks."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    outcomes = []
    for task in TASKS:
        for model_type in model_types(task):
            with _time_limit(_LIMIT_SECONDS) as limit:
                outcome = check(model_type, task)
            if limit.hit:
                outcome = Outcome(model_type, task, "not built", f"took over {_LIMIT_SECONDS} s")
            outcomes.append(outcome)
            if progress:
                print(outcome, file=sys.stderr, flush=True)
    return outcomes


class _Limit:
    hit = False


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[_Limit]:
    limit = _Limit()

    def stop(*_: Any) -> None:
        limit.hit = True
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield limit
    except TimeoutError:
        pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def render(outcomes: list[Outcome]) -> str:
    """The census as a Markdown page."""
    lines = [
        "# Census of architectures",
        "",
        f"Made on {datetime.date.today()} with transformers {transformers.__version__} and torch "
        f"{torch.__version__} on CPU by `python -m tests.support.census > docs/census.md`: a tiny "
        "random model of every model type, fp32, eval mode, 2 and 3 stages, no / left / right "
        "padding, logits and loss compared bit by bit with the whole model.",
        "",
        "- **equal**: bit-equal in every case. **different**: a bug; there must be none.",
        "- **refused**: `scpl_ds` says why, before anything is trained.",
        "- **failed**: a loud error inside transformers when a stage runs.",
        "- **not built**: the census could not make a working tiny model by shrinking the default "
        "config. No evidence either way: try `scpl-ds plan` on yours.",
        "",
        "| task | " + " | ".join(_STATUSES) + " | all |",
        "|---|" + "---|" * (len(_STATUSES) + 1),
    ]
    for task in TASKS:
        counts = collections.Counter(o.status for o in outcomes if o.task == task)
        cells = [str(counts[s]) for s in _STATUSES]
        lines.append(f"| {task} | {' | '.join(cells)} | {sum(counts.values())} |")
    for task in TASKS:
        mine = [o for o in outcomes if o.task == task]
        equal = ", ".join(f"`{o.model_type}`" for o in mine if o.status == "equal")
        lines += [
            "",
            f"## {task}",
            "",
            f"Equal: {equal}.",
            "",
            "| model type | | why |",
            "|---|---|---|",
        ]
        rest = sorted(
            (o for o in mine if o.status != "equal"), key=lambda o: (o.status, o.model_type)
        )
        for o in rest:
            reason = o.reason.replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| `{o.model_type}` | {o.status} | {reason} |")
    return "\n".join(lines)


_STATUSES = ("equal", "different", "refused", "failed", "not built")


if __name__ == "__main__":
    print(render(census(progress=True)))
