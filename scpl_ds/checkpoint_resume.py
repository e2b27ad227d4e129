"""What ``train.resume_from_checkpoint`` means."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from scpl_ds import checkpoint


def asked_for(asked: bool | Path | Literal["auto"], run: Path) -> Path | None:
    """The checkpoint that a run goes on from; None: it starts anew.

    Args:
        asked: ``true``: the latest of the run folder; ``auto``: that one, if there is a complete
            one; a path: the one there.
        run: The run folder.

    Raises:
        CheckpointError: There is none where one was asked for.
    """
    if asked is False or (asked == "auto" and not checkpoint.completed(run)):
        return None
    return checkpoint.resolve(run if asked in (True, "auto") else Path(asked))
