"""Recognise the files that a command has written, so that `--overwrite` replaces no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def is_json(fits: Callable[[Any], bool], largest: int = 1 << 26) -> Callable[[Path], bool]:
    """Return a function that recognises JSON files for whose content `fits` is true.

    `fits` may raise KeyError or TypeError.
    """

    def is_ours(path: Path) -> bool:
        if path.stat().st_size > largest:
            return False
        try:
            content = json.loads(path.read_bytes())
            return bool(content) and fits(content)
        except (KeyError, TypeError, AttributeError, RecursionError):
            return False

    return is_ours


def begins_with(*starts: bytes) -> Callable[[Path], bool]:
    """Return a function that recognises files that begin with one of `starts`."""

    def is_ours(path: Path) -> bool:
        with open(path, "rb") as handle:
            return handle.read(max(map(len, starts))).startswith(starts)

    return is_ours


def recognised(ours: Callable[[Path], bool], path: Path) -> bool:
    """Return `ours(path)`; False where the file cannot be read."""
    try:
        return ours(path)
    except (OSError, ValueError):
        return False
