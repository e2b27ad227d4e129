"""The sections of a recipe as frozen pydantic models; every field's docstring is its documentation.

``docs/recipe.md`` and ``recipes/recipe.schema.json`` are generated from this file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from scpl_ds.problems import Problem, nested, show
from scpl_ds.recipe_fields import (
    Count,
    Fraction,
    HomePath,
    Named,
    NameOrFolder,
    Number,
    Section,
    compile_backend,
    compile_mode,
    not_bool,
)
from scpl_ds.recipe_hub import HubKeys, own_keys_first


class DataChoice(Named):
    """Which texts and labels to train and evaluate on."""

    kind = "data"

    def create(self, **kwargs: Any) -> Any:
        """The data source, told the name it was asked for by: one class may serve several."""
        return super().create(name=self.name, **kwargs)


class TrackerChoice(Named):
    """One place that the run's metrics go to."""

    kind = "tracker"


def _target_modules(value: Any) -> Any:
    whole = isinstance(value, str) and value == "all-linear"
    names = isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value)
    if not (value is None or whole or names):
        raise ValueError(f"must be a list of names, or all-linear, got {show(value)}")
    return value


def _base_dtype(value: Any) -> Any:
    if value == "float32":
        raise ValueError("float32 is how they are held without the key; remove it")
    if value in ("float16", "fp16", "half"):
        raise ValueError(
            "float16 would round small and overflow large weights of bf16 checkpoints; "
            "use bfloat16, which takes as little"
        )
    return value


_NAMES_OF_PEFT = {"lora_alpha": "alpha", "lora_dropout": "dropout"}


def _add_names_of_peft(schema: dict[str, Any]) -> None:
    known = schema["properties"]
    known |= {theirs: known[ours] for theirs, ours in _NAMES_OF_PEFT.items()}


class LoraSection(Section):
    """Low-rank adapters of ``peft``, trained in the place of the layers' weights; defaults are
    those of its ``LoraConfig``, and its ``lora_alpha`` and ``lora_dropout`` may be written too."""

    model_config = pydantic.ConfigDict(json_schema_extra=_add_names_of_peft)

    r: Count = 8
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0), BeforeValidator(not_bool)] = 8.0
    """What an adapter adds is multiplied by ``alpha / r``."""
    dropout: Fraction = 0.0
    """Dropout of what enters an adapter, in training."""
    target_modules: Annotated[
        Literal["all-linear"] | tuple[str, ...] | None, BeforeValidator(_target_modules)
    ] = None
    """Linear modules of the layers, by the end of their names (``[q_proj, v_proj]``), or
    ``all-linear``; without it, peft's own for the architecture."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained too: of no module, of all, of those with an adapter."""
    use_rslora: bool = False
    """Multiply by ``alpha / sqrt(r)`` instead."""
    base_dtype: Annotated[Literal["bfloat16", "nf4"] | None, BeforeValidator(_base_dtype)] = None
    """In which type the frozen weights are held; what is trained stays fp32. ``bfloat16`` takes
    half the memory, ``nf4`` about an eighth for the linear modules of the layers (bitsandbytes;
    with ``scpl.sharding: none`` or ``ddp``) and half for the rest; both need ``deepspeed.bf16`` or
    ``torch_autocast`` in bf16. Without it, as the backend holds all weights."""

    @model_validator(mode="after")
    def _biases_stay_fp32(self) -> Self:
        if self.base_dtype == "nf4" and self.bias != "none":
            message = (
                f"is {self.bias}, but bitsandbytes makes biases beside nf4 weights bf16, in which "
                "training loses small steps; remove the key, or use base_dtype: bfloat16"
            )
            raise nested([Problem("bias", message)])
        return self

    @model_validator(mode="before")
    @classmethod
    def _names_of_peft(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        given = dict(value)
        for theirs, ours in _NAMES_OF_PEFT.items():
            if theirs in given and ours in given:
                raise nested([Problem(theirs, f"is the same as {ours}; remove one of the two")])
            if theirs in given:
                given[ours] = given.pop(theirs)
        return given


class ModelSection(Section):
    """Which Hugging Face model is cut into stages."""

    name_or_path: NameOrFolder
    """Hub name or local folder, as ``from_pretrained`` takes it; ``demo`` is the embedded encoder,
    ``demo-lm`` the embedded language model."""
    task: Literal["sequence-classification", "causal-lm"] = "sequence-classification"
    """Chooses ``AutoModelForSequenceClassification`` or ``AutoModelForCausalLM``."""
    num_labels: Count | None = None
    """Classes of the head; without it, as many as the data has."""
    attn_implementation: str | None = None
    """``eager``, ``sdpa`` or ``flash_attention_2``; without it, transformers chooses."""
    tokenizer_name_or_path: NameOrFolder | None = None
    """Tokenizer, when it is not the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: Literal[False] = False
    """Code from a model's repository is never run; only ``false`` is accepted."""
    lora: LoraSection | None = None
    """Train low-rank adapters and leave the layers' weights as they are; ``{}`` has peft's
    defaults."""

    @pydantic.field_validator("trust_remote_code", mode="before")
    @classmethod
    def _no_remote_code(cls, value: Any) -> Any:
        if value is True:
            raise ValueError(
                "code from a model's repository is not run, and its models cannot be cut; use one "
                "whose architecture is part of transformers, and remove the key"
            )
        return value


def _bool_or_text(value: Any) -> Any:
    if not isinstance(value, bool | str | Path):
        raise ValueError(
            f"must be true, false, auto or the folder of a checkpoint, got {show(value)}"
        )
    return value if isinstance(value, bool) else os.path.expanduser(value)


class TrainSection(HubKeys):
    """The loop, in the names of Hugging Face's ``TrainingArguments``."""

    model_config = pydantic.ConfigDict(json_schema_extra=own_keys_first)

    output_dir: HomePath | None = None
    """Run folder; default ``runs/<name of the recipe file>``."""
    run_name: str | None = None
    """Name of the run in trackers; default the last part of ``output_dir``."""
    num_train_epochs: Annotated[float, Field(gt=0), BeforeValidator(not_bool)] = 3.0
    """Passes over the training data; may be a fraction."""
    max_steps: Annotated[int, Field(ge=-1), BeforeValidator(not_bool)] = -1
    """Optimizer steps; overrides ``num_train_epochs`` unless -1."""
    per_device_train_batch_size: Count | None = None
    """Same as ``deepspeed.train_micro_batch_size_per_gpu``."""
    per_device_eval_batch_size: Count | None = None
    """Samples of one evaluation micro-batch; default the training one."""
    gradient_accumulation_steps: Count | None = None
    """Same as ``deepspeed.gradient_accumulation_steps``. Not a larger batch for a contrastive
    objective: it compares the rows of one micro-batch."""
    gradient_checkpointing: bool = False
    """Keep only what enters each layer and run the layer again in backward: much less memory for
    about a third more work; the numbers are the same to the bit."""
    torch_compile: bool = False
    """Compile the layers of a stage. The first steps wait for it, and again when the length of the
    batches first changes. The same numbers up to rounding, but dropout draws others."""
    torch_compile_backend: Annotated[str, AfterValidator(compile_backend)] | None = None
    """``inductor`` (default; needs a C++ compiler or a GPU), or another that torch knows; turns
    ``torch_compile`` on."""
    torch_compile_mode: Annotated[str, AfterValidator(compile_mode)] | None = None
    """Of ``inductor``: ``default``, ``reduce-overhead`` or ``max-autotune``; turns
    ``torch_compile`` on."""
    learning_rate: Number | None = None
    """Same as ``deepspeed.optimizer.params.lr``; 5e-5 when neither is set."""
    weight_decay: Number | None = None
    """Same as ``deepspeed.optimizer.params.weight_decay``; 0 when neither is set."""
    adam_beta1: Fraction | None = None
    """First of ``deepspeed.optimizer.params.betas``; 0.9 when neither is set."""
    adam_beta2: Fraction | None = None
    """Second of ``deepspeed.optimizer.params.betas``; 0.999 when neither is set."""
    adam_epsilon: Number | None = None
    """Same as ``deepspeed.optimizer.params.eps``; 1e-8 when neither is set."""
    max_grad_norm: Number | None = None
    """Same as ``deepspeed.gradient_clipping``, per stage; 1.0 when neither is set, 0 is off."""
    lr_scheduler_type: (
        Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]
        | None
    ) = None
    """LR schedule when there is no ``deepspeed.scheduler``; then ``linear`` unless set."""
    warmup_steps: Annotated[int, Field(ge=0), BeforeValidator(not_bool)] | None = None
    """Optimizer steps of warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1), BeforeValidator(not_bool)] | None = None
    """Warm-up as a fraction of all steps; set this or ``warmup_steps``."""
    decay_ratio: Fraction = 0.2
    """Of ``warmup_stable_decay``: in this last part of all steps the rate falls to 0; until then it
    stays at its peak, so that ``scpl.polish`` still has something to move with."""
    logging_steps: Count = 10
    """Optimizer steps between two log lines."""
    logging_first_step: bool = False
    """Log the first step too."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to evaluate; ``steps`` when ``eval_steps`` is set."""
    eval_on_start: bool = False
    """Evaluate once before the first step."""
    eval_steps: Count | None = None
    """Optimizer steps between two evaluations; with ``steps`` alone, ``logging_steps``."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint; ``steps`` when ``save_steps`` is set. After the last step too,
    but for ``no``: what the export is made of goes once it is made. A stop by a signal leaves one
    whatever is set."""
    save_steps: Count | None = None
    """Optimizer steps between two checkpoints; with ``steps`` alone, 500."""
    save_total_limit: Count | None = None
    """Checkpoints to keep, the latest; without it, all."""
    save_async: bool = False
    """Write checkpoints in a thread while the run goes on, once their tensors have been copied to
    the host's memory, which needs room for them; the next one, and the end, waits for it."""
    save_deepspeed_files: bool = False
    """Write into every checkpoint, beside what is resumed from, DeepSpeed's own files of each stage
    (``deepspeed/stage-k``), which its ``zero_to_fp32`` reads; with ``scpl.sharding: deepspeed``,
    without ``save_async``."""
    load_best_model_at_end: bool = False
    """Export, and score at the end, the best checkpoint instead of the last; it is never removed by
    ``save_total_limit``. Evaluations and checkpoints must fall on the same steps."""
    metric_for_best_model: str | None = None
    """Which number of an evaluation: ``loss`` (default), ``accuracy``, ``perplexity``,
    ``token_accuracy``; ``eval_`` before it is allowed. With ``load_best_model_at_end``."""
    greater_is_better: bool | None = None
    """Default: not for names that end with ``loss`` or ``perplexity``."""
    resume_from_checkpoint: Annotated[
        bool | Literal["auto"] | Path, BeforeValidator(_bool_or_text)
    ] = False
    """``true``: go on from the latest checkpoint in ``output_dir``; a path: from that one;
    ``auto``: from the latest if there is a complete one, else anew, for restarts by a launcher."""
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(not_bool)] = 42
    """Seed of new weights, data order and dropout."""
    data_seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(not_bool)] | None = None
    """Seed of the data order; default ``seed``."""
    dataloader_num_workers: Annotated[int, Field(ge=0), BeforeValidator(not_bool)] = 0
    """Processes that prepare batches ahead; 0: this one does, for a GPU in a thread of its own."""
    group_by_length: bool = False
    """Batches of texts of like length: less padding to compute. A resumed run must keep its global
    batch."""
    disable_tqdm: bool = False
    """No live progress display; log lines stay."""
    profile: bool = False
    """Write a trace and a picture of who did what when into ``profile/`` in the run folder."""
    profile_steps: tuple[Count, Count] = (3, 22)
    """Of which steps of this run (first, last; the step it begins with is 1)."""
    diagnostics: bool = False
    """Every evaluation also says what the features of each stage are worth: nearest-class accuracy,
    rank, alignment, uniformity."""
    sample_prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """``causal-lm``: at every evaluation the trackers get what the model goes on with after each of
    these, the likeliest token every time. The tokens go through the stages, none is put together;
    each is a forward pass of all prompts."""
    sample_max_new_tokens: Count = 32
    """Longest continuation of ``sample_prompts``, in tokens."""
    sample_predictions: Annotated[int, Field(ge=0), BeforeValidator(not_bool)] = 0
    """Classifiers: at every evaluation the trackers get so many evaluated texts, the same each
    time, with label, answer and its probability. They then hold these texts."""
    export: bool = True
    """Write the trained model as an ordinary Hugging Face folder at the end."""
    export_dir: HomePath | None = None
    """Where to; default ``<output_dir>/export``."""

    @model_validator(mode="before")
    @classmethod
    def _steps_mean_a_strategy(cls, value: Any) -> Any:
        """``save_steps: 500`` alone means ``save_strategy: steps``; the same for evaluation."""
        if not isinstance(value, Mapping):
            return value
        filled = dict(value)
        for what in ("save", "eval"):
            strategy = filled.get(f"{what}_strategy")
            if strategy is False:  # YAML 1.1 reads a bare `no` as false
                filled[f"{what}_strategy"] = "no"
            elif strategy is None:
                filled.pop(f"{what}_strategy", None)
                if filled.get(f"{what}_steps") is not None:
                    filled[f"{what}_strategy"] = "steps"
        # Hugging Face's steps where only the strategy is written.
        for what, steps in (("eval", filled.get("logging_steps", 10)), ("save", 500)):
            if filled.get(f"{what}_strategy") == "steps" and filled.get(f"{what}_steps") is None:
                filled[f"{what}_steps"] = steps
        return filled

    @model_validator(mode="before")
    @classmethod
    def _compiling_options_compile(cls, value: Any) -> Any:
        """``torch_compile_backend: inductor`` alone means ``torch_compile: true``, as in HF's."""
        keys = ("torch_compile_backend", "torch_compile_mode")
        if not isinstance(value, Mapping) or value.get("torch_compile") is not None:
            return value
        asked = any(value.get(key) is not None for key in keys)
        return {**value, "torch_compile": True} if asked else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems: list[Problem] = []
        for key in ("torch_compile_backend", "torch_compile_mode"):
            if getattr(self, key) is not None and not self.torch_compile:
                problems.append(
                    Problem(key, "has no effect with torch_compile: false; remove one of the two")
                )
        if self.torch_compile_mode and self.torch_compile_backend not in (None, "inductor"):
            problems.append(
                Problem(
                    "torch_compile_mode",
                    f"is for inductor only, but torch_compile_backend is "
                    f"'{self.torch_compile_backend}'; remove one of the two",
                )
            )
        for what in ("save", "eval"):
            strategy, steps = getattr(self, f"{what}_strategy"), getattr(self, f"{what}_steps")
            if strategy != "steps" and steps is not None:
                problems.append(
                    Problem(
                        f"{what}_steps",
                        f"has no effect with {what}_strategy: {strategy}; remove one of the two "
                        f"(on the command line: train.{what}_steps=null)",
                    )
                )
        problems += self._best_problems()
        if self.warmup_steps and self.warmup_ratio:
            problems.append(Problem("warmup_ratio", "set warmup_steps or warmup_ratio, not both"))
        if self.profile_steps[0] > self.profile_steps[1]:
            problems.append(Problem("profile_steps", "the first step comes after the last one"))
        if self.max_steps == 0:
            problems.append(Problem("max_steps", "0 steps train nothing; use -1 to go by epochs"))
        if problems:
            raise nested(problems)
        return self

    @property
    def order_seed(self) -> int:
        """What the order of the training data follows from."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def best_metric(self) -> str | None:
        """``metric_for_best_model`` as an evaluation names it; None where no best is asked for."""
        if not self.load_best_model_at_end:
            return None
        return (self.metric_for_best_model or "loss").removeprefix("eval_").removeprefix("val/")

    @property
    def best_is_greatest(self) -> bool:
        """Whether the best evaluation has the greatest number."""
        name = self.metric_for_best_model or "loss"
        if self.greater_is_better is not None:
            return self.greater_is_better
        return not name.endswith(("loss", "perplexity"))

    def _best_problems(self) -> list[Problem]:
        if not self.load_best_model_at_end:
            alone = [
                k
                for k in ("metric_for_best_model", "greater_is_better")
                if getattr(self, k) is not None
            ]
            return [Problem(k, "has no effect without load_best_model_at_end: true") for k in alone]
        key, steps = "load_best_model_at_end", (self.save_steps or 0) % (self.eval_steps or 1)
        if self.eval_strategy != self.save_strategy or self.eval_strategy == "no":
            found = f"eval_strategy: {self.eval_strategy} and save_strategy: {self.save_strategy}"
            text = f"needs an evaluation at every checkpoint; make both steps or epoch, not {found}"
            return [Problem(key, text)]
        if self.eval_strategy == "steps" and steps:
            found = f"save_steps: {self.save_steps} and eval_steps: {self.eval_steps}"
            text = f"needs an evaluation at every checkpoint; {found} do not fall together"
            return [Problem(key, text)]
        return []
