"""``scpl_ds.Trainer`` on several ranks: the recipe's numbers, and all ranks alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from scpl_ds.errors import ScplError
from tests.support import tiny
from tests.support.distributed import distributed, no_room
from tests.support.trainer import SCPL, Diary, accuracy, data, model_in, save_whole, trainer
from tests.unit.test_export_hub import Hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_whole(tmp_path / "model")


def recipe_like(folder: Path, run: Path) -> dict[str, Any]:
    """What ``support.trainer`` describes, as a recipe over files."""
    if dist.get_rank() == 0:
        tiny.write_csv(folder / "train.csv", tiny.sentences(64, seed=1))
        tiny.write_csv(folder / "dev.csv", tiny.sentences(21, seed=2))
    dist.barrier()
    return {
        "model": {"name_or_path": str(folder)},
        "scpl": {**SCPL, "sharding": "ddp"},
        "deepspeed": {"optimizer": {"type": "AdamW", "params": {}}},
        "data": {
            "name": "csv", "max_length": 16,
            "train_file": str(folder / "train.csv"), "eval_file": str(folder / "dev.csv"),
        },
        "train": {
            "output_dir": str(run), "num_train_epochs": 1, "per_device_train_batch_size": 8,
            "learning_rate": 3e-3, "weight_decay": 0.01, "max_grad_norm": 1.0,
            "disable_tqdm": True, "export": False,
        },
        "trackers": [],
    }  # fmt: skip


@distributed(2)
def test_the_trainer_gives_the_weights_of_the_recipe_to_the_bit(folder: Path, tmp_path: Path):
    from scpl_ds.recipe import recipe_from_mapping
    from scpl_ds.trainer import fit

    fit(recipe_from_mapping(recipe_like(folder, tmp_path / "recipe")))
    trainer(folder, tmp_path / "script", save_strategy="epoch").train()
    if dist.get_rank() == 0:
        wanted = tiny.tensors_of(tmp_path / "recipe" / "checkpoint-8")
        tiny.assert_same(tiny.tensors_of(tmp_path / "script" / "checkpoint-8"), wanted)


@distributed(2)
def test_a_resumed_script_goes_on_to_the_bit(folder: Path, tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer(folder, tmp_path / "whole", **saving).train()
    half = tmp_path / "half"
    stop = Diary(step_end={2: "should_training_stop"})
    stopped = trainer(folder, half, callbacks=[stop], **saving).train().global_step
    assert 2 < stopped < 8  # agreed on some steps later
    trainer(folder, half, **saving).train(resume_from_checkpoint=True)
    if dist.get_rank() == 0:
        wanted = tiny.tensors_of(tmp_path / "whole" / "checkpoint-8")
        tiny.assert_same(tiny.tensors_of(half / "checkpoint-8"), wanted)


@pytest.mark.parametrize("asker", [0, 1, 2, 3])
@distributed(4)
def test_what_one_rank_asks_for_all_ranks_do_after_the_same_step(
    asker: int, folder: Path, tmp_path: Path
):
    asks = {2: "should_evaluate", 9: "should_save", 16: "should_training_stop"}
    diary = Diary(step_end=asks if dist.get_rank() == asker else {})
    options = {"num_train_epochs": 4, "per_device_train_batch_size": 4}
    done = trainer(folder, tmp_path / "run", callbacks=[diary], **options).train()
    own = (done.global_step, diary.steps("evaluate"), diary.steps("save"))
    every: list[Any] = [None] * 4
    dist.all_gather_object(every, own)
    assert all(other == own for other in every), every
    steps, scored, saved = own
    assert len(scored) == len(saved) == 1
    # The first stages may be ahead of the one that asks, by as many micro-batches as are in flight.
    ahead = 2 * (2 + 2)
    assert 2 < scored[0] <= 3 + ahead, own
    assert 9 < saved[0] <= 10 + ahead and 16 < steps <= 17 + ahead, own


@distributed(4)
def test_metrics_see_every_sample_once_in_order_whatever_the_ranks(folder: Path, tmp_path: Path):
    """21 samples on 2 data-parallel ranks: one of them has a sample less."""
    made = trainer(folder, tmp_path / "run", compute_metrics=accuracy)
    found: Any = made.predict(made.eval_dataset)
    assert found.label_ids.tolist() == [n % 2 for n in range(21)]
    assert found.metrics["test_right"] == found.metrics["test_accuracy"]
    alone: Any = made.predict(made.eval_dataset.select(range(7, 8)))
    assert np.allclose(alone.predictions[0], found.predictions[7], rtol=1e-4, atol=1e-5)


@distributed(4)
def test_train_loss_is_the_mean_over_steps_and_data_parallel_ranks_on_every_rank(
    folder: Path, tmp_path: Path
):
    made = trainer(folder, tmp_path / "run", logging_steps=1, per_device_train_batch_size=4)
    found = made.train().training_loss
    losses = [log["loss"] for log in made.state.log_history if "loss" in log]
    assert len(losses) == 8 and found == pytest.approx(np.mean(losses), rel=1e-6)
    every: list[Any] = [None] * 4
    dist.all_gather_object(every, found)
    assert set(every) == {found}


@distributed(2)
def test_a_stop_that_one_rank_asks_for_in_an_evaluation_holds_for_all(folder: Path, tmp_path: Path):
    asks = {4: "should_training_stop"} if dist.get_rank() == 1 else {}
    diary = Diary(evaluate=asks)
    made = trainer(folder, tmp_path / "run", callbacks=[diary], eval_strategy="steps", eval_steps=2)
    assert made.train().global_step == 4
    histories: list[Any] = [None] * 2
    dist.all_gather_object(histories, made.state.log_history)
    assert histories[0] == histories[1]
    assert [h["step"] for h in histories[0] if "eval_loss" in h] == [2, 4]


@pytest.mark.parametrize("asker", [0, 1])
@distributed(2)
def test_a_save_asked_for_at_the_end_of_an_epoch_is_of_that_step(
    asker: int, folder: Path, tmp_path: Path
):
    """In the last epoch too; and the other rank hears of no epochs."""
    diary = Diary(epoch_end={8: "should_save", 16: "should_save"})
    diary = [diary] if dist.get_rank() == asker else []
    trainer(folder, tmp_path / "run", callbacks=diary, num_train_epochs=2).train()
    dist.barrier()
    saved = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == ["checkpoint-16", "checkpoint-8"]


@distributed(2)
def test_what_is_asked_for_in_on_log_is_done(folder: Path, tmp_path: Path):
    """Numbers of training steps come to rank 0 alone, some steps later."""
    diary = Diary(log={4: "should_save"})
    trainer(folder, tmp_path / "run", callbacks=[diary], logging_steps=1).train()
    saved: list[Any] = [None] * 2
    dist.all_gather_object(saved, diary.steps("save"))
    assert saved[0] == saved[1] and len(saved[0]) == 1 and saved[0][0] >= 4, saved


@distributed(2)
def test_what_is_asked_for_in_the_last_steps_is_done_after_the_last(folder: Path, tmp_path: Path):
    """And an evaluation that is asked for in a save follows the save."""
    asks = {8: "should_save"} if dist.get_rank() == 1 else {}
    diary = Diary(step_end=asks, save={8: "should_evaluate"})
    trainer(folder, tmp_path / "run", callbacks=[diary], logging_steps=1).train()
    assert diary.steps("save") == diary.steps("evaluate") == [8]
    assert dist.get_rank() == 1 or len([log for log in diary.logs if "loss" in log]) == 8


@distributed(2)
def test_ranks_that_shuffled_differently_are_refused(folder: Path, tmp_path: Path):
    shuffled = data(64, seed=1).shuffle(seed=dist.get_rank())
    with pytest.raises(ScplError) as found:
        trainer(folder, tmp_path / "run", train_dataset=shuffled, scpl={"stages": 1}).train()
    assert "must shuffle with a seed" in str(found.value)


@distributed(2)
def test_the_trainer_runs_under_deepspeed_with_a_ds_config(folder: Path, tmp_path: Path):
    import deepspeed

    # TrainingArguments starts DeepSpeed, which compiles this for minutes where there is no GPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2}, "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scpl": {"stages": 2},
    }  # fmt: skip
    made = trainer(folder, tmp_path / "run", deepspeed=config, save_strategy="epoch")
    engine = made._ready()[3].stages[0].backend.engine
    assert engine.zero_optimization_stage() == 2
    made.train()
    made.save_model(tmp_path / "out")
    plain = trainer(folder, tmp_path / "ddp")
    plain.train()
    plain.save_model(tmp_path / "plain")
    if dist.get_rank() == 0:
        ours, theirs, first = (
            dict(model_in(path).state_dict())
            for path in (tmp_path / "out", tmp_path / "plain", folder)
        )

        def apart(one: Any, other: Any) -> float:
            return float(sum((one[name] - other[name]).abs().sum() for name in first))

        # Not to the bit: where a gradient is rounding only, Adam makes a step of it.
        assert apart(ours, theirs) < 0.05 * apart(ours, first) > 1.0


@pytest.mark.parametrize("limit", [100, 32 * 1024])
@distributed(2)
def test_a_model_that_rank_0_cannot_save_is_an_error_of_all_and_leaves_nothing(
    limit: int, folder: Path, tmp_path: Path
):
    """100 bytes: config.json does not fit; 32 KiB: the weights do not. Rank 1 used to wait until
    its timeout, and the scratch folder to stay."""
    made = trainer(folder, tmp_path / "run", scpl={"timeout_s": 600})
    made.evaluate()  # the ranks' connections, made through a file, are there
    own = tmp_path / "own"
    with no_room(0, limit), pytest.raises(ScplError) as found:
        made.save_model(own / "out")
    dist.barrier()
    if dist.get_rank() == 0:
        assert "could not be written" in str(found.value) and "large" in str(found.value)
        assert not own.exists() or not list(own.iterdir())
    dist.barrier()
    made.save_model(own / "out")
    assert [path.name for path in own.iterdir()] == ["out"]


@distributed(2)
def test_rank_0_uploads_and_an_upload_that_fails_is_an_error_of_all(folder: Path, tmp_path: Path):
    from huggingface_hub import constants

    from scpl_ds import export_hub

    export_hub.HfApi, constants.HF_HUB_OFFLINE = Hub, False
    made = trainer(folder, tmp_path / "run")
    url = made.push_to_hub(token="hf_x")
    assert url == (None if dist.get_rank() else "https://huggingface.co/me/run/commit/1")
    Hub.error = OSError(28, "No space left")
    with pytest.raises(ScplError) as found:
        made.push_to_hub(token="hf_x")
    wanted = "rank 0 found the problem" if dist.get_rank() else "No space left"
    assert wanted in str(found.value)
