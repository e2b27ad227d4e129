"""The model card of an export: what is known of how it was made, and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from scpl_ds.checkpoint import write_text
from scpl_ds.ds_config import DeepSpeedSection
from scpl_ds.partition._hf import auto_class
from scpl_ds.recipe_fields import MADE_BY_A_SCRIPT
from scpl_ds.recipe_words import ONE_STAGE, method_in_words

CARD = "README.md"
_HOME = "https://arxiv.org/abs/2602.00062"
_PIPELINES = {"sequence-classification": "text-classification", "causal-lm": "text-generation"}
_EMBEDDED = {
    "demo": "sentence-transformers/all-MiniLM-L6-v2",
    "demo-lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Where the embedded models are from (``data/demo.py``, ``data/demo_lm.py``)."""
_RULES = {
    "scpl": "Each stage learned from a loss of its own; no gradient travelled between stages.",
    "bp": "Trained end to end by backpropagation through all stages.",
    "joint": (
        "Trained end to end by backpropagation of the sum of all stages' objectives and the task "
        "loss."
    ),
}
_ONE_STAGE = "One stage has nothing to learn on its own: this is backpropagation, as usual."
_POLISHED = "The last part of the steps ({:g} of them) was trained end to end through all stages."
_SCORES = {"eval_accuracy": "accuracy", "eval_perplexity": "perplexity"}


def write_card(
    out: Path, manifest: Mapping[str, Any], task: str, result: Mapping[str, Any] | None = None
) -> None:
    """Write ``out/README.md``.

    Args:
        out: The export.
        manifest: Of the checkpoint that it was made of. One of ``engine.save_checkpoint`` holds no
            recipe, so its card says little.
        task: As in the recipe.
        result: What the run's ``result.json`` holds, if its scores are of this export.
    """
    card = _Card(out, manifest, task, result or {})
    text = f"---\n{card.data().to_yaml()}\n---\n\n{card.body()}"
    write_text(out / CARD, str(ModelCard(text)))


class _Card:
    def __init__(
        self, out: Path, manifest: Mapping[str, Any], task: str, result: Mapping[str, Any]
    ) -> None:
        self._state: Mapping[str, Any] = manifest["client_state"]
        recipe = self._state.get("recipe")
        self._recipe: Mapping[str, Any] = recipe if isinstance(recipe, dict) else {}
        self._manifest, self._task, self._result = manifest, task, result
        self._adapter = (out / "adapter_config.json").is_file()
        self._heads = (out / "scpl_heads.json").is_file()

    def data(self) -> ModelCardData:
        """The front matter. Language and licence are the author's to say."""
        hub_data = self._hub_dataset()
        return ModelCardData(
            library_name="peft" if self._adapter else "transformers",
            pipeline_tag=_PIPELINES[self._task],
            base_model=self._base(),
            datasets=None if hub_data is None else [hub_data],
            tags=["scpl", "scpl-ds", "local-learning", *(["lora"] if self._adapter else [])],
            model_name=self._name() if self._evaluated() else None,
            eval_results=self._evaluated() or None,
        )

    def body(self) -> str:
        parts = [f"# {self._name()}\n\n{self._what()}"]
        for title, text in (
            ("Scores", self._scores()),
            ("Stages", self._stages()),
            ("Training", self._training()),
            ("Use", self._use()),
            ("Limits", self._limits()),
            ("Versions", self._versions()),
        ):
            parts += [f"## {title}\n\n{text}"] if text else []
        return "\n\n".join(parts) + "\n"

    # -- what is known ---------------------------------------------------------------------

    def _of(self, section: str, *keys: str) -> Any:
        found: Any = self._recipe.get(section)
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def _name(self) -> str:
        folder = self._of("train", "output_dir")
        return str(self._of("train", "run_name") or (folder and Path(folder).name) or "model")

    def _base(self) -> str | None:
        """On the hub; the recipe has folders by their absolute paths."""
        name = self._of("model", "name_or_path")
        if not isinstance(name, str) or Path(name).is_absolute() or name == MADE_BY_A_SCRIPT:
            return None
        return _EMBEDDED.get(name, name)

    def _hub_dataset(self) -> str | None:
        name = self._of("data", "dataset") if self._of("data", "name") == "hf" else None
        return name if isinstance(name, str) and not Path(name).is_absolute() else None

    def _dataset(self) -> tuple[str, str, str | None] | None:
        """Type, name and split of what was scored, in the words of a model index."""
        source = self._of("data", "name")
        if not isinstance(source, str):
            return None
        if source == "hf":
            name = self._hub_dataset() or Path(str(self._of("data", "dataset"))).name
            config, split = self._of("data", "config"), self._of("data", "eval_split")
            return name, f"{name} ({config})" if config else name, split
        file = self._of("data", "eval_file")
        if isinstance(file, str):
            return source, Path(file).name, None
        if source == "demo":
            return source, "the demo of scpl_ds: sentiment of Hutto & Gilbert (2014)", None
        fraction = self._of("data", "eval_fraction")
        held_out = f", {fraction:g} of it held out" if isinstance(fraction, float) else ""
        train = self._of("data", "train_file")
        return source, (Path(train).name if isinstance(train, str) else source) + held_out, None

    def _evaluated(self) -> list[EvalResult]:
        found = self._dataset()
        if found is None:
            return []
        kind, name, split = found
        return [
            EvalResult(
                task_type=_PIPELINES[self._task],
                dataset_type=kind,
                dataset_name=name,
                dataset_split=split,
                dataset_config=self._of("data", "config") if self._hub_dataset() else None,
                metric_type=metric,
                metric_value=round(self._result[key], 6),
            )
            for key, metric in _SCORES.items()
            if isinstance(self._result.get(key), float)
        ]

    # -- in words --------------------------------------------------------------------------

    def _what(self) -> str:
        base = self._base()
        source = "fine-tuned from a local model"
        if base:
            source = f"fine-tuned from [`{base}`](https://huggingface.co/{base})"
        elif self._of("model", "name_or_path") == MADE_BY_A_SCRIPT:
            source = "trained from weights that a script made, with no base model on record,"
        what = "A LoRA adapter" if self._adapter else "A model"
        task = _PIPELINES[self._task].replace("-", " ")
        if not self._recipe:
            return f"{what} for {task}, written by scpl_ds from a checkpoint without a recipe."
        count = len(self._manifest["bounds"]) - 1
        return (
            f"{what} for {task}, {source} with scpl_ds in {count} pipeline "
            f"stage{'s' if count > 1 else ''}. {self._rule()}".rstrip()
        )

    def _rule(self) -> str:
        if self._method() == ONE_STAGE:
            return _ONE_STAGE
        rule, polish = _RULES.get(str(self._of("scpl", "method")), ""), self._of("scpl", "polish")
        return (
            f"{rule} {_POLISHED.format(polish)}" if isinstance(polish, float) and polish else rule
        )

    def _method(self) -> str:
        scpl = self._of("scpl")
        return method_in_words(scpl) if isinstance(scpl, Mapping) else ""

    def _scores(self) -> str:
        found = self._dataset()
        rows = [[m, f"{self._result[k]:.4g}"] for k, m in _SCORES.items() if self._known(k)]
        if not rows:
            return ""
        if self._known("majority_accuracy"):
            majority = f"{self._result['majority_accuracy']:.4g}"
            rows.append(["accuracy of always answering the most frequent class", majority])
        samples = self._result.get("eval_samples")
        where = "" if found is None else f" on {found[1]}"
        where += f", split `{found[2]}`" if found is not None and found[2] else ""
        count = f", {samples} samples" if isinstance(samples, int) else ""
        lead = f"Of this export, loaded with transformers{where}{count}:"
        return f"{lead}\n\n{_table(['', 'value'], rows)}"

    def _known(self, key: str) -> bool:
        return isinstance(self._result.get(key), float)

    def _stages(self) -> str:
        bounds, rows = self._manifest["bounds"], self._state.get("partition")
        if isinstance(rows, list) and len(rows) == len(bounds) - 1:
            cells = [
                [r["stage"], r["layers"], f"{r['parameters']:,}", f"{r['flops_share']:.1%}"]
                for r in rows
            ]
            return _table(["stage", "layers", "parameters", "share of the forward FLOPs"], cells)
        spans = enumerate(itertools.pairwise(bounds))
        return _table(["stage", "layers"], [[k, f"{a}-{b - 1}"] for k, (a, b) in spans])

    def _training(self) -> str:
        if not self._recipe:
            return ""
        objective = self._of("scpl", "objective")
        named = objective if isinstance(objective, dict) else {}
        parts = [p.get("name") for p in named.get("parts", ()) if isinstance(p, dict)]
        if self._method().startswith("backpropagation"):
            named, parts = {}, []
        facts: dict[str, Any] = {
            "method": self._method(),
            "local objective": " + ".join(map(str, parts)) or named.get("name"),
            "its temperature": named.get("temperature"),
            "last stage's features detached": self._of("scpl", "head", "detach_features"),
            "stages frozen": self._of("scpl", "freeze_stages") or None,
            "last part trained end to end": self._of("scpl", "polish") or None,
            "lookahead": self._of("scpl", "lookahead") or None,
            "optimizer steps": self._manifest["step"],
            "data-parallel ranks": self._state.get("data_parallel"),
            "LR schedule": self._of("train", "lr_scheduler_type"),
            **self._optimization(),
            "sharding": self._of("scpl", "sharding"),
            "longest text, tokens": self._of("data", "max_length"),
            "seed": self._of("train", "seed"),
            "LoRA rank, alpha": self._lora(),
        }
        rows = [[name, f"`{value}`"] for name, value in facts.items() if value not in (None, "")]
        return _table(["setting", "value"], rows)

    def _optimization(self) -> dict[str, Any]:
        """Empty where the checkpoint knows no more of its recipe than what its stages are."""
        section, train = self._recipe.get("deepspeed"), self._recipe.get("train")
        if not (isinstance(section, dict) and isinstance(train, dict)):
            return {}
        config = DeepSpeedSection(section, train)
        return {
            "micro-batch size": config.micro_batch_size,
            "gradient accumulation": config.filled.get("gradient_accumulation_steps"),
            "optimizer": config.filled["optimizer"]["type"],
            "learning rate": config.lr,
            "precision": config.precision,
            "autocast": config.autocast,
        }

    def _lora(self) -> str | None:
        found = self._of("model", "lora")
        return f"{found.get('r')}, {found.get('alpha')}" if isinstance(found, Mapping) else None

    def _use(self) -> str:
        auto = auto_class(self._task).__name__
        if self._adapter:
            # A classifier's base has no head of that width without the adapter's own config.
            code = (
                f"import torch\nfrom peft import PeftConfig, PeftModel\n"
                f"from transformers import AutoConfig, {auto}, AutoTokenizer\n\n"
                'folder = "."  # this folder, or its name on the hub\n'
                "base = PeftConfig.from_pretrained(folder).base_model_name_or_path\n"
                "config = AutoConfig.from_pretrained(folder)\n"
                f"model = {auto}.from_pretrained(base, config=config, dtype=torch.float32)\n"
                "model = PeftModel.from_pretrained(model, folder)\n"
                "tokenizer = AutoTokenizer.from_pretrained(folder)"
            )
        else:
            code = (
                f"from transformers import {auto}, AutoTokenizer\n\n"
                'folder = "."  # this folder, or its name on the hub\n'
                f"model = {auto}.from_pretrained(folder)\n"
                "tokenizer = AutoTokenizer.from_pretrained(folder)"
            )
        heads = (
            "\n\n`scpl_heads.safetensors` holds the local heads of the stages, which transformers "
            "does not read: with `scpl_ds.EarlyExitModel` samples may leave at them."
        )
        return f"```python\n{code}\n```{heads if self._heads else ''}"

    def _limits(self) -> str:
        if self._of("scpl", "method") != "scpl" or len(self._manifest["bounds"]) < 3:
            return ""
        return (
            "Local losses are a training rule of their own, not backpropagation: the same data and "
            f"steps give other weights, and may give other scores. See [SCPL]({_HOME})."
        )

    def _versions(self) -> str:
        found = self._state.get("versions")
        if not isinstance(found, Mapping):
            return ""
        return "\n".join(f"- {name} {version}" for name, version in found.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
