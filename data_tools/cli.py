"""Parser, exit status, error message and progress of the data_tools commands."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tqdm import tqdm

from dist_vasp.console import final_status, guard
from dist_vasp.places import path_error
from dist_vasp.signals import EndedBySignal, ending_on_signals
from dist_vasp.text import one_line

_PATIENCE_S = 30.0  # a sort that spills to disk is not interrupted at once
SECONDS_BETWEEN_LINES = 15.0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError for a wrong command line, and has `--debug`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1, 0.6)
            message = (
                f"{unknown[1]} is not an option{f', did you mean {close[0]}?' if close else ''}"
            )
        if message.endswith("expected one argument"):
            message += ", and one that begins with - is written --option=-1"
        raise ValueError(f"{message.removeprefix('argument ')}; `--help` lists all options")


def run(
    parser: Parser, command: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None
) -> int:
    """Parse `argv`, run `command`, and return the exit status.

    The status is 0 when done, 2 for bad input, and 1 for anything else. A ValueError or OSError
    becomes one line; any other exception is a bug and keeps its traceback. SIGTERM, Ctrl-C and
    SIGHUP end the command through its `finally` clauses, so that nothing is left behind; the status
    is then 128 plus the signal's number.
    """
    guard()
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        args = parser.parse_intermixed_args(argv)
        with ending_on_signals(_PATIENCE_S):
            status = command(args)
    except ValueError as error:
        return _report(error, 2, debug)
    except MemoryError as error:
        return _report(
            MemoryError(f"not enough memory ({error}); ask for less, or use a larger machine"),
            2,
            debug,
        )
    except OSError as error:
        message = path_error(error)
        return _report(ValueError(message) if message else error, 2 if message else 1, debug)
    except EndedBySignal as ended:
        return _report(ended, ended.status, False)
    return final_status(status)


def _report(error: BaseException, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("error: " + one_line(str(error)), file=sys.stderr)
    return status


class Progress:
    """Progress on stderr: a bar on a terminal, elsewhere a plain line every 15 seconds."""

    def __init__(self, what: str, unit: str, total: int | None = None):
        self.what = what
        self.unit = unit
        self.total = total
        self.done = 0
        self._start = self._last_line = time.monotonic()
        self._bar = (
            tqdm(desc=what, unit=f" {unit}", total=total, unit_scale=True, leave=False)
            if sys.stderr.isatty()
            else None
        )

    def add(self, n: int) -> None:
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            rate = self.done / (self._last_line - self._start)
            of = left = ""
            if self.total and rate:
                seconds = int(max(0, self.total - self.done) / rate)
                of = f" of {self.total:,}"
                left = f", {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
            print(
                f"{self.what}: {self.done:,}{of} {self.unit}, {rate:,.0f}/s{left}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    """Parse a finite number (an argparse type)."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def seed(text: str) -> int:
    """Parse a seed that numpy.random.seed takes (an argparse type)."""
    value = at_least(0)(text)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is too large for a seed; pass 0 to {2**32 - 1}")
    return value
