"""Numbers and values of a report as words: the filters of its templates."""

from __future__ import annotations

import math
from typing import Any

from dist_vasp.compare.statistics import Estimate

PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
DASH = "\N{EN DASH}"


def is_number(value: Any) -> bool:
    """Return whether a value of a file is a number (NaN and the like are None by then)."""
    return isinstance(value, int | float)


def fixed(value: Any, digits: int = 4) -> str:
    """Return a number with a fixed number of digits, a dash for anything else."""
    return f"{value:.{digits}f}" if is_number(value) and not math.isnan(value) else DASH


def grouped(value: Any, digits: int = 0) -> str:
    """Return a number with commas between thousands."""
    return f"{value:,.{digits}f}"


def signed(d: Estimate) -> str:
    """Return a difference with its sign and its standard error."""
    return _with_error(f"{d.mean:+.4f}", d)


def size(d: Estimate) -> str:
    """Return a difference without its sign, with its standard error."""
    return _with_error(f"{abs(d.mean):.4f}", d)


def _with_error(mean: str, d: Estimate) -> str:
    """Return a mean with its error; without it where one user gives none, a dash where none do."""
    if math.isnan(d.mean):
        return DASH
    return mean if math.isnan(d.se) else f"{mean} {PLUS_MINUS} {d.se:.4f}"


def percent(share: float) -> str:
    """Return a share as a percentage with one digit."""
    return f"{100 * share:.1f}%"


def count(value: Any) -> str:
    """Return a number with commas, a dash for anything else."""
    return f"{value:,g}" if is_number(value) else DASH


def duration(seconds: Any) -> str:
    """Return seconds as seconds, minutes or hours; a dash for anything but a number."""
    if not is_number(seconds):
        return DASH
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {s} s"


def plain(value: Any) -> str:
    """Return a value of a configuration: yes, no, a schedule as `epochs at rate`, or its text."""
    if value in ("", None):
        return DASH
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and {"epochs", "lr"} <= set(v) for v in value)
    ):
        return ", ".join(f"{stage['epochs']} at {stage['lr']}" for stage in value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def fact(key: str, value: Any) -> str:
    """Return a value of environment.json: bytes in GB, dates to the minute."""
    if key.endswith("_bytes") and is_number(value):
        return f"{value / 1e9:.1f} GB"
    if key == "date" and isinstance(value, str):
        return value[:16].replace("T", " ") + " UTC"
    return plain(value)
