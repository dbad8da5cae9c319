"""What an epoch does, where groups of epochs take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def in_turn(turns: Sequence[tuple[int, T]], epoch: int) -> T:
    """Return what epoch `epoch`, counted from 0, does.

    turns: (number of epochs, what they do), repeated without end; every number is at least 1.
    """
    epoch %= sum(n for n, _ in turns)
    for n, what in turns:
        if epoch < n:
            return what
        epoch -= n
    raise AssertionError(turns)
