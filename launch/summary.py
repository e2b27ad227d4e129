"""What a finished run came to, and what to try next: the last lines of launch/quickstart.sh.

python launch/summary.py RUN [FOLDER]: in the repository, for a reader who is in FOLDER
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path


def main(run: Path, reader: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    accuracy, majority = result["eval_accuracy"], result["majority_accuracy"]
    export = result["export_dir"]
    lines = [
        "",
        f"Accuracy   {_percent(accuracy)} of the exported model; "
        f"{_percent(majority)} for always answering the more frequent class",
        f"Run        {run.resolve()}",
        "",
        f"Try next, after `{_way_here(reader)}source {_activate()}`:",
        "  scpl-ds plan recipes/quickstart.yaml scpl.stages=3",
        f"  scpl-ds eval {shlex.quote(str(run))}",
        f"  scpl-ds report {shlex.quote(str(run))}",
    ]
    if export is not None:
        lines.append(
            '  python -c "from transformers import pipeline; '
            f"print(pipeline('text-classification', '{export}')('a gripping, funny film'))\""
        )
    print("\n".join(lines))


def _way_here(reader: Path) -> str:
    """The commands have paths relative to the repository."""
    here = Path.cwd()
    return "" if reader.resolve() == here else f"cd {shlex.quote(str(here))} && "


def _activate() -> str:
    """Of the environment this runs in; SCPL_DS_VENV may have named another than .venv."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if activate.is_relative_to(Path.cwd()):
        activate = activate.relative_to(Path.cwd())
    return shlex.quote(str(activate))


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(*sys.argv[2:]))
