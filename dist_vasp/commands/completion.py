"""Print a script that completes `dist-vasp` in a shell: source <(dist-vasp completion bash)"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import shtab

from dist_vasp.command_line import PROGRAM, Parser
from dist_vasp.commands.program import COMMANDS, parser_of


def parser() -> Parser:
    parser = Parser(prog="dist-vasp completion", description=__doc__)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, metavar="SHELL")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    shell = parser().parse_args(argv).shell
    sys.stdout.write(shtab.complete(_whole_program(), shell))


def _whole_program() -> argparse.ArgumentParser:
    """Return one parser of all commands."""
    whole = argparse.ArgumentParser(prog=PROGRAM)
    commands = whole.add_subparsers()
    for name, text in COMMANDS.items():
        module = importlib.import_module(parser_of(name))
        options = module.parser()
        one = commands.add_parser(
            name, help=text, parents=[options], add_help=False, conflict_handler="resolve"
        )
        for action in one._actions:
            _complete_files(action)
    return whole


def _complete_files(action: argparse.Action) -> None:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    if "FILE" in metavar or metavar in ("INPUT", "OUT.parquet"):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif "DIR" in metavar or metavar in ("RUN", "OLD_SHARDS"):
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
