"""``scpl-ds``: train, eval, plan, export, report, doctor and schema on the command line."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scpl_ds import __version__, cli_types
from scpl_ds.bench import commands as commands_of_bench
from scpl_ds.cli_log import log_to_console, log_to_file, rank_number, run_has_begun
from scpl_ds.distributed.slurm import variables_of_step
from scpl_ds.errors import FAILED_RUN, OtherRankFailed, RecipeError, ScplError

log = logging.getLogger(__name__)

_GRACE_S = 3.0
_RANKS = "ranks to place the stages on; without it scpl.pipeline_ranks, or one a stage"
_RESULT = "end with the result as JSON on a terminal too, as in a file or pipe"
_OVERRIDES = "key=value with the value as YAML, for example train.max_steps=20"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 1 when a run failed; 2 when a recipe, model, data set or checkpoint cannot be used as
        asked (nothing was trained).
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml", ".json")):
        words.insert(0, "train")
    args, extra = parser.parse_known_args(words)
    unknown = [word for word in extra if "=" not in word or word.startswith("-")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}; overrides are {_OVERRIDES}")
    if extra and not hasattr(args, "overrides"):
        parser.error(f"{extra[0]!r}: this command takes no overrides")
    args.overrides = [*getattr(args, "overrides", []), *extra]
    os.environ.update(variables_of_step(os.environ))
    log_to_console()
    os.umask(os.umask(0o022) | 0o002)  # nobody else may change a checkpoint, whatever is allowed
    try:
        return args.run(args)
    except ScplError as error:
        code = _report(error)
        if code == 2:  # found by all ranks together, so that nobody is left waiting
            _leave()
        return code
    except KeyboardInterrupt:
        sys.stderr.write("scpl-ds: interrupted\n")
        return 130


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; argparse puts the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"scpl-ds: {message} (`{self.prog} --help` shows what there is)\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its arguments; docs/cli.md is made of it."""
    parser = _Parser(
        prog="scpl-ds",
        description="Fine-tune Hugging Face transformers in pipeline stages that never wait for a "
        "backward pass. A recipe alone means `train`.",
    )
    parser.add_argument("--version", action="version", version=f"scpl-ds {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    train = add("train", _train, "Train a recipe, on the launcher's ranks or in this process.")
    train.add_argument("recipe", help="YAML or JSON file")
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
    train.add_argument("--json", action="store_true", help=_RESULT)
    plan = add(
        "plan", _plan, "Print how a recipe's model is cut; starts no processes, loads no weights."
    )
    plan.add_argument("recipe", help="YAML or JSON file")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
    plan.add_argument("--ranks", type=cli_types.ranks, default=None, help=_RANKS)
    plan.add_argument(
        "--memory", type=cli_types.size, default=None, metavar="SIZE",
        help="memory of one device, for example 80GiB: says which backends and ZeRO stages fit",
    )  # fmt: skip
    plan.add_argument(
        "--device", choices=("cpu", "cuda"), help="predict memory for it; default: what is here"
    )
    score = add("eval", _eval, "Score a run's latest checkpoint over its stages.")
    score.add_argument("run_dir", metavar="RUN", help="run folder, or one of its checkpoints")
    score.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=_OVERRIDES)
    score.add_argument("--logits", type=Path, default=None, help="write logits as safetensors")
    score.add_argument(
        "--exit-threshold", type=cli_types.thresholds, default=(), metavar="P,...",
        help="also let samples leave at the first local head that is so sure; says what it costs",
    )  # fmt: skip
    score.add_argument(
        "--exit-patience", type=cli_types.patiences, default=(), metavar="N,...",
        help="also let samples leave where so many further heads in a row agree",
    )  # fmt: skip
    speak = add("generate", _generate, "Continue prompts with a run's trained language model.")
    speak.add_argument("run_dir", metavar="RUN", help="run folder, or one of its checkpoints")
    speak.add_argument(
        "--prompt", action="append", required=True, help="text to continue; may be repeated"
    )
    speak.add_argument("--chat", action="store_true", help="as a user's message, in the template")
    speak.add_argument(
        "--max-new-tokens",
        type=cli_types.ranks,
        default=64,
        metavar="N",
        help="default: %(default)s",
    )
    speak.add_argument(
        "--temperature", type=cli_types.temperature, default=0.0, metavar="T",
        help="above 0 tokens are drawn; default: the likeliest",
    )  # fmt: skip
    speak.add_argument("--seed", type=int, default=0, help="of what is drawn; default: 0")
    speak.add_argument("--json", action="store_true", help="write a JSON object a line")
    export = add("export", _export, "Write a run's latest checkpoint as a Hugging Face folder.")
    export.add_argument("run_dir", metavar="RUN", help="run folder, or one of its checkpoints")
    export.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    export.add_argument(
        "--task",
        choices=("sequence-classification", "causal-lm"),
        help="for a checkpoint of engine.save_checkpoint, which has no recipe beside it",
    )
    export.add_argument(
        "--merge", action="store_true", help="of a run with LoRA: add the adapter to the weights"
    )
    export.add_argument(
        "--max-shard-size", type=cli_types.size, metavar="SIZE", help="default: 5GB"
    )
    export.add_argument(
        "--push-to-hub", type=cli_types.repository, metavar="OWNER/NAME",
        help="then upload it to this repository of the hub, made if need be; token: HF_TOKEN",
    )  # fmt: skip
    export.add_argument("--private", action="store_true", help="make that repository private")
    export.add_argument("--revision", help="branch to upload to; default: main")
    report = add("report", _make_report, "Make one HTML page of a run, or of several.")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    report.add_argument("--out", type=Path, default=None, help="default: report.html in the first")
    bench = add("bench", _bench, "Measure: prints a table, writes JSON.")
    commands_of_bench.add_to(bench, _bench)
    doctor = add("doctor", _doctor, "Check this machine, and under a launcher its ranks.")
    doctor.add_argument("--json", action="store_true", help="write the findings as JSON")
    doctor.add_argument(
        "--output-dir", type=Path, default=Path("runs"), metavar="DIR",
        help="where runs are going to be written; default: %(default)s",
    )  # fmt: skip
    doctor.add_argument(
        "--timeout", type=cli_types.ranks, default=60, metavar="S",
        help="seconds to wait for other ranks; default: %(default)s",
    )  # fmt: skip
    schema = add("schema", _schema, "Print the JSON schema of recipes, for editors.")
    schema.add_argument("--out", type=Path, default=None, help="write it to a file")
    return parser


# -- commands ------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
    from scpl_ds.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    _choose_accelerator()
    from scpl_ds.cli_results import result_in_words
    from scpl_ds.trainer import fit

    result = fit(recipe, on_ready=log_to_file)
    if rank_number() == 0:
        for_people = sys.stdout.isatty() and not args.json
        text = result_in_words(result) if for_people else json.dumps(result, indent=2)
        sys.stdout.write(text + "\n")
    _leave()
    return 0


def _plan(args: argparse.Namespace) -> int:
    from scpl_ds.partition.plan import render_plan
    from scpl_ds.recipe import check_world, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    _choose_accelerator()
    from scpl_ds.distributed.world import RankEnv, pick_device
    from scpl_ds.memory import Workload
    from scpl_ds.memory_report import describe
    from scpl_ds.recipe_words import method_in_words
    from scpl_ds.setup import cut_model
    from scpl_ds.setup_schedule import draw_schedule

    model = cut_model(recipe)
    asked = recipe.scpl.pipeline_ranks
    ranks = args.ranks or (recipe.scpl.stages if asked == "auto" else asked)
    pipeline_ranks, dp_size = check_world(recipe, ranks)
    table = render_plan(
        model.plan, model.anatomy, pipeline_ranks=pipeline_ranks, data_parallel=dp_size
    )
    drawing = ""
    if pipeline_ranks > 1:  # one rank works on one stage after the other: nothing to draw
        drawing = draw_schedule(recipe, model.plan.num_stages, 4)
        drawing = f"schedule '{recipe.scpl.order}'\n{drawing}\n"
    device = args.device or pick_device(RankEnv.current()).type
    workload = Workload.of(recipe, model, device)
    needs = describe(workload, pipeline_ranks=pipeline_ranks, dp_size=dp_size, memory=args.memory)
    grid = f"{ranks} ranks = {pipeline_ranks} pipeline x {dp_size} data-parallel"
    table += "" if args.ranks else f"\nplanned for {grid}; another number: --ranks N"
    words = method_in_words(recipe.to_mapping()["scpl"])
    sys.stdout.write(f"{table}\n\n{needs}\n\nmethod {words}\n{drawing}")
    return 0


def _eval(args: argparse.Namespace) -> int:
    recipe, folder = _open(args.run_dir, args.overrides)
    _choose_accelerator()
    from scpl_ds.evaluation import evaluate_run

    scores = evaluate_run(
        recipe,
        folder,
        logits_file=args.logits,
        exit_thresholds=args.exit_threshold,
        exit_patiences=args.exit_patience,
    )
    if rank_number() == 0:
        sys.stdout.write(json.dumps({"checkpoint": str(folder), **scores}, indent=2) + "\n")
    _leave()
    return 0


def _generate(args: argparse.Namespace) -> int:
    recipe, folder = _open(args.run_dir, [])
    _choose_accelerator()
    from rich.console import Console

    from scpl_ds.cli_results import texts_in_words
    from scpl_ds.generation import generate

    found = generate(
        recipe,
        folder,
        args.prompt,
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
    )
    if args.json:
        for prompt, text in zip(args.prompt, found, strict=True):
            line = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False)
            sys.stdout.write(line + "\n")
    else:
        words = texts_in_words(args.prompt, found, chat=args.chat)
        Console(highlight=False, soft_wrap=True).print(words)
    return 0


def _export(args: argparse.Namespace) -> int:
    from scpl_ds import checkpoint
    from scpl_ds.checkpoint_damage import task_of

    if args.push_to_hub is None and (args.private or args.revision):
        raise RecipeError("--private and --revision say where --push-to-hub uploads; add it.")
    where, task = Path(args.run_dir).expanduser(), args.task
    if task is None and (where / checkpoint.MANIFEST).is_file():
        task = task_of(checkpoint.Reader(where).manifest)  # wherever it was copied to
    if task is None:  # else a checkpoint of engine.save_checkpoint: no recipe beside it
        task = _open(args.run_dir, [])[0].model.task
    folder = checkpoint.resolve(where)
    _choose_accelerator()
    from scpl_ds.export import SHARD_BYTES, export_checkpoint
    from scpl_ds.export_hub import Destination, push
    from scpl_ds.run_folder import result_of

    size, out = args.max_shard_size or SHARD_BYTES, args.out.expanduser()
    scores = result_of(folder)
    export_checkpoint(folder, out, task=task, merge=args.merge, max_shard_size=size, result=scores)
    sys.stdout.write(f"{out}\n")
    if args.push_to_hub is not None:
        to = Destination(args.push_to_hub, args.private or None, args.revision)
        sys.stdout.write(f"{push(out, to, message=f'scpl_ds: {folder.name}')}\n")
    return 0


def _bench(args: argparse.Namespace) -> int:
    _choose_accelerator()

    from scpl_ds.recipe_files import write_output

    def save(figures: Any) -> None:
        if args.json is not None:
            write_output(args.json, json.dumps(figures, indent=1) + "\n", key="--json")

    if args.json is not None:
        write_output(args.json, "", key="--json", mode="a")  # refused now, not after an hour
    text = commands_of_bench.COMMANDS[args.what].run(args, save)
    sys.stdout.write(text + "\n")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    _choose_accelerator()
    from scpl_ds.doctor import examine
    from scpl_ds.doctor_findings import render

    logging.getLogger("scpl_ds").setLevel(logging.ERROR)  # what it finds is said below
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed writes its log there
        report = examine(args.output_dir, timeout_s=args.timeout)
    if rank_number() == 0 or not report.complete:
        text = render(report.found, report.world_size)
        sys.stdout.write((json.dumps(report.as_json(), indent=1) if args.json else text) + "\n")
    _leave()
    return report.exit_code


def _make_report(args: argparse.Namespace) -> int:
    from scpl_ds.report.page import write

    sys.stdout.write(f"{write(args.runs, args.out)}\n")
    return 0


def _schema(args: argparse.Namespace) -> int:
    from scpl_ds.recipe import recipe_schema
    from scpl_ds.recipe_files import write_output

    text = json.dumps(recipe_schema(), indent=2) + "\n"
    if args.out is None:
        sys.stdout.write(text)
    else:
        write_output(args.out, text, key="--out")
    return 0


def _open(path: str, overrides: list[str]):
    """A run's recipe and the checkpoint meant: the folder itself, or the latest in it."""
    from scpl_ds import checkpoint
    from scpl_ds.run_folder import open_run

    where = Path(path).expanduser()
    inside = (where / checkpoint.MANIFEST).is_file() or where.name.startswith("checkpoint-")
    _, recipe = open_run(where.parent if inside else where, overrides)
    return recipe, checkpoint.resolve(where)


def _choose_accelerator() -> None:
    """Tell DeepSpeed of a machine without a GPU; unasked it would print on stdout that it looked.

    transformers imports DeepSpeed by itself, so this comes before it.
    """
    import torch

    # Otherwise asking would make CUDA unusable in forks, which benchmarks train in.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _report(error: ScplError) -> int:
    """Say what is wrong in one message and without a traceback; every rank says its own only."""
    log.debug("traceback of the error", exc_info=True)
    # Before there is a world all ranks find the same; rank 0 speaks for them.
    silent = isinstance(error, OtherRankFailed) or (rank_number() > 0 and not _in_a_world())
    if silent:
        # A launcher ends all ranks as soon as one has left: let the one that speaks finish.
        time.sleep(_GRACE_S)
    else:
        where = f" [rank {rank_number()}]" if rank_number() else ""
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        sys.stderr.write(f"scpl-ds:{where} {type(error).__name__}: {error}{notes}\n")
    return 1 if isinstance(error, FAILED_RUN) or run_has_begun() else 2


def _in_a_world() -> bool:
    world = sys.modules.get("scpl_ds.distributed.world")  # not imported: nothing has begun
    return world is not None and world.has_begun()


def _leave() -> None:
    if _in_a_world():
        sys.modules["scpl_ds.distributed.world"].shut_down()
