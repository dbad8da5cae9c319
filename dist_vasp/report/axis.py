"""Axes of a chart: from values to pixels, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Maps `low` .. `high` to the pixels `start` .. `end`."""

    low: float
    high: float
    pixels: tuple[float, float]
    ticks: Sequence[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = (math.log(max(x, 1e-300)) for x in (low, high, v))
        start, end = self.pixels
        return start + (end - start) * ((v - low) / (high - low) if high > low else 0.5)


def linear(
    low: float,
    high: float,
    pixels: tuple[float, float],
    n: int,
    zero: bool = False,
    tight: bool = False,
) -> Scale:
    """Return an axis with about `n` ticks. It ends at ticks, or with `tight` at `low` and `high`.

    `zero`: `low` stays where it is where all values are equal.
    """
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (low if zero else low - pad), high + pad
    raw = (high - low) / n
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    if not tight:
        low = math.floor(low / step + 1e-9) * step
        high = math.ceil(high / step - 1e-9) * step
    first = math.ceil(low / step - 1e-9)
    ticks = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return Scale(low, high, pixels, [0.0 if abs(t) < step * 1e-6 else t for t in ticks])


def logarithmic(
    low: float,
    high: float,
    pixels: tuple[float, float],
    n: int,
    zero: bool = False,
    tight: bool = False,
) -> Scale:
    """Return a logarithmic axis with ticks at 1, 2 and 5 times powers of ten; as `linear` else."""
    if high <= low:
        low, high = low / 3, high * 3
    steps = (1,) if math.log10(high / low) > 2.5 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = [m * 10.0**k for k in powers for m in steps]
    if not tight:
        low, high = (
            max([c for c in candidates if c <= low * 1.0001], default=low),
            min([c for c in candidates if c >= high * 0.9999], default=high),
        )
    ticks = [c for c in candidates if low * 0.999 <= c <= high * 1.001]
    return Scale(low, high, pixels, ticks, log=True)
