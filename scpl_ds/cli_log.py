"""Where what the program says goes: to the console, and from the first step on to a file."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the program imports no torch to say --help
    from scpl_ds.run_folder import RunFolder


def rank_number() -> int:
    return int(os.environ.get("RANK", "0"))


def log_to_console() -> None:
    """Rank 0 at INFO, the others at WARNING with their rank in front."""
    rank = rank_number()
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(
        logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s")
    )
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root = logging.getLogger("scpl_ds")
    root.setLevel(logging.DEBUG)
    root.handlers[:] = [console]
    root.propagate = False


def run_has_begun() -> bool:
    """Whether a run of this process got to its first step: what ends it ends a training."""
    handlers = logging.getLogger("scpl_ds").handlers
    return any(isinstance(handler, logging.FileHandler) for handler in handlers)


def log_to_file(run: RunFolder) -> None:
    from scpl_ds.checkpoint_disk import writing

    path = run.log_file(rank_number())
    with writing(path, then="Nothing was trained. Make room or mend the disk."):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("scpl_ds").addHandler(handler)
