"""Parse the options of a command that takes no configuration file."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that raises ValueError for a wrong command line, and takes `--debug`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.6)
            guess = f", did you mean {close[0]}?" if close else ""
            message = f"{unknown[1]} is not an option{guess}"
        if message.endswith("expected one argument"):
            message += ", and one that begins with - is written --option=-1"
        raise ValueError(f"{message.removeprefix('argument ')}; `--help` lists all options")


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
