"""``scpl_ds.Trainer``: where ``transformers.Trainer`` stood."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithPadding,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    trainer_pt_utils,
)
from transformers.trainer_utils import (
    PredictionOutput,
    RemoveColumnsCollator,
    TrainOutput,
    speed_metrics,
)

from scpl_ds.data.given import SOURCE, Given, size_of
from scpl_ds.data.loader import BatchLoader
from scpl_ds.distributed.mesh import Mesh
from scpl_ds.distributed.world import RankEnv
from scpl_ds.engine import Engine
from scpl_ds.errors import RecipeError
from scpl_ds.partition.stage_module import PreTrainedModel
from scpl_ds.recipe import Recipe, check_world, recipe_from_mapping
from scpl_ds.setup import (
    Model,
    Parts,
    cut_model,
    load_data,
    make_engine,
    make_parts,
    start_world,
    together,
)
from scpl_ds.trainer import Run
from scpl_ds.trainer_arguments import WHERE, groups_by_length, mapping_of, with_steps
from scpl_ds.trainer_callbacks import Callbacks, hf_metrics
from scpl_ds.trainer_export import (
    destination_of,
    refuse_card_options,
    save_whole,
    upload,
    warn_of_no_upload,
)
from scpl_ds.trainer_guard import guarded
from scpl_ds.trainer_inputs import INSTEAD, check_data, inputs_of, refuse_others, taken
from scpl_ds.trainer_predictions import ComputeMetrics, Predicted, Preprocess, predict


class Trainer:
    """Trains in stages what a script for ``transformers.Trainer`` describes.

    It runs under any launcher that sets RANK and WORLD_SIZE (torchrun, accelerate, deepspeed), and
    in one process. Every rank runs the script; every method must be called on every rank.

    Args:
        model: A Hugging Face model (sequence classification or causal language model), used as it
            is, weights included, also one of ``peft.get_peft_model``. Or a name or folder, or a
            recipe's ``model`` section: then every rank reads its own stages' tensors only.
        args: Every field is honoured, or has nothing to honour, or is refused by name if set
            (docs/from-trainer.md). ``args.deepspeed`` may hold an ``scpl`` block.
        data_collator: As in Trainer; default ``DataCollatorWithPadding`` of ``processing_class``,
            or ``default_data_collator`` without one.
        train_dataset: Map-style, its batches with ``labels``.
        eval_dataset: Likewise.
        processing_class: The tokenizer; saved beside the model.
        model_init: Makes the model, where ``model`` is None.
        compute_metrics: ``EvalPrediction`` of the whole evaluation set, in order -> dict of
            numbers; called on rank 0.
        callbacks: ``TrainerCallback`` classes or instances.
        preprocess_logits_for_metrics: ``(logits, labels)`` of a micro-batch -> what to keep.
        scpl: The recipe's ``scpl`` section, such as ``{"stages": 4}``. Without ``sharding`` it is
            ``deepspeed`` with ``args.deepspeed``, ``fsdp`` with ``args.fsdp``, else ``ddp``.

    Raises:
        RecipeError: An argument that cannot be honoured; all of them at once.
        PartitionError: The model cannot be cut.
        DataError: A data set that cannot be read by position.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Mapping[str, Any] | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Sequence[Any] | None = None,
        preprocess_logits_for_metrics: Preprocess | None = None,
        *,
        scpl: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        refuse_others(others)
        self.args = args if args is not None else TrainingArguments()
        transformers.set_seed(self.args.seed)
        if model is None:
            if model_init is None:
                raise RecipeError("Trainer needs a model, or model_init.")
            model = model_init()
        self.model, self.processing_class = model, processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        for name in ("train_dataset", "eval_dataset"):
            check_data(name, getattr(self, name))
        section: Mapping[str, Any]
        whole: PreTrainedModel | None = None
        if isinstance(model, str | Mapping):
            section = {"name_or_path": model} if isinstance(model, str) else model
        else:
            whole, section = taken(model)
        self.compute_metrics = compute_metrics
        data = {"name": SOURCE, "own_metrics": compute_metrics is not None}
        mapping = mapping_of(self.args, scpl or {}, section, data)
        recipe = recipe_from_mapping(mapping, where=f"{WHERE} and scpl")
        self.recipe: Recipe = self._with_steps(recipe)
        """What is run; ``to_yaml()`` shows it."""
        warn_of_no_upload(self.args)
        padded = data_collator or (
            default_data_collator
            if processing_class is None
            else DataCollatorWithPadding(processing_class)
        )
        self.data_collator: Any = padded
        if self.args.remove_unused_columns:
            names = [*inputs_of(whole, self.recipe), "label", "label_ids", "labels"]
            padded = RemoveColumnsCollator(padded, names)
        self._given = Given(
            whole, train_dataset, eval_dataset, padded, processing_class, self._lengths
        )
        self.callback_handler = Callbacks(
            self.args,
            callbacks or (),
            model=self.model,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            preprocess=preprocess_logits_for_metrics,
        )
        self._preprocess = preprocess_logits_for_metrics
        self._parts: Parts | None = None
        self._stages: tuple[Mesh, torch.device, Model, Engine] | None = None
        self._trained, self._checkpoint = False, None
        self.callback_handler.call("on_init_end")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in vars(cls):
            hook = not name.startswith("__") and hasattr(transformers.Trainer, name)
            if hook and name not in vars(Trainer):
                instead = INSTEAD.get(name, "use callbacks, data_collator or a recipe")
                raise RecipeError(
                    f"{cls.__name__}.{name}: scpl_ds.Trainer does not call it, because every stage "
                    f"computes, learns and steps by itself. Instead, {instead}."
                )

    # -- training --------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train to the end, or until a callback or a signal stops it.

        Args:
            resume_from_checkpoint: True: the latest in ``args.output_dir``; or a checkpoint.

        Returns:
            Steps, mean of the task loss over those of this call, ``train_runtime`` and so on.
        """
        if self._trained:
            raise RecipeError(
                "train() was called before: stages and optimizers are at its end. Make another "
                "Trainer, with train(resume_from_checkpoint=True) to go on."
            )
        if self.train_dataset is None:
            raise RecipeError("train() needs a train_dataset.")
        self._trained = True
        asked = resume_from_checkpoint or False
        asked = asked if isinstance(asked, bool) else Path(asked)
        section = self.recipe.train.model_copy(update={"resume_from_checkpoint": asked})
        recipe = self.recipe.model_copy(update={"train": section})
        mesh, device = start_world(recipe) if self._stages is None else self._stages[:2]
        with guarded(recipe, mesh) as guard:
            began = time.time()
            hooks = self.callback_handler
            run = Run(
                recipe, mesh, device, guard,
                hooks=hooks, parts=lambda: self._made(recipe, mesh, device),
            )  # fmt: skip
            done = run.progress.done
            try:
                run.fit()
            finally:
                run.engine.on_error = None  # the watch ends here
        steps = run.engine.global_steps
        if run.best.checkpoint is not None:
            self._checkpoint = run.best.checkpoint
            run.engine.load_checkpoint(run.best.checkpoint, load_module_only=True)
        elif run.saved == steps:
            self._checkpoint = run.folder.path / f"checkpoint-{steps}"
        loss = hooks.mean_loss
        samples = (steps - done) * recipe.deepspeed.batch(mesh.dp_size).global_batch
        metrics = speed_metrics("train", began, num_samples=samples, num_steps=steps - done)
        metrics |= {"train_loss": loss, "epoch": self.state.epoch}
        return TrainOutput(steps, loss, metrics)

    # -- scoring ---------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """``eval_loss``, ``eval_accuracy`` (a language model: ``eval_perplexity``,
        ``eval_token_accuracy``) and what ``compute_metrics`` gives, over the stages as they are."""
        del ignore_keys  # a stage gives logits and nothing else
        dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if dataset is None:
            raise RecipeError("evaluate() needs an eval_dataset.")
        metrics = self._predict(dataset, metric_key_prefix, keep=False)[1]
        state, hooks = self.state, self.callback_handler
        state.log_history.append({**metrics, "step": state.global_step})
        hooks.call("on_log", logs=metrics)
        hooks.call("on_evaluate", metrics=metrics)
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: Sequence[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Logits of the whole data set, in its order, on every rank; with labels their metrics."""
        del ignore_keys
        found, metrics = self._predict(test_dataset, metric_key_prefix, keep=True)
        self.callback_handler.call("on_predict", metrics=metrics)
        return PredictionOutput(found.predictions, found.label_ids, metrics)  # pyright: ignore

    def _predict(self, data: Any, prefix: str, *, keep: bool) -> tuple[Predicted, dict[str, float]]:
        check_data("the data set", data)
        mesh, _, _, engine = self._ready()
        loader = BatchLoader(
            data,
            micro_batch_size=self.recipe.eval_batch_size,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            seed=0,
            shuffle=False,
            collate=self._given.collate,  # pyright: ignore[reportArgumentType]
            drop_last=False,
            num_workers=self.args.dataloader_num_workers,
        )
        own = None if self.args.prediction_loss_only else self.compute_metrics
        began = time.time()
        found = predict(engine, loader, compute_metrics=own, preprocess=self._preprocess, keep=keep)
        speed = speed_metrics(
            prefix, began,
            num_samples=loader.num_samples, num_steps=loader.num_micro_batches_per_epoch,
        )  # fmt: skip
        return found, {**hf_metrics(found.metrics, prefix), **speed}

    # -- files -----------------------------------------------------------------------------

    def save_model(
        self, output_dir: str | Path | None = None, _internal_call: bool = False
    ) -> None:
        """Write an ordinary Hugging Face folder; every rank must call it.

        Args:
            output_dir: A new folder, or an earlier export; default ``<args.output_dir>/export``,
                as ``args.output_dir`` itself is the run folder.

        With ``args.push_to_hub`` it is uploaded too.
        """
        run = self.recipe.output_dir
        asked = run if output_dir is None else Path(output_dir)
        out = run / "export" if asked.resolve() == run.resolve() else asked
        _, _, model, engine = self._ready()
        save_whole(engine, model, self.recipe, self.processing_class, out, self._checkpoint)
        if self.args.push_to_hub and not _internal_call:
            to = destination_of(self.args)
            upload(engine, out, to, "Model save", self.args.hub_token)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> str | None:
        """Save the model into ``<args.output_dir>/export`` and upload that to ``args.hub_model_id``
        (default: named as ``args.output_dir``); every rank must call it.

        Returns:
            The commit's address, on rank 0.

        Raises:
            RecipeError: ``blocking=False``, or options of a model card.
            HubError: The upload failed; the folder is whole.
        """
        refuse_card_options(card, blocking=blocking)
        self.callback_handler.call("on_push_begin")
        self.save_model(_internal_call=True)
        mesh, _, _, engine = self._ready()
        to = destination_of(self.args, revision, private)
        folder = self.recipe.output_dir / "export"
        url = upload(engine, folder, to, commit_message, token or self.args.hub_token)
        return url if mesh.rank == 0 else None

    log_metrics = trainer_pt_utils.log_metrics
    metrics_format = trainer_pt_utils.metrics_format
    save_metrics = trainer_pt_utils.save_metrics
    save_state = trainer_pt_utils.save_state

    # -- callbacks -------------------------------------------------------------------------

    @property
    def state(self) -> TrainerState:
        """What transformers keeps of a run; ``log_history`` is whole on every rank after
        ``train``."""
        return self.callback_handler.state

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.handler.remove_callback(callback)

    def is_world_process_zero(self) -> bool:
        return RankEnv.current().rank == 0

    def is_local_process_zero(self) -> bool:
        return RankEnv.current().local_rank == 0

    # -- before the first step -------------------------------------------------------------

    def _with_steps(self, recipe: Recipe) -> Recipe:
        if self.train_dataset is None:
            return recipe
        _, dp_size = check_world(recipe, RankEnv.current().world_size)
        epoch = len(self.train_dataset) // recipe.deepspeed.batch(dp_size).global_batch
        total = recipe.train.max_steps
        if total < 1:
            total = max(1, round(epoch * recipe.train.num_train_epochs))
        return with_steps(recipe, self.args, total, epoch)

    def _lengths(self, dataset: Dataset[Any]) -> np.ndarray:
        column = self.args.length_column_name
        if groups_by_length(self.args) and column in getattr(dataset, "column_names", ()):
            return np.asarray(dataset[column], np.int64)  # pyright: ignore
        count = size_of(dataset)
        return np.asarray([len(dataset[i]["input_ids"]) for i in range(count)], np.int64)

    def _made(self, recipe: Recipe, mesh: Mesh, device: torch.device) -> Parts:
        """With the engine that scored before, if one did."""
        if self._parts is None:
            self._parts = made = make_parts(recipe, mesh, device, self._given)
            self._stages = (mesh, device, made.model, made.engine)
        return self._parts

    def _ready(self) -> tuple[Mesh, torch.device, Model, Engine]:
        if self._stages is not None:
            return self._stages
        recipe = self.recipe
        mesh, device = start_world(recipe)
        if self.train_dataset is not None:
            self._made(recipe, mesh, device)
            assert self._stages is not None
            return self._stages
        data = load_data(recipe, mesh, given=self._given)
        model = together(mesh, lambda: cut_model(recipe, data.facts, self._given.model))
        engine = together(mesh, lambda: make_engine(recipe, model, mesh, device, total_steps=1))
        self._stages = (mesh, device, model, engine)
        return self._stages
