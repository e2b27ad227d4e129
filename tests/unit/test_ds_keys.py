"""The table of known keys is what the installed DeepSpeed reads: drift shows here first."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from scpl_ds import ds_keys
from scpl_ds.ds_keys import Keys

MODELS = [
    ("ZERO", "runtime.zero.config", "DeepSpeedZeroConfig"),
    ("OFFLOAD_PARAM", "runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    ("OFFLOAD_OPTIMIZER", "runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
    ("ZENFLOW", "runtime.zenflow.zenflow_config", "ZenFlowConfig"),
    ("LEAF_MODULE", "runtime.zero.leaf_module_config", "DeepSpeedZeroLeafModuleConfig"),
    ("BF16", "runtime.precision_config", "DeepSpeedBF16Config"),
    ("FP16", "runtime.precision_config", "DeepSpeedFP16Config"),
    ("TENSORBOARD", "monitor.config", "TensorBoardConfig"),
    ("CSV_MONITOR", "monitor.config", "CSVConfig"),
    ("WANDB", "monitor.config", "WandbConfig"),
    ("COMET", "monitor.config", "CometConfig"),
    ("COMMS_LOGGER", "comm.config", "CommsLoggerConfig"),
    ("THROUGHPUT_TIMER", "utils.config", "DeepSpeedThroughputTimerConfig"),
    ("COMPILE", "compile.config", "CompileConfig"),
    ("HYBRID_ENGINE", "runtime.config", "HybridEngineConfig"),
]


def kind_of(annotation: Any) -> str:
    """The table's word for a pydantic annotation."""
    inner = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) in (list,) or annotation is list:
        return "list"
    if get_origin(annotation) is Literal:
        return "str"
    if inner:
        kinds = {kind_of(a) for a in inner}
        return kinds.pop() if len(kinds) == 1 else "any"
    words = {bool: "bool", int: "int", float: "float", str: "str", Path: "str"}
    if annotation in words:
        return words[annotation]
    return "section" if hasattr(annotation, "model_fields") else "enum"


@pytest.mark.parametrize(("table", "module", "name"), MODELS, ids=[m[0] for m in MODELS])
def test_a_section_of_the_table_equals_the_model_of_the_installed_deepspeed(
    table: str, module: str, name: str
):
    known: Keys = getattr(ds_keys, table)
    fields = getattr(importlib.import_module(f"deepspeed.{module}"), name).model_fields
    theirs = {field.alias or key: kind_of(field.annotation) for key, field in fields.items()}
    assert set(known) == set(theirs)
    for key, kind in theirs.items():
        ours = known[key]
        if kind == "section":
            assert isinstance(ours, dict), key
        elif kind == "enum":  # ZeRO stage is written as a number, a device as a text
            assert ours in ("int", "str"), key
        else:
            assert ours == kind, key


CONSTANTS = [
    (
        "ACTIVATION_CHECKPOINTING",
        "runtime.activation_checkpointing.config",
        r"ACT_CHKPT_(?!DEFAULT)",
    ),
    ("FLOPS_PROFILER", "profiling.constants", r"FLOPS_PROFILER_"),
    ("AIO", "runtime.swap_tensor.constants", r"AIO_"),
]


@pytest.mark.parametrize(("table", "module", "prefix"), CONSTANTS, ids=[c[0] for c in CONSTANTS])
def test_a_section_without_a_model_equals_deepspeeds_constants(
    table: str, module: str, prefix: str
):
    constants = vars(importlib.import_module(f"deepspeed.{module}"))
    theirs = {
        value
        for name, value in constants.items()
        if re.match(prefix, name) and not name.endswith(("_DEFAULT", "_FORMAT"))
    }
    assert set(getattr(ds_keys, table)) == theirs


def test_the_top_level_equals_what_deepspeeds_config_code_reads():
    """Every key that ``runtime/config.py`` and its helpers look up, found in their source."""
    deepspeed = importlib.import_module("deepspeed")
    root = Path(deepspeed.__file__).parent
    constants: dict[str, str] = {}
    files = [
        "runtime/constants.py",
        "runtime/data_pipeline/constants.py",
        "runtime/model_checkpointing/constants.py",
        "runtime/swap_tensor/constants.py",
        "profiling/constants.py",
        "autotuning/constants.py",
        "comm/constants.py",
        "utils/config.py",
        "datastates/config.py",
        "runtime/config.py",
        "runtime/precision_config.py",
        "runtime/zero/config.py",
        "runtime/activation_checkpointing/config.py",
        "runtime/tensor_parallel/config.py",
    ]
    sources = {f: (root / f).read_text() for f in files}
    for text in sources.values():
        constants |= dict(re.findall(r"^([A-Z][A-Z0-9_]*) = ['\"]([a-z0-9_]+)['\"]$", text, re.M))
    read = re.compile(
        r"(?:get_scalar_param\(\s*|\()param_dict,\s*([A-Z_0-9]+)"
        r"|\bparam_dict\.get\((['\"]\w+['\"]|[A-Z_0-9]+)"
        r"|(['\"]\w+['\"]|[A-Z_0-9]+) (?:not )?in (?:param_dict|ds_config|config)\b(?!\[)"
    )
    found: set[str] = set()
    for file, text in sources.items():
        if file.endswith("constants.py"):
            continue
        for groups in read.findall(text):
            word = next(g for g in groups if g)
            found.add(word.strip("'\"") if word[0] in "'\"" else constants.get(word, ""))
    found -= {"", *ds_keys.REMOVED}
    assert found, "the pattern finds nothing: DeepSpeed reads its config in another way now"
    missing = found - set(ds_keys.TOP)
    assert not missing, f"DeepSpeed {deepspeed.__version__} also reads {sorted(missing)}"
    sources["monitor"] = (root / "monitor/config.py").read_text()
    text = "".join(sources.values())
    gone = [k for k in ds_keys.TOP if not re.search(rf"[\"']{k}[\"']|\b{k}: ", text)]
    assert not gone, f"DeepSpeed {deepspeed.__version__} no longer reads {gone}"


def test_removed_keys_are_those_the_installed_deepspeed_refuses():
    config = importlib.import_module("deepspeed.runtime.config")
    assert set(ds_keys.REMOVED) == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert set(ds_keys.REMOVED_ZERO) == set(config._REMOVED_ZERO_CONFIG_KEYS)


def test_every_optimizer_and_scheduler_of_deepspeed_is_supported_or_refused_by_name():
    config = importlib.import_module("deepspeed.runtime.config")
    schedules = importlib.import_module("deepspeed.runtime.lr_schedules")
    ours = {*ds_keys.OPTIMIZER_PARAMS, *(o.lower() for o in ds_keys.OTHER_OPTIMIZERS)}
    assert ours - {"sgd"} == set(config.DEEPSPEED_OPTIMIZERS)
    ours = {*ds_keys.SCHEDULER_PARAMS, *ds_keys.OTHER_SCHEDULERS}
    assert ours == set(schedules.VALID_LR_SCHEDULES)
