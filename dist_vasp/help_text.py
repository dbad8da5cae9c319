"""The two helps of a command: `--help` shows its own options, `--help-all` every one."""

from __future__ import annotations

import argparse
from collections.abc import Container
from typing import Any

_WIDTH_OF_NAMES = 26


class HelpAll(argparse.Action):
    """`--help-all`: print the help with every option, and end."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.whole_help(), end="")
        parser.exit()


def short_help(parser: argparse.ArgumentParser, hidden: Container[str], more: str) -> str:
    """Return the help without the options whose `dest` is in `hidden`; `more` is its last line."""
    shown = [action for action in parser._actions if action.dest not in hidden]
    usage = argparse.HelpFormatter(parser.prog)
    usage.add_usage(None, [action for action in shown if _is_required(action)], [])
    text = argparse.HelpFormatter(parser.prog, max_help_position=_WIDTH_OF_NAMES)
    text.add_text(parser.description)
    text.start_section("options")
    text.add_arguments([*filter(_is_own, shown), *(a for a in shown if not _is_own(a))])
    text.end_section()
    text.add_text(more)
    return f"{usage.format_help().strip()} [options]\n\n{text.format_help()}"


def _is_required(action: argparse.Action) -> bool:
    return action.required and action.nargs != "?"


def _is_own(action: argparse.Action) -> bool:
    return action.dest not in ("help", argparse.SUPPRESS, "debug")
