"""A saved view of Weights & Biases for runs of scpl_ds: a section of panels for each stage.

    pip install wandb-workspaces
    python launch/wandb_workspace.py ENTITY PROJECT --stages 4

W&B's own workspace has the same sections, in its own order and with a panel for each metric; this
view has few panels, in the order in which one looks. It is sent over the network, with the key of
`wandb login`.
"""

from __future__ import annotations

import argparse

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

STEP = "train/global_step"


def workspace(entity: str, project: str, stages: int) -> ws.Workspace:
    """The view, not sent anywhere yet."""
    losses = [f"stage{k}/loss" for k in range(stages)]
    sections = [
        ws.Section("Results", panels=[_lines("val/accuracy"), _lines("val/loss")], is_open=True),
        ws.Section("All stages", panels=[_lines(*losses), _lines("head/loss")], is_open=True),
        *(_stage(k) for k in range(stages)),
        ws.Section(
            "Speed",
            panels=[
                _lines("perf/tokens_per_s"),
                _lines("perf/bubble_fraction"),
                _lines("perf/busy", "perf/wait_input", "perf/wait_send", "perf/data", "perf/other"),
                _lines("perf/peak_memory_gib"),
                wr.MediaBrowser(media_keys=["profile/timeline"]),
            ],
        ),
        ws.Section(
            "Tables",
            panels=[
                wr.WeavePanelSummaryTable(table_name=name)
                for name in ("partition", "predictions", "samples")
            ],
        ),
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"scpl_ds, {stages} stages",
        sections=sections,
        settings=settings,
    )


def _stage(k: int) -> ws.Section:
    names = ("loss", "grad_norm", "valid_anchor_fraction")
    return ws.Section(f"stage{k}", panels=[_lines(f"stage{k}/{name}") for name in names])


def _lines(*metrics: str) -> wr.LinePlot:
    return wr.LinePlot(x=STEP, y=list(metrics))


def main() -> None:
    parser = argparse.ArgumentParser(description="Save a view of scpl_ds runs in W&B.")
    parser.add_argument("entity", help="user or team")
    parser.add_argument("project")
    parser.add_argument("--stages", type=int, default=2, help="default: %(default)s")
    asked = parser.parse_args()
    print(workspace(asked.entity, asked.project, asked.stages).save().url)


if __name__ == "__main__":
    main()
