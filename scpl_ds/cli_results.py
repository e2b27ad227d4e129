"""What a command found, for people; programs get the same as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.text import Text

from scpl_ds.memory_sizes import show_size


def result_in_words(result: Mapping[str, Any]) -> str:
    """A line each for the score, what it took, where things are, and what to do next.

    Args:
        result: What ``trainer.fit`` returns.
    """
    lines = list(_stopped(result) if "stopped" in result else _finished(result))
    return "\n".join(["", *(f"{name:<11}{words}" for name, words in lines)])


def _stopped(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Stopped", f"by {result['stopped']} after step {result['steps']}"
    yield "Saved", str(result["checkpoint"])
    yield "Run", str(result["run_dir"])


def _finished(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    run, export = str(result["run_dir"]), result.get("export_dir")
    yield from _scores(result, exported=export is not None)
    seconds = result["train_seconds"]
    yield (
        "Trained",
        (
            f"{result['steps']} steps in {seconds:.0f} s, {result['tokens_per_s']:.4g} tokens/s, "
            f"{result['stages']} stage{'s' * (result['stages'] != 1)} on "
            f"{result['ranks']} rank{'s' * (result['ranks'] != 1)}"
        ),
    )
    if peaks := result.get("peak_memory_bytes"):
        yield "Memory", f"{show_size(max(peaks))} at the peak of a rank, without Python's own"
    yield "Run", run
    yield "Export", "none (train.export: false)" if export is None else str(export)
    if url := result.get("hub_url"):
        yield "Hub", str(url)
    quoted = shlex.quote(run)
    yield "Next", f"scpl-ds report {quoted}"
    if any(_known(result, name) is not None for name in ("accuracy", "perplexity")):
        yield "", f"scpl-ds eval {quoted}"
    if _known(result, "perplexity") is not None and export is not None:
        yield "", f'scpl-ds generate {quoted} --prompt "..."'
    yield "", f"everything is in {run}/result.json (--json prints it)"


def _scores(result: Mapping[str, Any], *, exported: bool) -> Iterator[tuple[str, str]]:
    whose = "of the exported model" if exported else "of the stages"
    perplexity, accuracy = _known(result, "perplexity"), _known(result, "accuracy")
    if perplexity is not None:
        yield "Perplexity", f"{perplexity:.4g} {whose}"
    elif accuracy is None:
        yield "Score", "not evaluated (train.eval_strategy, and evaluation data)"
    else:
        majority = result.get("majority_accuracy")
        beside = "" if majority is None else f"; {majority:.1%} for the most frequent class alone"
        yield "Accuracy", f"{accuracy:.1%} {whose}{beside}"
    if best := result.get("best_model_checkpoint"):
        yield "Best", f"{result.get('best_metric'):.4g}, {best}"


def _known(result: Mapping[str, Any], name: str) -> float | None:
    found = result.get(f"eval_{name}")
    return found if found is not None else result.get(f"stage_eval_{name}")


def texts_in_words(prompts: Iterable[str], texts: Iterable[str], *, chat: bool) -> Text:
    """Each prompt, in bold on a terminal, with what the model wrote behind it; in a chat below."""
    found = Text()
    for prompt, text in zip(prompts, texts, strict=True):
        found.append("\n\n" if found else "")
        found.append(f"> {prompt}\n" if chat else prompt, style="bold")
        found.append(text.strip() if chat else text)
    return found
