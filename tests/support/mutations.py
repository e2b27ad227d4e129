"""Seeded mutations of recipes and files, and the hunt for what does not end in a ``ScplError``.

A case is one number: ``SCPL_FUZZ_SEED`` chooses other cases than the ones CI runs, and
``SCPL_FUZZ_TIMES=10`` runs ten times as many. A failure names the seed and the case.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import logging
import os
import random
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scpl_ds.errors import ScplError

SEED = int(os.environ.get("SCPL_FUZZ_SEED", "0"))
TIMES = float(os.environ.get("SCPL_FUZZ_TIMES", "1"))
LIMIT_S = 20.0
"""Of processor time, for one case. Nothing here takes a tenth of it on a machine at rest."""
_SHOWN = 12

Case = Callable[[random.Random], tuple[str, Callable[[], str | None]]]
"""Draws one case: its description, and the work. Work that returns a text has failed for that
reason; else it succeeds or raises."""


class Hang(BaseException):
    """A case ran into its limit; no ``except Exception`` on the way may take it."""


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises :class:`Hang` inside the block after so much processor time of this process."""

    def stop(*_: Any) -> None:
        raise Hang(f"took more than {seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def little_memory(more: int = 6 * 2**30) -> Iterator[None]:
    """A case that asks for all memory there is gets a MemoryError, not the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def hunt(name: str, count: int, case: Case) -> Counter[str]:
    """Run ``count`` cases; fail with every kind of outcome that is neither success nor
    ``ScplError``.

    Returns:
        Outcome -> how often: ``success``, or the class of the error.
    """
    outcomes: Counter[str] = Counter()
    found: dict[str, str] = {}
    count = round(count * TIMES)
    root = logging.getLogger("scpl_ds")
    level = root.level
    root.setLevel(logging.CRITICAL)
    only = os.environ.get("SCPL_FUZZ_CASE")
    try:
        for number in range(count) if only is None else [int(only)]:
            what, work = case(random.Random(f"{name}/{SEED}/{number}"))
            with little_memory():
                reason, kind = _try(work)
            outcomes[kind] += 1
            if reason is not None:
                found.setdefault(
                    kind + reason.split("\n")[0][:60], f"case {number}: {what}\n{reason}"
                )
    finally:
        root.setLevel(level)
    assert not found, (
        f"{name}, SCPL_FUZZ_SEED={SEED} (one alone: SCPL_FUZZ_CASE=<number>), {len(found)} kinds "
        f"of failure in {count} cases:\n\n" + "\n\n".join(list(found.values())[:_SHOWN])
    )
    return outcomes


def _try(work: Callable[[], str | None]) -> tuple[str | None, str]:
    """Why a case failed, or None; and the kind of its outcome."""
    started = time.monotonic()
    try:
        with within(LIMIT_S):
            reason = work()
    except ScplError as error:
        empty = not str(error).strip()
        return ("an error without words" if empty else None), type(error).__name__
    except (Exception, SystemExit, Hang) as error:
        # What was raised first on the way is looked for at the end of the traceback.
        where = traceback.format_exception(error)[-8:]
        took = f"after {time.monotonic() - started:.1f} s"
        return f"{type(error).__name__} {took}: {str(error)[:300]}\n{''.join(where)[-1500:]}", type(
            error
        ).__name__
    return reason, "success" if reason is None else "wrong"


# -- trees -----------------------------------------------------------------------------------


def nest(depth: int, *, of: str = "list") -> Any:
    """A list in a list in a list, or mappings."""
    value: Any = []
    for _ in range(depth):
        value = [value] if of == "list" else {"name": value}
    return value


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**9, 10**20, -(10**30), 10**400,
    0.0, -0.5, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "auto", "none", "null", "true", "3", "1e5", "-1", "0x10", "1_000", "nan",
    "a:b", ":x", "x:", "..a:b", "json:loads", "json:nothing", "scpl_ds.errors:ScplError",
    "a.b:c.d",
    "\0", "a\0b:c", "ünïcödé", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u202egnol", "\ud800", "\ufeff", "line\nbreak",
    "x" * 20_000,
    "/", "~", "~nobody/x", "/dev/null", "..", "/proc/self/mem", "x" * 300,
    "demo", "bp", "joint", "scpl", "time", "flops", "supcon", "sum", "deepspeed", "fsdp", "ddp",
    "steps", "epoch", "no", "cosine", "AdamW", "csv", "jsonl", "wandb", "console",
    "sequence-classification", "causal-lm", "fp16", "fp8", "bfloat16",
    (), [], [[]], [None], [0], [[0, 1]], [[0, 2], [2, 4]], [[2, 0], [4, 2]], [[0, 10**20]],
    ["x"] * 50,
    {}, {"name": None}, {"name": 1}, {"name": "supcon"}, {"name": ["supcon"]}, {"enabled": True},
    {"enabled": "yes"}, {"stage": 3}, {"device": "cpu"}, {1: 2}, {None: None}, {True: 1}, {"": ""},
    [{"name": "console"}, {"name": "console"}], [{"name": "wandb", "mode": "disabled"}],
    datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), b"bytes", {"a"},
)  # fmt: skip


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values below ``tree``."""
    found: list[tuple[Any, ...]] = []
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in inner:
        found += [(*path, key), *places(value, (*path, key))]
    return found


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def mutate_tree(rng: random.Random, tree: Any, *, keys: tuple[str, ...] = ()) -> tuple[str, Any]:
    """A copy with one to three changes, and what they were. ``keys`` may be added anywhere."""
    tree, said = copy.deepcopy(tree), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = places(tree)
        if not every:
            break
        path = rng.choice(every)
        holder, last = at(tree, path[:-1]), path[-1]
        how = rng.choice(
            ("value", "value", "value", "number", "delete", "rename", "add", "swap", "deep")
        )
        if how == "delete":
            del holder[last]
        elif how == "rename" and isinstance(holder, dict):
            new = rng.choice(
                (str(last) + "s", str(last)[:-1], str(last).upper(), " ", "ключ", *keys)
            )
            holder[new] = holder.pop(last)
            last = f"{last} -> {new}"
        elif how == "add" and isinstance(holder, dict) and keys:
            last = rng.choice(keys)
            holder[last] = copy.deepcopy(rng.choice(VALUES))
        elif how == "swap":
            other = at(tree, rng.choice(every))
            holder[last] = copy.deepcopy(other)
        elif how == "deep":
            holder[last] = nest(rng.choice((3, 30, 120)), of=rng.choice(("list", "map")))
        elif how == "number" and isinstance(holder[last], int | float):
            old = holder[last]
            holder[last] = rng.choice(
                (-old, old * 10**6, old / 3, old + 1, old - 1, str(old), [old])
            )
        else:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
        said.append(f"{how} {'.'.join(map(str, path[:-1]))}.{last}")
    return "; ".join(said), tree


# -- bytes -----------------------------------------------------------------------------------

TOKENS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xc3", b"\r", b"\n", b"\t",
    b'"', b"'",
    b"\\", b",", b";", b"{", b"}", b"[", b"]", b":", b"&a ", b"*a", b"- ", b"? ", b"<<: ",
    b"!!int ",
    b"!!timestamp ", b"!!python/name:os.system ",
    b"NaN", b"Infinity", b"-1", b"99999999999999999999", b"1e999", b"null",
    b"\\ud800", b"%", b"#", b"|\n", b">-\n", b"---\n",
    b"2026-13-45", b"0o9", b"1:99:99",
)  # fmt: skip


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Truncated, flipped, with pieces put in, taken out, repeated or exchanged."""
    said = []
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = max(1, len(data))
        a, b = sorted((rng.randrange(size), rng.randrange(size)))
        how = rng.choice(
            (
                "flip",
                "flip",
                "truncate",
                "token",
                "token",
                "cut",
                "repeat",
                "zero",
                "noise",
                "big",
                "empty",
            )
        )
        if how == "flip" and data:
            spot = bytearray(data)
            for _ in range(rng.choice((1, 1, 8, 64))):
                spot[rng.randrange(len(spot))] ^= 1 << rng.randrange(8)
            data = bytes(spot)
        elif how == "truncate":
            data = data[:a]
        elif how == "token":
            data = data[:a] + rng.choice(TOKENS) + data[a:]
        elif how == "cut":
            data = data[:a] + data[min(b, a + 200) :]
        elif how == "repeat":
            piece = data[a : min(b, a + 200)]
            data = data[:a] + piece * rng.choice((2, 50)) + data[a:]
        elif how == "zero":
            data = data[:a] + bytes(min(64, len(data) - a)) + data[a + 64 :]
        elif how == "noise":
            data = data[:a] + rng.randbytes(32) + data[a + 32 :]
        elif how == "big" and rng.random() < 0.2:
            data = (
                data[:a]
                + rng.choice((b"x", b" ", b"9", b"[", b'"', b"\xc3\xa9")) * 30_000
                + data[a:]
            )
        elif how == "empty" and rng.random() < 0.1:
            data = b""
        said.append(f"{how} at {a}")
    return ", ".join(said), data
