"""Parse the options of a command that takes no configuration file."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from dist_vasp.help_text import HelpAll, short_help

PROGRAM = "dist-vasp"


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for a wrong command line, and takes `--debug`.

    `--help` leaves out the options given to `hide`; `--help-all` shows them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)
        self._hidden: set[str] = set()
        self.add_argument("--help-all", action=HelpAll, help="show every option and exit")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def hide(self, *options: str) -> None:
        """Show these options under --help-all alone."""
        self._hidden |= {option.removeprefix("--") for option in options}

    def whole_help(self) -> str:
        """Return the help with every option."""
        return super().format_help()

    def format_help(self) -> str:
        more = "`--help-all` shows more options." if self._hidden else ""
        return short_help(self, self._hidden, more)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            guess = did_you_mean(unknown[1], self._option_string_actions)
            message = f"{unknown[1]} is not an option{guess}"
        if message.endswith("expected one argument"):
            message += ", and one that begins with - is written --option=-1"
        raise ValueError(f"{message.removeprefix('argument ')}; `--help-all` lists all options")


def did_you_mean(typed: str, known: Iterable[str]) -> str:
    """Return `, did you mean NAME?` for the closest known name, "" where `typed` is known."""
    names = list(known)
    close = [] if typed in names else difflib.get_close_matches(typed, names, 1, 0.6)
    return f", did you mean {close[0]}?" if close else ""


def program(name: str, script: str = "launch/{}.py") -> str:
    """Return how the command `name` was started, for its help: as a subcommand or as a script."""
    return f"{PROGRAM} {name}" if is_subcommand() else script.format(name)


def is_subcommand() -> bool:
    """Whether this process runs a subcommand of the program."""
    return sys.argv[0].startswith(f"{PROGRAM} ")


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Show --ranks in the help of a subcommand; the program takes it before the command does."""
    if is_subcommand():
        parser.add_argument("--ranks", metavar="N", help="start N ranks (default 1)")


def renamed(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Return command-line words with options by their other names."""
    found = []
    for word in words:
        option, equals, value = word.partition("=")
        found.append(f"{names.get(option, option)}{equals}{value}")
    return found


def as_last_word(words: Sequence[str], option: str) -> list[str]:
    """Return the words with the value of `option` as the last one: a positional argument."""
    rest, last = list(words), []
    for place, word in enumerate(rest):
        if word == option and place + 1 < len(rest):
            last = [rest[place + 1]]
            del rest[place : place + 2]
            break
        if word.startswith(f"{option}="):
            last = [word.partition("=")[2]]
            del rest[place]
            break
    return [*rest, *last]


def at_least(low: int) -> Callable[[str], int]:
    """Return an argparse type: an integer of at least `low`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {low}")
        return value

    return integer


def number(text: str) -> float:
    """Convert an argument to a finite number (an argparse type)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def seed(text: str) -> int:
    """Convert an argument to a seed that numpy.random.seed accepts (an argparse type)."""
    value = at_least(0)(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is too large for a seed; pass 0 to {2**32 - 1}")
    return value
