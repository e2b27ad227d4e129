"""``scpl_ds.Trainer`` in one process."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSequenceClassification, EarlyStoppingCallback, TrainerCallback

import scpl_ds
from scpl_ds import export_hub
from scpl_ds.errors import DataError, HubError, PartitionError, RecipeError
from tests.support import tiny_lm
from tests.support.tiny import assert_same, tensors_of
from tests.support.trainer import Diary, accuracy, arguments, data, model_in, save_whole, trainer
from tests.unit.test_export_hub import Hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whole(tmp_path_factory.mktemp("trainer") / "model")


def test_a_script_trains_evaluates_predicts_and_saves_a_model_that_predicts_the_same(
    folder: Path, tmp_path: Path
):
    made = trainer(folder, tmp_path / "run", compute_metrics=accuracy)
    before = made.evaluate()
    trained = made.train()
    after = made.evaluate()
    assert trained.global_step == made.state.global_step == 8
    assert after["eval_loss"] != before["eval_loss"]
    assert after["eval_right"] == after["eval_accuracy"] and after["eval_first"] == 0.0
    found: Any = made.predict(made.eval_dataset)
    assert found.metrics["test_right"] == after["eval_right"]
    made.save_model(tmp_path / "out")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    batch = made.data_collator([dict(r) for r in data(21, seed=2).remove_columns(["text"])])
    with torch.no_grad():
        logits = exported(**batch).logits
    # One batch of 21 here, three of 8, 8 and 5 there: other widths of padding.
    np.testing.assert_allclose(found.predictions, logits.numpy(), rtol=1e-4, atol=1e-5)
    assert found.label_ids.tolist() == [n % 2 for n in range(21)]


def test_the_model_that_is_given_is_the_model_that_is_trained(folder: Path, tmp_path: Path):
    model: Any = model_in(folder)
    with torch.no_grad():
        model.classifier.weight.fill_(0.125)
    made = trainer(folder, tmp_path / "run", model=model)
    made.save_model(tmp_path / "out")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_same(dict(saved.state_dict()), dict(model.state_dict()))


def test_a_name_in_the_place_of_a_model_trains_the_same(folder: Path, tmp_path: Path):
    runs = []
    for name, model in (("object", model_in(folder)), ("name", str(folder))):
        runs.append(tmp_path / name)
        trainer(folder, runs[-1], model=model, save_strategy="epoch").train()
    first, second = (tensors_of(run / "checkpoint-8") for run in runs)
    assert_same(first, second)


def test_the_events_of_a_run_come_in_the_order_of_transformers(folder: Path, tmp_path: Path):
    diary = Diary()
    trainer(
        folder, tmp_path / "run", callbacks=[diary], max_steps=3, logging_steps=2,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    ).train()  # fmt: skip
    names = [name for name, _ in diary.events if name != "log"]
    step = ["step_begin", "step_end"]
    ends = ["evaluate", "save"]
    assert names == [
        "train_begin", "epoch_begin", *step, *step, *ends, *step, *ends, "train_end",
    ]  # fmt: skip
    assert diary.steps("step_end") == [1, 2, 3] and diary.steps("evaluate") == [2, 3]
    training = [log for log in diary.logs if "loss" in log]
    assert len(training) == 2 and {"learning_rate", "epoch", "stage0/loss"} <= set(training[0])


def test_early_stopping_ends_the_run_and_the_best_model_is_the_one_that_stays(
    folder: Path, tmp_path: Path
):
    scores = iter([0.5, 0.7, 0.6, 0.6, 0.9, 0.9])
    made = trainer(
        folder, tmp_path / "run", num_train_epochs=3, logging_steps=1,
        compute_metrics=lambda _: {"mine": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True, metric_for_best_model="mine", save_total_limit=1,
    )  # fmt: skip
    trained = made.train()
    assert trained.global_step == 8
    assert made.state.best_metric == 0.7 and made.state.best_global_step == 4
    assert Path(made.state.best_model_checkpoint or "").name == "checkpoint-4"
    kept = tensors_of(tmp_path / "run" / "checkpoint-4")
    made.save_model(tmp_path / "out")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    whole = {k.partition("/")[2]: v for k, v in kept.items()}
    assert torch.equal(saved["classifier.weight"], whole["classifier.weight"])


@pytest.mark.parametrize("asks", ["step_end", "log"])
@pytest.mark.parametrize("word, event", [("should_evaluate", "evaluate"), ("should_save", "save")])
def test_what_a_callback_asks_for_is_done_in_one_process_after_the_same_step(
    word: str, event: str, asks: str, folder: Path, tmp_path: Path
):
    diary = Diary(**{asks: {3: word}})
    trainer(folder, tmp_path / "run", callbacks=[diary], logging_steps=1).train()
    assert diary.steps(event) == [3]


def test_a_resumed_run_has_the_log_and_the_callbacks_of_the_one_before(
    folder: Path, tmp_path: Path
):
    asked: dict[str, Any] = {
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4,
        "metric_for_best_model": "loss", "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    first = EarlyStoppingCallback(early_stopping_patience=50)
    trainer(folder, tmp_path / "run", callbacks=[first], **asked).train()
    second = EarlyStoppingCallback(early_stopping_patience=50)
    made = trainer(folder, tmp_path / "run", callbacks=[second], **asked)
    made.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    scored = [log["step"] for log in made.state.log_history if "eval_loss" in log]
    assert scored == [2, 4, 6, 8]
    assert second.early_stopping_patience_counter == first.early_stopping_patience_counter


def test_a_subclass_with_its_own_loss_is_refused_with_what_to_do_instead():
    with pytest.raises(RecipeError, match=r"Mine.compute_loss.*scpl.objective"):

        class Mine(scpl_ds.Trainer):
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...


def test_a_callback_that_wants_to_look_into_a_step_is_refused(folder: Path, tmp_path: Path):
    class Inside(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None: ...

    with pytest.raises(RecipeError, match=r"Inside.on_pre_optimizer_step.*on_step_end"):
        trainer(folder, tmp_path / "run", callbacks=[Inside])


def test_data_without_labels_or_without_positions_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no 'labels'"):
        bare = data(64, seed=1).remove_columns(["label"])
        trainer(folder, tmp_path / "run", train_dataset=bare).train()
    with pytest.raises(DataError, match="train_dataset is a IterableDataset"):
        stream = data(64, seed=1).to_iterable_dataset()
        trainer(folder, tmp_path / "run", train_dataset=stream)


def test_a_model_that_is_no_hugging_face_model_of_a_task_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="no Hugging Face model"):
        trainer(folder, tmp_path / "run", model=torch.nn.Linear(2, 2))
    with pytest.raises(PartitionError, match="BertModel is neither"):
        trainer(folder, tmp_path / "run", model=model_in(folder).bert)


def test_predictions_of_data_without_labels_are_given(folder: Path, tmp_path: Path):
    bare = data(21, seed=2).remove_columns(["label"])
    made = trainer(folder, tmp_path / "run", compute_metrics=accuracy)
    found: Any = made.predict(bare)
    assert found.predictions.shape == (21, 2) and found.label_ids is None
    assert np.array_equal(found.predictions, made.predict(made.eval_dataset).predictions)


def test_a_run_folder_says_why_its_data_cannot_be_read_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from scpl_ds.cli import main

    trainer(folder, tmp_path / "run", max_steps=1, save_strategy="epoch").train()
    logging.getLogger("scpl_ds").handlers.clear()
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "given its data by a script" in capsys.readouterr().err


@pytest.mark.parametrize("read", [True, False])
def test_the_card_names_a_base_only_of_weights_that_were_read_from_it(
    read: bool, folder: Path, tmp_path: Path
):
    """It used to say `base_model: bert` of random weights."""
    model = model_in(folder)
    if not read:
        model = AutoModelForSequenceClassification.from_config(model.config)
    model.config._name_or_path = "team/base"
    made = trainer(folder, tmp_path / "run", model=model)
    made.save_model(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ("team/base" if read else None)
    assert ("fine-tuned from" in card.text) is read
    assert ("trained from weights that a script made" in card.text) is not read
    assert made.recipe.model.name_or_path == ("team/base" if read else "(made by a script)")


@pytest.mark.parametrize("method", ["scpl", "bp"])
def test_train_loss_is_the_mean_over_the_steps_of_the_call_as_in_transformers(
    method: str, folder: Path, tmp_path: Path
):
    """It used to be that of the logged steps, so of the last one where few are logged."""
    scpl = {"method": method, "sharding": "none"}
    every = trainer(folder, tmp_path / "every", logging_steps=1, scpl=scpl)
    every.train()
    losses = [log["loss"] for log in every.state.log_history if "loss" in log]
    assert len(losses) == 8 and max(losses) - min(losses) > 0.001
    few = trainer(
        folder, tmp_path / "few", logging_steps=8, save_strategy="steps", save_steps=5, scpl=scpl
    )
    found: Any = few.train()
    assert found.training_loss == found.metrics["train_loss"]
    assert found.training_loss == pytest.approx(np.mean(losses), rel=1e-6)
    saved = tmp_path / "few" / "checkpoint-5"
    found = trainer(folder, tmp_path / "few", scpl=scpl).train(saved)
    assert found.training_loss == pytest.approx(np.mean(losses[5:]), rel=1e-6)
    again = trainer(folder, tmp_path / "few", scpl=scpl, save_strategy="steps")
    assert again.train(tmp_path / "few" / "checkpoint-8").training_loss == 0.0


def test_a_step_is_the_mean_of_micro_batches_however_many_tokens_they_label(tmp_path: Path):
    """Not of all their tokens, whatever ``average_tokens_across_devices`` says."""
    ids = torch.randint(1, 257, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:2, 3:] = -100
    samples: Any = [{"input_ids": i, "labels": n} for i, n in zip(ids, labels, strict=True)]
    model = tiny_lm.model()
    with torch.no_grad():
        alone = [
            float(model(i[None], labels=n[None]).loss) for i, n in zip(ids, labels, strict=True)
        ]
        whole = float(model(ids, labels=labels).loss)
    assert abs(np.mean(alone) - whole) > 0.001
    args = arguments(
        tmp_path / "run", per_device_train_batch_size=1, gradient_accumulation_steps=4,
        max_steps=1, average_tokens_across_devices=True,
    )  # fmt: skip
    made = scpl_ds.Trainer(model, args, train_dataset=samples, scpl={"stages": 1})
    assert made.train().training_loss == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Hub]:
    """A hub that takes everything, and no token on this machine."""
    monkeypatch.setattr(export_hub, "HfApi", Hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    return Hub


def test_a_model_that_is_saved_is_uploaded_if_the_arguments_say_so(
    hub: Any, folder: Path, tmp_path: Path
):
    made = trainer(
        folder, tmp_path / "run", push_to_hub=True, hub_strategy="end", hub_token="hf_mine",
        hub_model_id="team/model", hub_private_repo=True, hub_revision="v2",
    )  # fmt: skip
    assert "hf_mine" not in made.recipe.to_yaml()
    made.save_model(tmp_path / "out")
    repo, branch, (_, sent) = hub.last.asked
    assert hub.last.token == "hf_mine" and repo[1] == (
        "team/model", {"private": True, "exist_ok": True},
    )  # fmt: skip
    assert branch[1][1]["branch"] == "v2" and sent["commit_message"] == "Model save"
    assert sent["folder_path"] == tmp_path / "out"
    assert {"config.json", "README.md", "tokenizer.json"} <= sent["files"]


def test_push_to_hub_uploads_the_trained_model_and_gives_its_address(
    hub: Any, folder: Path, tmp_path: Path
):
    diary = Diary()
    made = trainer(folder, tmp_path / "run", max_steps=1, callbacks=[diary])
    made.train()
    with pytest.raises(HubError, match=r"run/export was not uploaded to run: there is no token"):
        made.push_to_hub()
    url = made.push_to_hub("mine", token="hf_other", private=True, language=None)
    assert url == "https://huggingface.co/me/run/commit/1" and hub.last.token == "hf_other"
    assert hub.last.asked[0][1] == ("run", {"private": True, "exist_ok": True})
    assert hub.last.asked[-1][1]["commit_message"] == "mine"
    assert diary.steps("push_begin") == [1, 1]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "export")
    with pytest.raises(RecipeError, match=r"push_to_hub\(license\) cannot be honoured"):
        made.push_to_hub(license="mit")
    with pytest.raises(RecipeError, match="blocking=False"):
        made.push_to_hub(blocking=False)


def test_that_nothing_can_be_uploaded_is_said_before_the_training(
    hub: Any, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level("WARNING"):
        trainer(folder, tmp_path / "run", push_to_hub=True, hub_strategy="end")
    assert "push_to_hub: there is no token of the hub to upload to run with" in caplog.text
