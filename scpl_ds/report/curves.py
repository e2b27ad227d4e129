"""Which curves a page has: every metric of a run but the shares of time, which are bars."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from scpl_ds.report.charts import Chart, Level, Series
from scpl_ds.report.reading import Points, RunFiles

_STAGE = re.compile(r"stage(\d{1,9})/(\w+)")
_RATE = "perf/tokens_per_s"
_RANK = re.compile(r"perf/rank(\d{1,9})/(\w+)")
_SHOWN = frozenset({"lr", "epoch", "head/loss", "val/loss", "val/accuracy", "val/perplexity"})
_EXIT = re.compile(r"val/accuracy_after_layer_(\d{1,9})")
_TITLES = {
    "valid_anchor_fraction": "Rows with a positive, share",
    "valid_token_fraction": "Tokens with a positive, share",
    "exit_accuracy": "Accuracy of the local classifier",
    "token_accuracy": "Accuracy of the local next-token head",
    "prototype_accuracy": "Accuracy of the nearest prototype",
    "nearest_class_accuracy": "Accuracy of the nearest class mean",
    "feature_rank": "Effective rank of the features",
    "alignment": "Distance within a class (alignment)",
    "uniformity": "Spread of the features (uniformity)",
    "local_loss": "Local objective alone",
    "ahead_loss": "Task loss behind the lookahead",
    "bridge_loss": "Loss of the bridge",
    "code_loss": "Loss of the label code",
    "supcon_loss": "Supervised contrastive loss",
    "similarity_loss": "Similarity matching loss",
    "variance_loss": "Variance term",
    "invariance_loss": "Invariance term",
    "covariance_loss": "Covariance term",
    "loss_scale": "Loss scale (fp16)",
    "skipped_steps": "Skipped steps (fp16)",
    "perf/samples_per_s": "Samples per second",
    "val/token_accuracy": "Validation accuracy of the next token",
}


def loss_charts(run: RunFiles) -> list[Chart]:
    """Losses of stages and task, scores, learning rate, gradient norms."""
    stages, metrics = _by_stage(run, "loss"), run.metrics
    head, last = metrics.get("head/loss", []), max(stages, default=0)
    local = [Series(f"stage {k}", points, k) for k, points in stages.items() if points != head]
    task = [
        Series(f"training (stage {last})" if stages else "training", head, last),
        Series("validation", metrics.get("val/loss", []), last + 1, marks=True),
    ]
    charts = [
        Chart(f"Local loss of {_these(local)}", local, "stage{k}/loss"),
        Chart("Task loss", task, "head/loss, val/loss"),
    ]
    charts += [score_chart([_score(run, "validation", 0)], run.perplexed, run.majority)]
    norms = [Series(f"stage {k}", p, k) for k, p in _by_stage(run, "grad_norm").items()]
    charts += [
        Chart("Gradient norm before clipping", norms, "stage{k}/grad_norm", may_be_log=True),
        Chart(
            "Learning rate", [Series("learning rate", metrics.get("lr", []))], "lr", from_zero=True
        ),
    ]
    return _placed(run, charts)


def speed_charts(run: RunFiles) -> list[Chart]:
    """Throughput, waiting and memory over the steps."""
    metrics, waits = run.metrics, []
    for name, points in metrics.items():
        if (place := _RANK.fullmatch(name)) and place[2] == "bubble_fraction":
            waits.append(Series(f"rank {place[1]}", points, int(place[1])))
    waits = waits or [Series("mean of all ranks", metrics.get("perf/bubble_fraction", []))]
    peak = Series("the rank with most", metrics.get("perf/peak_memory_gib", []))
    charts = [
        Chart("Throughput", [_tokens(run, "tokens/s", 0)], _RATE, "tokens/s", from_zero=True),
        Chart(
            "Waiting for other ranks",
            waits,
            "perf/bubble_fraction",
            "% of the time",
            100,
            from_zero=True,
        ),
        Chart(
            "Peak memory of a process, libraries included",
            [peak],
            "perf/peak_memory_gib",
            "GiB",
            from_zero=True,
        ),
    ]
    return _placed(run, charts)


def other_charts(run: RunFiles) -> list[Chart]:
    """What is in none of the others: diagnostics, and metrics of objectives of one's own."""
    found: dict[str, list[Series]] = {}
    shown = {"loss", "grad_norm"}
    for name, points in run.metrics.items():
        stage, layer = _STAGE.fullmatch(name), _EXIT.fullmatch(name)
        if stage and stage[2] not in shown:
            each = Series(f"stage {stage[1]}", points, int(stage[1]))
            found.setdefault("stage{k}/" + stage[2], []).append(each)
        elif layer:
            each = Series(f"layer {layer[1]}", points, int(layer[1]), marks=True)
            found.setdefault("val/accuracy_after_layer_{n}", []).append(each)
        elif not stage and (
            name == "perf/samples_per_s" or not (name.startswith("perf/") or name in _SHOWN)
        ):
            found.setdefault(name, []).append(Series(name, points, marks=name.startswith("val/")))
    return _placed(run, [Chart(_title(name), series, name) for name, series in found.items()])


def _title(metric: str) -> str:
    """In words, as far as it is one of ours."""
    if metric == "val/accuracy_after_layer_{n}":
        return "Validation accuracy of the local heads"
    known = _TITLES.get(metric) or _TITLES.get(metric.removeprefix("stage{k}/"))
    words = metric.removeprefix("stage{k}/").replace("_", " ").replace("/", ", ")
    return known or words[:1].upper() + words[1:]


def shared_charts(runs: Sequence[tuple[str, RunFiles]]) -> list[Chart]:
    """Several runs, a curve each."""

    def each(name: str) -> list[Series]:
        scored = name.startswith("val/")
        return [
            Series(title, run.metrics.get(name, []), number, marks=scored)
            for number, (title, run) in enumerate(runs)
        ]

    charts = [Chart("Task loss in training", each("head/loss"), "head/loss")]
    charts.append(Chart("Task loss in validation", each("val/loss"), "val/loss"))
    for perplexed in (False, True):
        group = [
            _score(run, title, number)
            for number, (title, run) in enumerate(runs)
            if run.perplexed == perplexed
        ]
        charts.append(score_chart(group, perplexed, None))
    rates = [_tokens(run, title, number) for number, (title, run) in enumerate(runs)]
    return [*charts, Chart("Throughput", rates, _RATE, "tokens/s", from_zero=True)]


def score_chart(series: Sequence[Series], perplexed: bool, majority: float | None) -> Chart:
    if perplexed:
        return Chart("Validation perplexity", series, "val/perplexity", may_be_log=True)
    levels = [] if majority is None else [Level(f"majority class {majority:.1%}", majority)]
    return Chart("Validation accuracy", series, "val/accuracy", "%", 100, levels)


def _score(run: RunFiles, name: str, style: int) -> Series:
    what = "val/perplexity" if run.perplexed else "val/accuracy"
    return Series(name, run.metrics.get(what, []), style, marks=True)


def _tokens(run: RunFiles, name: str, style: int) -> Series:
    return Series(name, run.metrics.get(_RATE, []), style)


def _by_stage(run: RunFiles, what: str) -> dict[int, Points]:
    found = [(_STAGE.fullmatch(name), points) for name, points in run.metrics.items()]
    pairs = ((int(m[1]), points) for m, points in found if m and m[2] == what)
    return dict(sorted(pairs, key=lambda pair: pair[0]))


def _these(series: Sequence[Series]) -> str:
    if len(series) == 1:
        return series[0].name
    return "each stage"


def _placed(run: RunFiles, charts: Iterable[Chart]) -> list[Chart]:
    """On the axis of the run, with the steps after which it was gone on with."""
    steps = [start["step"] for start in run.starts if start["step"]]
    found = list(charts)
    for chart in found:
        chart.resumed, chart.last_step = steps, run.steps
    return found
