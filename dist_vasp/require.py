"""One way to refuse a value of the configuration. Imports nothing of ours."""

from __future__ import annotations

import math
from typing import Any


def require(ok: bool, key: str, value: Any, expected: str, action: str) -> None:
    """Raise ValueError unless `ok`: what was received, what was expected, and how to fix it."""
    if not ok:
        raise ValueError(f"{key} is {value!r}, expected {expected}; {action}")


def require_finite(key: str, value: float) -> None:
    """Raise ValueError unless `value` is 0 or more, and finite."""
    action = "raise it" if value < 0 else "lower it"
    require(0 <= value < math.inf, key, value, "0 or more, and finite", action)
