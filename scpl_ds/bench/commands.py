"""The benchmarks of ``scpl-ds bench``: one entry each. Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

Save = Callable[[Any], None]
"""Rewrites the file of ``--json``, if there is one; called as often as there is something new."""


@dataclasses.dataclass(frozen=True)
class Command:
    """One benchmark. ``module`` has ``main(args, save) -> str``: what goes to stdout."""

    text: str
    module: str
    add_options: Callable[[argparse.ArgumentParser], None]

    def run(self, args: argparse.Namespace, save: Save) -> str:
        return importlib.import_module(self.module).main(args, save)


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", choices=("standard", "large", "gpu"), default="standard",
        help="standard: GPT-2 124 M, backprop and 2-8 stages, all backends, 3 GB a rank and up to "
        "4 ranks, about 20 minutes on 2 busy CPU cores; large: Llama 0.7 B in bf16, optimizer "
        "offloaded, 2 ranks of 10 GB, about 8 minutes; gpu: Llama 1.5 B in bf16 on one CUDA "
        "device, not timed yet; default: %(default)s",
    )  # fmt: skip


def _model_and_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="bert-8l",
        help="a size with random weights (bert-8l, bert-11m, gpt2-124m ...), a folder or a hub "
        "name; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seq", type=_count, default=64, help="tokens; default: %(default)s")


def _pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=_count, default=2, help="processes; default: %(default)s")
    parser.add_argument(
        "--data-parallel", type=_count, default=1, metavar="D",
        help="of them with the same stage, which share the samples of a micro-batch: "
        "ranks / D stages; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--micro-batches", type=_counts, default=(1, 2, 4, 8), metavar="M,...",
        help="micro-batches of one optimizer step; default: 1,2,4,8",
    )  # fmt: skip
    _model_and_length(parser)
    parser.add_argument(
        "--micro-batch-size", type=_count, default=4, help="samples; default: %(default)s"
    )
    parser.add_argument(
        "--repeats", type=_count, default=5,
        help="runs of every system, taken in turn; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=_count, default=None,
        help="optimizer steps of one run; default: 48 micro-batches where stages run ahead and 16 "
        "where every step is flushed, 800 and 40 with --emulate; at least 4 steps",
    )  # fmt: skip
    parser.add_argument("--threads", type=_count, default=1, help="of a rank; default: %(default)s")
    parser.add_argument("--systems", type=_names, default=None, metavar="A,B",
        help="only these; a wrong name lists them all",
    )  # fmt: skip
    parser.add_argument(
        "--namespaces", type=_names, default=(), metavar="A,B",
        help="network namespaces as hosts, as many ranks in each, those of a stage beside each "
        "other (root; launch/namespaces.sh makes them, with a rate and a delay); bytes sent are "
        "then those of their interfaces",
    )  # fmt: skip
    parser.add_argument(
        "--emulate", type=_milliseconds, default=None, metavar="FORWARD_MS,BACKWARD_MS",
        help="stages sleep so long for a micro-batch instead of computing: many ranks on few cores",
    )  # fmt: skip


def _head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--micro-batches", type=_counts, default=(4, 8, 32), metavar="B,...",
        help="samples of a micro-batch; default: 4,8,32",
    )  # fmt: skip
    parser.add_argument("--hidden-size", type=_count, default=256, help="default: %(default)s")
    parser.add_argument("--layers", type=_count, default=8, help="default: %(default)s")
    parser.add_argument("--seq", type=_count, default=64, help="tokens; default: %(default)s")
    parser.add_argument(
        "--vocab", type=_count, default=4096, help="tokens that there are; default: %(default)s"
    )
    parser.add_argument(
        "--task", choices=("sequence-classification", "causal-lm"),
        default="sequence-classification", help="a BERT's stage, or a Llama's",
    )  # fmt: skip
    parser.add_argument(
        "--objectives", type=_names, default=None, metavar="A,B",
        help="default: supcon, and logit_lens of a language model",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=_count, default=30, help="timings of each; default: %(default)s"
    )


def _predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inputs", type=Path, default=None, metavar="FILE",
        help="JSON with the times, as this command prints it; without it they are measured here",
    )  # fmt: skip
    _model_and_length(parser)
    parser.add_argument(
        "--micro-batch-size", type=_count, default=16,
        help="the most samples a device computes at once; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--global-batch", type=_count, default=1024, help="samples a step; default: %(default)s"
    )
    parser.add_argument(
        "--gbit", type=float, default=10.0, help="of the network a second; default: %(default)s"
    )
    parser.add_argument(
        "--latency-us", type=float, default=50.0, help="of the network; default: %(default)s"
    )


def _quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML or JSON file; its evaluation data are the test set")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="as in `scpl-ds train`"
    )
    parser.add_argument(
        "--methods", type=_names, default=("bp", "default", "early_exit", "associated", "freeze"),
        metavar="A,B", help="bp, joint, freeze (the last stage only is trained), default (what a "
        "recipe gets that names no objective), untrained (the model as it came), names of "
        "objectives, and names of --variants; "
        "default: bp,default,early_exit,associated,freeze",
    )  # fmt: skip
    parser.add_argument(
        "--stages", type=_counts, default=(2,), metavar="K,...",
        help="default: 2; bp and untrained have none",
    )  # fmt: skip
    parser.add_argument("--seeds", type=_count, default=3, help="how many; default: %(default)s")
    parser.add_argument(
        "--learning-rates", type=_numbers, default=None, metavar="A,B",
        help="tried with the first seed, the best by validation kept; default: the recipe's",
    )  # fmt: skip
    parser.add_argument(
        "--validation", type=_share, default=0.1, metavar="SHARE",
        help="of the training data, held out to select by; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--variants", type=Path, default=None, metavar="FILE",
        help="YAML: name -> keys of a recipe's scpl section",
    )  # fmt: skip
    parser.add_argument(
        "--also", type=Path, nargs="+", default=(), metavar="FILE",
        help="plain texts that no method learns from: each language model's perplexity on them",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=_count, default=None,
        help="trainings at a time, one thread each; default: as many as cores, 1 on a GPU",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="FILE",
        help="draw accuracy against stages and against time (needs matplotlib)",
    )  # fmt: skip


def _chaos(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kills", type=_count, default=50, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of ranks and moments; default: %(default)s"
    )


COMMANDS: dict[str, Command] = {
    "chaos": Command(
        "Kill ranks of a small run at random moments, resume it, compare it with one left alone.",
        "scpl_ds.bench.chaos",
        _chaos,
    ),
    "head": Command("What the local objective costs a stage.", "scpl_ds.bench.head", _head),
    "memory": Command(
        "Peak memory of every rank, beside what was predicted.", "scpl_ds.bench.memory", _memory
    ),
    "pipeline": Command(
        "Throughput of the pipeline, beside backprop pipelines on the same ranks.",
        "scpl_ds.bench.pipeline",
        _pipeline,
    ),
    "quality": Command(
        "Accuracy of every method on a recipe's data, beside backprop.",
        "scpl_ds.bench.quality",
        _quality,
    ),
    "predict": Command(
        "Predicted throughput on 2 to 1024 GPUs, from times measured on this one.",
        "scpl_ds.bench.predict",
        _predict,
    ),
}


def add_to(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """A subcommand for every entry of ``COMMANDS``; ``args.what`` names the one chosen."""
    kinds = parser.add_subparsers(required=True, metavar="WHAT", dest="what")
    for name, command in COMMANDS.items():
        sub = kinds.add_parser(name, help=command.text, description=command.text)
        command.add_options(sub)
        sub.add_argument(
            "--json", type=Path, default=None,
            help="write the figures to a file, again after each of them",
        )  # fmt: skip
        sub.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_count(part.strip()) for part in text.split(",")))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        numbers = (-1.0,)
    if not all(0 < number < 1e6 for number in numbers):
        raise argparse.ArgumentTypeError(f"must be numbers above 0, as in 2e-5,5e-5; got {text!r}")
    return numbers


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return share


def _milliseconds(text: str) -> tuple[float, float]:
    try:
        forward, backward = (float(part) for part in text.split(","))
    except ValueError:
        forward = backward = -1.0
    if not (0 < forward < 1e6 and 0 < backward < 1e6):
        raise argparse.ArgumentTypeError(
            f"must be two numbers of milliseconds above 0, as in 5,10; got {text!r}"
        )
    return forward, backward
