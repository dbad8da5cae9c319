"""Read a YAML file with bounds on its size, and no key twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dist_vasp.bounded_json import DEEPEST, read_bytes

LARGEST_YAML = 256 << 10  # bytes of a configuration
MOST_VALUES = 20_000  # that a configuration stands for, aliases written out


def read_yaml(path: str | Path, what: str) -> Any:
    """The content of a YAML file; ValueError where it cannot be read or a key is there twice, of
    which YAML takes the last.

    `what` says in messages what was expected.
    """
    try:
        try:
            text = read_bytes(path, LARGEST_YAML).decode()
            node = yaml.compose(text, yaml.SafeLoader)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        _count_values(node, {}, 0)
        _refuse_twice(node, str(path), "", set())
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{at} is not YAML ({error.problem}); expected {what}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be read ({reason}); expected a YAML file with {what}"
        ) from None
    except DuplicateKeyError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a YAML file with {what}"
        ) from None


class DuplicateKeyError(ValueError):
    """A key that is there twice."""


def _count_values(node: yaml.Node | None, counted: dict[int, int], depth: int) -> int:
    """The number of values under `node` once every alias is written out; ValueError where they are
    too many or endless.

    Aliases of aliases make a file of some lines stand for more values than memory holds.
    """
    if id(node) in counted:
        if not counted[id(node)]:
            raise ValueError(
                "an alias stands for a value that holds the alias itself; write it out"
            )
        return counted[id(node)]
    if depth > DEEPEST:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if node is not None:
        counted[id(node)] = 0  # being counted
    children = (
        [child for pair in node.value for child in pair]
        if isinstance(node, yaml.MappingNode)
        else []
    )
    children = list(node.value) if isinstance(node, yaml.SequenceNode) else children
    n = 1 + sum(_count_values(child, counted, depth + 1) for child in children)
    if n > MOST_VALUES:
        raise ValueError(
            f"it stands for more than {MOST_VALUES:,} values once its aliases are written out"
        )
    if node is not None:
        counted[id(node)] = n
    return n


def _refuse_twice(node: yaml.Node | None, path: str, prefix: str, seen: set[int]) -> None:
    """ValueError where a mapping under `node` has a key twice."""
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _refuse_twice(child, path, f"{prefix.removesuffix('.')}[{i}].", seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if key.value in lines:
                raise DuplicateKeyError(
                    f"{path}: {name} is there twice, in line {lines[key.value]} and in line "
                    f"{line}; keep one of them"
                )
            lines[str(key.value)] = line
            _refuse_twice(value, path, f"{name}.", seen)
