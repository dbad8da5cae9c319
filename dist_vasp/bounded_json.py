"""Read files from outside, above all JSON, with bounds on their size and their depth."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

LARGEST = 16 << 20  # bytes of a header, a result or a list of starts
LARGEST_MANIFEST = 256 << 20  # of a manifest: some 200 bytes a shard
DEEPEST = 64  # levels of lists and objects; this project writes six


def read_json(path: str | Path, largest: int = LARGEST, folder: int | None = None) -> Any:
    """Return the content of a JSON file; with `folder`, an open folder, `path` is a name in it.

    OSError where the file cannot be read; ValueError where it is not a regular file, too large, too
    deep or not JSON.
    """
    return parse_json(read_bytes(path, largest, folder))


def read_bytes(path: str | Path, largest: int, folder: int | None = None) -> bytes:
    """Return the bytes of a regular file of at most `largest` bytes; errors as in `read_json`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    with open(descriptor, "rb") as handle:
        kind = os.fstat(descriptor)
        if stat.S_ISDIR(kind.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind.st_mode):
            raise ValueError("it is not a regular file")
        if kind.st_size > largest:
            raise ValueError(f"it has {kind.st_size:,} bytes, expected at most {largest:,}")
        return handle.read(largest + 1)


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text; ValueError where it is not JSON, or nested too deep."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {error.lineno} is not JSON" if data.strip() else "it is empty"
        ) from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except ValueError:
        raise ValueError("it holds a number of more digits than any of ours") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def reason(error: Exception) -> str:
    """Return what is wrong with a JSON file, from an error of reading it or of using its value."""
    if isinstance(error, KeyError):
        return f"the key {error} is missing"
    if isinstance(error, TypeError | AttributeError) and (
        "object" in str(error) or "indices" in str(error)
    ):
        return "a value is of another kind than expected"
    return str(error)
