"""A JSON file that carries the SHA-256 of its own content and is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from dist_vasp.bounded_json import read_json, reason


class JsonHeader(ABC):
    """A header as a file of its own: of a checkpoint, an export or an ensemble."""

    FILE: ClassVar[str]
    """Name of the file."""
    VERSIONS: ClassVar[tuple[int, ...]]
    """Values of format_version that are read; the last one is written."""
    FIX_HEADER: ClassVar[str]
    """What to do about a damaged header."""

    @classmethod
    @abstractmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Check the content of a file and return it typed.

        Raises ValueError, TypeError, KeyError or AttributeError where something is missing or of
        another kind: a checksum only says that the content is what was written.
        """

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the content of the file, its own SHA-256 included."""


H = TypeVar("H", bound=JsonHeader)


def header_sha256(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a header's content, itself excepted: a damaged position or hash must
    not pass for a real one."""
    content = {key: value for key, value in content.items() if key != "header_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_header(kind: type[H], path: Path, folder: int | None = None) -> H:
    """Read and check the header of the folder `path`.

    With `folder`, a descriptor of that folder, the file is looked up in it. ValueError where the
    header is damaged or of a version that is not read; OSError where it cannot be read.
    """
    file = path / kind.FILE
    try:
        raw = read_json(file if folder is None else file.name, folder=folder)
        version = raw["format_version"]
        if version in kind.VERSIONS:
            header = kind.from_json(raw)
            if raw["header_sha256"] != header_sha256(raw):
                raise ValueError("header_sha256 is not that of its content")
            return header
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(f"{file} is damaged ({reason(error):.300}); {kind.FIX_HEADER}") from None
    known = " and ".join(map(str, kind.VERSIONS))
    raise ValueError(
        f"{file} has format_version {version!r:.20}, this version reads {known}; "
        "use the version that wrote it"
    )


def write_header(folder: Path, header: JsonHeader) -> None:
    """Write the header into a folder that is being made."""
    with open(folder / header.FILE, "w") as handle:
        handle.write(json.dumps(header.to_json(), indent=1) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number of 0 or more."""
    return type(value) is int and 0 <= value < 1 << 48


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number of 0 or more. JSON numbers can exceed a float."""
    return type(value) in (int, float) and 0 <= value < 1e300
