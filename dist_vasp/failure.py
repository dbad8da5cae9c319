"""How an error ends a command: the line on standard error and the exit status.

Exit status 2: bad input or configuration; 128 + N: ended by signal N; 1: anything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_vasp.extras import about_missing
from dist_vasp.places import path_error
from dist_vasp.signals import EndedBySignal
from dist_vasp.text import one_line


@dataclass(frozen=True)
class Failure:
    """What a command says and returns after an error."""

    text: str
    """One line, printed after `error: `."""
    status: int
    """The exit status."""
    is_bug: bool = False
    """Whether the traceback is printed without --debug, too."""


def failure_of(error: BaseException) -> Failure:
    """Return how `error` ends a command: a user can cause a ValueError or an unusable path."""
    if isinstance(error, EndedBySignal):
        return Failure(str(error), error.status)
    if isinstance(error, ValueError):
        return Failure(one_line(str(error)), 2)
    if isinstance(error, OSError) and (about_path := path_error(error)):
        return Failure(one_line(about_path), 2)
    if isinstance(error, ImportError) and (missing := about_missing(error)):
        return Failure(missing, 2)
    return Failure(f"{type(error).__name__}: {one_line(str(error))}", 1, is_bug=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, in Python, numpy or torch on the CPU."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)
