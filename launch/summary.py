"""What a finished run came to, and what to try next: the last lines of launch/quickstart.sh."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(run: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    accuracy, majority = result["eval_accuracy"], result["majority_accuracy"]
    export = result["export_dir"]
    lines = [
        "",
        f"Accuracy   {_percent(accuracy)} of the exported model; "
        f"{_percent(majority)} for always answering the more frequent class",
        f"Run        {run.resolve()}",
        "",
        "Try next, after `source .venv/bin/activate`:",
        "  scpl-ds plan recipes/quickstart.yaml scpl.stages=3",
        f"  scpl-ds eval {run}",
    ]
    if export is not None:
        lines.append(
            '  python -c "from transformers import pipeline; '
            f"print(pipeline('text-classification', '{export}')('a gripping, funny film'))\""
        )
    print("\n".join(lines))


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
