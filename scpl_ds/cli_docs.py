"""``docs/cli.md``: every command and argument, from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from scpl_ds.cli import build_parser

_HEADER = """\
# Command line

<!-- Generated from the parser: python -m scpl_ds.cli_docs docs/cli.md -->

`scpl-ds COMMAND`, or `python -m scpl_ds COMMAND`. A recipe alone means `train`. Settings are
written `key=value` without dashes in front, anywhere after the command; the value is YAML. Exit
codes: [errors](errors.md).
"""


def build_page() -> str:
    """The page as Markdown."""
    return "\n".join([_HEADER, *_commands(build_parser(), 2)]).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    for action in parser._actions:  # argparse has no public way to its arguments
        if not isinstance(action, argparse._SubParsersAction):
            continue
        for command in action.choices.values():
            yield f"{'#' * level} `{command.prog}`\n"
            yield f"{command.description}\n"
            rows = [row for a in command._actions if (row := _row(command, a))]
            if rows:
                yield "\n".join(["| argument | meaning |", "|---|---|", *rows]) + "\n"
            yield from _commands(command, level + 1)


def _row(command: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
        return None
    words = command._get_formatter()._expand_help(action)  # fills in %(default)s
    value = action.metavar or (action.choices and "{" + ",".join(map(str, action.choices)) + "}")
    if not action.option_strings:
        name = str(value or action.dest)
        name += " ..." if action.nargs == "*" else ""
    elif action.nargs == 0:
        name = ", ".join(action.option_strings)
    else:
        name = f"{', '.join(action.option_strings)} {value or action.dest.upper()}"
    need = " (required)" if action.option_strings and action.required else ""
    cells = [f"`{name}`", words + need]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    import sys
    from pathlib import Path

    Path(sys.argv[1]).write_text(build_page())
