"""The deepspeed section: DeepSpeed's arithmetic and defaults, and every problem with its path."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from scpl_ds.ds_config import DeepSpeedSection, unsupported
from scpl_ds.errors import RecipeError

MICRO = {"train_micro_batch_size_per_gpu": 4}


def section(train: dict[str, Any] | None = None, **config: Any) -> DeepSpeedSection:
    return DeepSpeedSection.from_mapping(MICRO | config, train=train)


def test_gradient_clipping_defaults_to_deepspeeds_default():
    constants = importlib.import_module("deepspeed.runtime.constants")
    assert section().gradient_clipping == constants.GRADIENT_CLIPPING_DEFAULT


def test_deepspeed_itself_accepts_what_resolve_gives():
    config = importlib.import_module("deepspeed.runtime.config")
    resolved = section(zero_optimization={"stage": 1}).resolve(1)
    theirs = config.DeepSpeedConfig(resolved)
    assert theirs.train_batch_size == 4
    assert theirs.gradient_clipping == 1.0
    assert theirs.zero_optimization_stage == 1


# --- what is refused ------------------------------------------------------------------------------

ADAMW = {"type": "AdamW"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {}}, "deepspeed.zero_optimisation: unknown key; did you mean 'zero_opt"),
    (
        {"zero_optimization": {"stge": 1}},
        "zero_optimization.stge: unknown key; did you mean 'stage'",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
        "deepspeed.zero_optimization.offload_optimizer.devise: unknown key; did you mean 'device'?",
    ),
    ({"bf16": {"enable": True}}, "deepspeed.bf16.enable: unknown key; did you mean 'enabled'?"),
    (
        {"fp16": {"loss_scal": 0}},
        "deepspeed.fp16.loss_scal: unknown key; did you mean 'loss_scale'",
    ),
    ({"tensorboard": {"outputpath": ""}}, "tensorboard.outputpath: unknown key; did you mean"),
    ({"wandb": {"projct": ""}}, "deepspeed.wandb.projct: unknown key; did you mean 'project'?"),
    ({"learning_rate": 1}, "deepspeed.learning_rate: unknown key"),
    ({"reduce_bucket_size": 1}, "it belongs in 'deepspeed.zero_optimization.reduce_bucket_size'"),
    ({"max_grad_norm": 1}, "unknown key; did you mean 'gradient_clipping'?"),
    ({"amp": {"enabled": True}}, "deepspeed.amp: was removed from DeepSpeed; delete it"),
    (
        {"zero_optimization": {"mics_shard_size": 1}},
        "zero_optimization.mics_shard_size: was removed from DeepSpeed",
    ),
    (
        {"optimizer": ADAMW | {"params": {"learning_rate": 1e-4}}},
        "deepspeed.optimizer.params.learning_rate: unknown key; did you mean 'lr'?",
    ),
    ({"optimizer": ADAMW | {"params": {"momentum": 1}}}, "optimizer.params.momentum: unknown key"),
    ({"optimizer": ADAMW | {"param": {}}}, "optimizer.param: unknown key; did you mean 'params'?"),
    (
        {"optimizer": ADAMW | {"params": {"max_grad_norm": 1}}},
        "max_grad_norm: unknown key; set deepspeed.gradient_clipping",
    ),
    (
        {"optimizer": ADAMW | {"params": {"max_grad_norm": 1}}, "gradient_clipping": 2},
        "max_grad_norm: unknown key; set deepspeed.gradient_clipping",
    ),
    ({"optimizer": {"type": "OneBitAdam"}}, "'OneBitAdam', an optimizer of older DeepSpeed releas"),
    ({"optimizer": {"type": "zerooneadam"}}, "of older DeepSpeed releases, is not supported; use"),
    ({"elasticity": {"enabled": True}}, "deepspeed.elasticity: was removed from DeepSpeed; delete"),
    ({"elasticity": {"max_train_batch_size": 9}}, "elasticity: was removed from DeepSpeed; delete"),
    ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention: was removed from DeepSpeed"),
    ({"checkpoint": {"tag_validation": "Fail"}}, "checkpoint.tag_validation: 'Fail' has no effect"),
    ({"checkpoint": {"use_node_local_storage": True}}, "use_node_local_storage: True has no effec"),
    (
        {"checkpoint": {"parallel_write": {"pipeline_stage": True}}},
        "pipeline_stage: True has no ef",
    ),
    ({"checkpoint": {"checkpoint_serialization": False}}, "checkpoint_serialization: False has no"),
    ({"checkpoint": {"writer": {"type": "fast"}}}, "deepspeed.checkpoint.writer: "),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer: True has no effect"),
    ({"optimizer": {"type": "AdmW"}}, "unknown optimizer 'AdmW'; did you mean 'AdamW'?"),
    ({"optimizer": {"type": "Lion"}}, "'Lion' is not supported; use one of AdamW, Adam, SGD, Adag"),
    ({"optimizer": ADAMW | {"params": {"betas": [0.9]}}}, "betas: must be two numbers in [0, 1)"),
    ({"optimizer": ADAMW | {"params": {"lr": "big"}}}, "lr: must be a number, got 'big'"),
    ({"optimizer": ADAMW | {"params": {"lr": -1}}}, "lr: must be at least 0, got -1"),
    ({"optimizer": ADAMW | {"params": {"lr": float("inf")}}}, "lr: must be a number, got inf"),
    ({"optimizer": "AdamW"}, "deepspeed.optimizer: must be a mapping, got 'AdamW'"),
    ({"optimizer": ADAMW | {"legacy_fusion": True}}, "legacy_fusion: True is not supported"),
    (
        {"optimizer": ADAMW | {"params": {"bias_correction": False}}},
        "bias_correction: False is not supported; use True",
    ),
    ({"scheduler": {"params": {}}}, "deepspeed.scheduler.type: is required"),
    ({"scheduler": {"type": "OneCycle"}}, "'OneCycle' is not supported; use one of WarmupLR, Warm"),
    ({"scheduler": {"type": "warmuplr"}}, "unknown scheduler 'warmuplr'; did you mean 'WarmupLR'?"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 1}}},
        "scheduler.params.total_num_steps: unknown key",
    ),
    ({"scheduler": {"type": "WarmupDecayLR"}}, "warmup_max_lr: is required by WarmupDecayLR"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cos"}}},
        "warmup_type: must be 'log' or 'linear', got 'cos'",
    ),
    ({"gradient_clipping": -1}, "deepspeed.gradient_clipping: must be at least 0, got -1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: must be at least 1, got 0"),
    ({"gradient_accumulation_steps": 1.5}, "must be a whole number, got 1.5"),
    ({"train_micro_batch_size_per_gpu": True}, "must be a whole number, got True"),
    (
        {"train_micro_batch_size_per_gpu": None},
        "is required (or train.per_device_train_batch_size)",
    ),
    ({"steps_per_print": "auto"}, "steps_per_print: must be a whole number, got 'auto'"),
    ({"zero_optimization": True}, "deepspeed.zero_optimization: must be a mapping, got True"),
    ({"zero_optimization": {"stage": 4}}, "stage: must be 0, 1, 2 or 3, got 4"),
    (
        {"zero_optimization": {"stage": 1}, "optimizer": {"type": "adagrad"}},
        "deepspeed.optimizer.type: Adagrad does not work with ZeRO",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
        "zero_optimization.offload_optimizer: needs zero_optimization.stage: 1 or more",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param: needs zero_optimization.stage: 3 and",
    ),
    ({"zero_optimization": {"cpu_offload": True}}, "cpu_offload: is not supported; use offload_"),
    ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "ZeRO++ is planned"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "ZeRO++ is planned"),
    ({"bf16": {"enabled": True}}, "bf16: DeepSpeed 0.19.8 without ZeRO accumulates gradients in b"),
    ({"fp16": {"enabled": True}}, "fp16: DeepSpeed 0.19.8 without ZeRO never scales the loss"),
    (
        {
            "bf16": {"enabled": True},
            "fp16": {"enabled": True},
            "zero_optimization": {"stage": 1},
        },
        "deepspeed.fp16: and bf16 are both enabled; keep one",
    ),
    (
        {
            "bf16": {"enabled": True},
            "torch_autocast": {"enabled": True},
            "zero_optimization": {"stage": 1},
        },
        "torch_autocast: and bf16 are two kinds of mixed precision; keep one",
    ),
    ({"pipeline": {"stages": 2}}, "deepspeed.pipeline: is for DeepSpeed's own PipelineEngine; set"),
    ({"wandb": {"enabled": True}}, "one monitor per stage; use trackers: [{name: wandb}]"),
    ({"comet": {"enabled": True}}, "deepspeed.comet: would start one monitor per stage; remove it"),
    ({"autotuning": {"enabled": True}}, "deepspeed.autotuning: does not work with stages"),
    ({"tensor_parallel": {"autotp_size": 2}}, "deepspeed.tensor_parallel: does not work with"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size: 2 is not supported; use 1"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype: bf16 needs bf16 or fp16"),
    (
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "activation_checkpointing: is for models that call DeepSpeed",
    ),
]


@pytest.mark.parametrize(("config", "text"), BAD, ids=[str(c) for c, _ in BAD])
def test_a_bad_section_is_refused_with_its_path(config: dict[str, Any], text: str):
    with pytest.raises(RecipeError) as caught:
        section(**config)
    lines = str(caught.value).splitlines()
    assert lines[0] == "1 problem in the deepspeed config:"
    assert len(lines) == 2 and text in lines[1]


@pytest.mark.parametrize(
    "config",
    [
        {"bf16": {"enabled": False}, "fp16": {"enabled": "auto", "loss_scale": 0}},
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8, "overlap_comm": True}},
        {"zero_optimization": {"reduce_bucket_size": "auto", "offload_param": {"device": "none"}}},
        {"wandb": {"enabled": False, "project": "x"}, "autotuning": {"enabled": False}},
        {"steps_per_print": None, "wall_clock_breakdown": False, "optimizer": None},
        {"zero_optimization": None, "scheduler": None, "zero_allow_untested_optimizer": True},
        {"activation_checkpointing": {"partition_activations": False}},
        {"optimizer": {"type": "adamw", "params": {"torch_adam": True, "lr": "2e-5"}}},
        {"checkpoint": {"tag_validation": "Warn", "writer": None, "parallel_write": {}}},
        {"zero_force_ds_cpu_optimizer": False, "prescale_gradients": True, "dump_state": False},
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}},
        {"elasticity": {"enabled": False, "max_train_batch_size": 9}, "amp": {}},
        {"sparse_attention": {}, "sparse_gradients": False, "nebula": None},
        {"zero_optimization": {"mics_shard_size": -1, "mics_hierarchical_params_gather": False}},
        {
            "gradient_clipping": 2.0,
            "optimizer": {"type": "AdamW", "params": {"max_grad_norm": 2}},
        },
        {"data_types": {"grad_accum_dtype": "auto"}},
        {"zero_optimization": {"offload_optimizer": {"device": "auto", "pin_memory": True}}},
        {"zero_optimization": {"offload_param": {"device": "auto"}}},
        {
            "flops_profiler": {"enabled": False, "profile_step": 1},
            "comms_logger": {"verbose": True},
        },
    ],
    ids=str,
)
def test_an_ordinary_config_file_is_taken_as_it_is(config: dict[str, Any]):
    resolved = section(**config).resolve(2)
    assert resolved["train_batch_size"] == 8
    assert "'auto'" not in str(resolved)
    theirs = importlib.import_module("deepspeed.runtime.config").DeepSpeedConfig
    assert theirs(section(**config).engine_config(1, parameters=9)).train_batch_size == 4
    assert "max_grad_norm" not in resolved["optimizer"]["params"]


def test_zero_needs_a_backend_that_shards():
    config = DeepSpeedSection(MICRO | {"zero_optimization": {"stage": 1}})
    assert unsupported(config, "deepspeed") == []
    (problem,) = unsupported(config, "none")
    assert problem.path == "deepspeed.zero_optimization.stage"
    assert "use stage 0, or scpl.sharding: deepspeed" in problem.message


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"flops_profiler": {"enabled": True}}, "flops_profiler"),
        ({"comms_logger": {"enabled": True}}, "comms_logger"),
        ({"communication_data_type": "bf16"}, "communication_data_type"),
        ({"prescale_gradients": True}, "prescale_gradients"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
        ({"wall_clock_breakdown": True}, "wall_clock_breakdown"),
        ({"memory_breakdown": True}, "memory_breakdown"),
        ({"dump_state": True}, "dump_state"),
    ],
)
def test_what_only_deepspeeds_engine_does_needs_deepspeed(config: dict[str, Any], path: str):
    """Under ``sharding: none`` these did nothing, in silence."""
    asked = DeepSpeedSection(MICRO | config)
    assert unsupported(asked, "deepspeed") == []
    (problem,) = unsupported(asked, "none")
    assert problem.path == f"deepspeed.{path}"
    assert "has no effect with scpl.sharding: none" in problem.message


# --- filling in and arithmetic --------------------------------------------------------------------


def test_auto_and_absent_keys_take_the_value_of_train():
    auto = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}
    train = {
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 3,
        "learning_rate": 2e-5,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "max_grad_norm": 0.5,
    }
    config = DeepSpeedSection.from_mapping(
        {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            "optimizer": auto,
        },
        train=train,
    )
    assert config.optimizer.params == {
        "lr": 2e-5,
        "betas": [0.9, 0.98],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    assert config.gradient_clipping == 0.5
    assert config.batch(2) == (6, 3, 36)


def test_auto_without_train_is_hugging_faces_default():
    config = DeepSpeedSection.from_mapping(
        {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    )
    assert config.batch(1) == (8, 1, 8)
    assert config.optimizer == (
        "adamw",
        {"lr": 5e-5, "weight_decay": 0.0, "betas": [0.9, 0.999], "eps": 1e-8},
    )
    assert (config.gradient_clipping, config.zero_stage, config.precision) == (1.0, 0, "fp32")


@pytest.mark.parametrize(
    ("train", "config", "text"),
    [
        (
            {"weight_decay": 0.1},
            {"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.2}}},
            "train.weight_decay: is 0.1, but deepspeed.optimizer.params.weight_decay is 0.2; write",
        ),
        (
            {"adam_beta2": 0.98},
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            "train.adam_beta2: is 0.98, but deepspeed.optimizer.params.betas is [0.9, 0.999]",
        ),
        (
            {"max_grad_norm": 2},
            {"gradient_clipping": 1},
            "train.max_grad_norm: is 2, but deepspeed.",
        ),
        (
            {"adam_epsilon": 1e-6},
            {"optimizer": {"type": "SGD"}},
            "train.adam_epsilon: has no effect with the optimizer SGD",
        ),
    ],
)
def test_train_and_deepspeed_may_not_contradict_each_other(
    train: dict[str, Any], config: dict[str, Any], text: str
):
    with pytest.raises(RecipeError) as caught:
        section(train, **config)
    assert text in str(caught.value)


def test_the_same_value_in_both_sections_is_fine():
    config = section(
        {"adam_beta1": 0.9}, optimizer={"type": "AdamW", "params": {"betas": [0.9, 0.95]}}
    )
    assert config.optimizer.params["betas"] == [0.9, 0.95]


def test_train_batch_size_gives_the_accumulation_as_in_deepspeed():
    config = section(train_batch_size=32)
    assert config.batch(2) == (4, 4, 32)
    assert config.at(2).gradient_accumulation_steps == 4
    with pytest.raises(RecipeError, match="only with the number of data-parallel ranks"):
        _ = config.gradient_accumulation_steps


def test_a_batch_size_that_does_not_multiply_out_is_refused_with_the_numbers():
    with pytest.raises(RecipeError) as caught:
        section(train_batch_size=32, gradient_accumulation_steps=2).resolve(3)
    assert (
        "deepspeed.train_batch_size: 32 is not train_micro_batch_size_per_gpu 4 x "
        "gradient_accumulation_steps 2 x 3 data-parallel ranks = 24."
    ) in str(caught.value)


def test_resolving_writes_clipping_and_sizes_out_and_leaves_the_section_alone():
    config = section()
    resolved = config.resolve(3)
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["train_batch_size"] == 12
    assert config.raw == MICRO and "train_batch_size" not in config.filled


def test_what_deepspeed_is_given_has_no_optimizer_or_scheduler_of_its_own():
    config = section(
        optimizer={"type": "SGD", "params": {"lr": 0.1}}, scheduler={"type": "WarmupLR"}
    ).engine_config(1, parameters=9)
    assert not {"optimizer", "scheduler"} & set(config)
    assert config["zero_allow_untested_optimizer"] is True


def test_buckets_are_no_larger_than_the_stage_unless_somebody_wrote_so():
    def bucket(stage: int, **zero: Any) -> Any:
        config = section(zero_optimization={"stage": stage, **zero})
        return config.engine_config(1, parameters=1000)["zero_optimization"]["reduce_bucket_size"]

    assert [bucket(stage) for stage in (1, 2, 3)] == [1000] * 3
    assert bucket(2, reduce_bucket_size=5_000) == 5_000


def test_half_precision_accumulates_gradients_in_fp32_unless_somebody_wrote_otherwise():
    def accumulates(**more: Any) -> Any:
        config = section(zero_optimization={"stage": 2}, bf16={"enabled": True}, **more)
        return config.engine_config(1, parameters=9)["data_types"]["grad_accum_dtype"]

    assert accumulates() == "fp32"
    assert accumulates(data_types={"grad_accum_dtype": "bf16"}) == "bf16"


HALF = {"enabled": True}
REFUSED_BY: list[tuple[str, dict[str, Any], str]] = [
    ("none", {"zero_optimization": {"stage": 2}}, "'none' keeps everything on every rank"),
    ("ddp", {"zero_optimization": {"stage": 1}}, "'ddp' keeps everything on every rank"),
    ("fsdp", {}, "is 0, but scpl.sharding 'fsdp' shards"),
    ("fsdp", {"zero_optimization": {"stage": 1}}, "is 1, but scpl.sharding 'fsdp' shards"),
    (
        "fsdp",
        {"zero_optimization": {"stage": 3, "overlap_comm": True}},
        "zero_optimization.overlap_comm: has no effect with scpl.sharding: fsdp",
    ),
    (
        "fsdp",
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
        "FSDP2 offloads parameters, gradients and optimizer state together",
    ),
    (
        "fsdp",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        "FSDP2 offloads parameters, gradients and optimizer state together",
    ),
    ("ddp", {"fp16": {"enabled": True, "loss_scale": 128}}, "torch's GradScaler, which has no"),
    ("none", {"wall_clock_breakdown": True}, "has no effect with scpl.sharding: none"),
    ("ddp", {"wall_clock_breakdown": True}, "has no effect with scpl.sharding: ddp"),
    (
        "none",
        {"bf16": HALF, "data_types": {"grad_accum_dtype": "bf16"}},
        "scpl.sharding 'none' accumulates in fp32",
    ),
]


@pytest.mark.parametrize(("sharding", "config", "text"), REFUSED_BY, ids=str)
def test_what_a_backend_cannot_do_is_refused_by_name(
    sharding: str, config: dict[str, Any], text: str
):
    problems = unsupported(DeepSpeedSection(MICRO | config), sharding)
    assert any(text in f"{p.path}: {p.message}" for p in problems), problems


def test_clipping_can_be_switched_off():
    assert section(gradient_clipping=0).gradient_clipping == 0.0
    assert section({"max_grad_norm": 0.0}).gradient_clipping == 0.0
