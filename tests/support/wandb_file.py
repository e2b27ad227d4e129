"""Reads back what wandb wrote: the records of a ``run-<id>.wandb`` file.

The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) of protobuf records behind
seven bytes of its own. wandb 0.31 has no public reader for it; the record types are wandb's own.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_FILE_HEADER = 7
_BLOCK = 32768
_RECORD_HEADER = 7  # crc32c, length, type
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class WandbRun(NamedTuple):
    """What one file says."""

    run_id: str
    project: str
    name: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    step_metrics: dict[str, str]
    """Metric name or glob -> the metric that is its x axis."""
    exit_code: int | None
    group: str = ""
    hidden: frozenset[str] = frozenset()
    """Metrics, or globs, that get no panel by themselves."""
    artifacts: tuple[WandbArtifact, ...] = ()


class WandbArtifact(NamedTuple):
    """What ``wandb sync`` is going to upload."""

    name: str
    type: str
    aliases: frozenset[str]
    metadata: dict[str, Any]
    files: dict[str, tuple[str, int, str]]
    """Name -> base64 of its MD5, bytes, and where it is read from."""


def read_wandb_file(path: Path) -> WandbRun:
    """Everything a run logged, with values parsed from their JSON."""
    from wandb.proto import wandb_internal_pb2

    run_id = project = name = ""
    config: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    axes: dict[str, str] = {}
    exit_code: int | None = None
    group, hidden, artifacts = "", set[str](), list[WandbArtifact]()
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)  # type: ignore[attr-defined]
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id, project, name = record.run.run_id, record.run.project, record.run.display_name
            config |= _items(record.run.config.update)
            group = record.run.run_group
        elif kind == "config":
            config |= _items(record.config.update)
        elif kind == "history":
            history.append(_items(record.history.item))
        elif kind == "summary":
            summary |= _items(record.summary.update)
        elif kind == "metric":
            metric = record.metric
            axes[metric.name or metric.glob_name] = metric.step_metric
            hidden |= {metric.name or metric.glob_name} if metric.options.hidden else set()
        elif kind == "artifact":
            made = record.artifact
            files = {e.path: (e.digest, e.size, e.local_path) for e in made.manifest.contents}
            about = json.loads(made.metadata) if made.metadata else {}
            aliases = frozenset(made.aliases)
            artifacts.append(WandbArtifact(made.name, made.type, aliases, about, files))
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return WandbRun(
        run_id, project, name, config, history, summary, axes, exit_code,
        group, frozenset(hidden), tuple(artifacts),
    )  # fmt: skip


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", data[:8]
    at, parts = _FILE_HEADER, b""
    while at + _RECORD_HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD_HEADER:  # padding at the end of a block
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        body = data[at + _RECORD_HEADER : at + _RECORD_HEADER + length]
        if len(body) < length:  # cut short by a kill
            return
        at += _RECORD_HEADER + length
        parts = body if kind in (_FULL, _FIRST) else parts + body
        if kind in (_FULL, _LAST):
            yield parts
