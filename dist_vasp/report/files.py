"""Files of a run, read for its report: whatever they hold becomes values that can be shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_vasp.bounded_json import parse_json, read_json
from dist_vasp.config.yaml_file import read_yaml

_LARGEST = 1e18  # of a number that is drawn
_LONGEST, _DEEPEST, _MOST_VALUES = 2000, 8, 50_000  # of a text, of the nesting, of a file's values


def is_drawable(value: Any) -> bool:
    """Return whether a value can be drawn: a finite number, neither huge nor all but 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1 / _LARGEST**2 <= abs(value) <= _LARGEST


def plain(value: Any) -> Any:
    """Return what a file holds, fit to be shown: names are text, numbers that cannot be drawn None.

    Values beyond a limit are None, too: a file may repeat a part of itself without end.
    """
    return _plain(value, [_MOST_VALUES], 0)


def _plain(value: Any, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if depth > _DEEPEST or left[0] < 0:
        return None
    if isinstance(value, dict):
        return {
            _text(name): _plain(v, left, depth + 1)
            for name, v in list(value.items())[: max(left[0], 0)]
        }
    if isinstance(value, list):
        return [_plain(v, left, depth + 1) for v in value[: max(left[0], 0)]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if is_drawable(value) else None
    return value if isinstance(value, bool | None) else _text(value)


def _text(value: Any) -> str:
    return (
        "a long number"
        if isinstance(value, int) and not is_drawable(value)
        else str(value)[:_LONGEST]
    )


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of metrics.jsonl that are objects with a step, and how many are not."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return [], 0
    found, damaged = [], 0
    for line in text.splitlines():
        try:
            record = parse_json(line)
            good = (
                isinstance(record, dict)
                and is_drawable(record.get("step"))
                and is_drawable(record.get("epoch", 0))
            )
        except ValueError:
            good = False
        if good:
            found.append(record)
        else:
            damaged += 1
    return found, damaged


def read_config(path: Path) -> dict[str, Any]:
    """Return config.yaml, empty where it cannot be read."""
    try:
        found = plain(read_yaml(path, "the configuration of a run"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def read_file(path: Path) -> Any:
    """Return the content of a JSON file, None where it cannot be read."""
    try:
        return plain(read_json(path))
    except (OSError, ValueError):
        return None
