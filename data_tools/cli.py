"""Run a command of data_tools and return its exit status."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence

from dist_vasp.command_line import Parser, as_last_word
from dist_vasp.console import final_status, guard
from dist_vasp.failure import Failure, failure_of, is_out_of_memory
from dist_vasp.signals import EndedBySignal, ending_on_signals
from dist_vasp.text import one_line

_PATIENCE_S = 30.0  # a sort that spills to disk cannot be interrupted at once


def run(
    parser: Parser,
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
    last_word: str = "--output",
) -> int:
    """Parse `argv`, run `command`, and return the exit status: 0 when done.

    The last positional argument may also be given as the option `last_word`. Other statuses are
    described in dist_vasp/failure.py.

    SIGTERM, Ctrl-C and SIGHUP end the command through its `finally` clauses, so nothing is left
    behind. An exception that is a bug is raised again and keeps its traceback.
    """
    guard()
    try:
        words = as_last_word(sys.argv[1:] if argv is None else argv, last_word)
        if {"-h", "--help", "--help-all"} & set(words):
            parser.parse_args(words)  # intermixed arguments are not in the usage
        args = parser.parse_intermixed_args(words)
        with ending_on_signals(_PATIENCE_S):
            status = command(args)
    except (Exception, EndedBySignal) as error:
        failure = _failure(error)
        if failure.is_bug:
            raise
        debug = "--debug" in (sys.argv if argv is None else argv)
        if debug and not isinstance(error, EndedBySignal):
            traceback.print_exc()
        print(f"error: {failure.text}", file=sys.stderr)
        return failure.status
    return final_status(status)


def _failure(error: BaseException) -> Failure:
    if is_out_of_memory(error):
        said = one_line(str(error))
        return Failure(f"not enough memory ({said}); ask for less, or use a larger machine", 2)
    failure = failure_of(error)
    if isinstance(error, OSError) and failure.is_bug:  # such as a full disk
        return Failure(one_line(str(error)), 1)
    return failure
