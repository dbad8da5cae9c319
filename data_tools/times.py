"""Choose the moment at which training ends, for protocol `time`.

The times lie in scratch files and are never held in memory together.

Shapes: E interactions.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

_PER_READ = 1 << 18
_SIGN = np.uint64(1 << 63)
_DIGIT_BITS = 16
_MICROSECONDS = 1e14  # a larger time is a date, as the reader of tables gives it


def moment(text: str) -> float:
    """Convert an argument to a time (an argparse type): a number, or a date as microseconds since
    1970."""
    try:
        value = float(text)
        if np.isfinite(value):
            return value
    except ValueError:
        pass
    try:
        date = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor a date such as 2024-01-31 or 2024-01-31T12:00:00"
        ) from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return float(round(date.timestamp() * 1e6))


def told(time: float) -> str:
    """Return a time for people: a date where it counts microseconds, else the number."""
    if abs(time) < _MICROSECONDS:
        return f"{time:.15g}"
    return f"{np.datetime64(int(time), 'us')}".removesuffix(".000000")


def kth_smallest(paths: Sequence[Path], k: int) -> float:
    """Return the k-th smallest time of files of float64, counted from 0; they must hold more.

    The digits of base 2^16 of the sorted position are found one after another, from the first, in
    four passes over the files.
    """
    prefix, rest = np.uint64(0), k
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for keys in _sortable(paths):
            if shift + _DIGIT_BITS < 64:
                above = np.uint64(shift + _DIGIT_BITS)
                keys = keys[keys >> above == prefix]
            digits = (keys >> np.uint64(shift)) & np.uint64((1 << _DIGIT_BITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rest, side="right"))
        rest -= int(ends[digit] - counts[digit])
        prefix = np.uint64((int(prefix) << _DIGIT_BITS) | digit)
    bits = prefix ^ _SIGN if prefix & _SIGN else ~prefix
    return float(np.array([bits], np.uint64).view(np.float64)[0])


def bounds(paths: Sequence[Path]) -> tuple[float, float]:
    """Return the first and the last time of files that hold one."""
    lows, highs = zip(*((times.min(), times.max()) for times in _read(paths)), strict=True)
    return float(min(lows)), float(max(highs))


def _sortable(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the times as integers in the same order, uint64."""
    for times in _read(paths):
        bits = times.view(np.uint64)
        yield np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _read(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        with open(path, "rb") as file:
            while len(times := np.fromfile(file, np.float64, _PER_READ)):
                yield times
