"""Blocks of whole lines of a CSV file, and the dialect in which they are written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_vasp.data.tables.encodings import explain_bytes

BLOCK_BYTES = 8 << 20
MAX_ROW_BYTES = 16 << 20
MAX_COLUMNS = 100_000


@dataclass(frozen=True)
class Dialect:
    delimiter: str
    quoting: bool

    @property
    def quotes(self) -> bool:
        """Whether quotes may enclose cells; never with a delimiter of several characters."""
        return self.quoting and len(self.delimiter) == 1

    def reader(self, lines: Sequence[str], strict: bool = True) -> Any:
        """Return an iterator over records, whose `line_num` counts the lines of those returned."""
        csv.field_size_limit(2 * MAX_ROW_BYTES + BLOCK_BYTES)  # longer cells are refused as rows
        if len(self.delimiter) > 1:
            return _Split(lines, self.delimiter)
        if not self.quoting:
            return csv.reader(
                lines, delimiter=self.delimiter, strict=strict, quoting=csv.QUOTE_NONE
            )
        return csv.reader(lines, delimiter=self.delimiter, strict=strict)


class _Split:
    """Iterates over records with a delimiter of several characters and without quotes."""

    def __init__(self, lines: Sequence[str], delimiter: str) -> None:
        self._lines = lines
        self._delimiter = delimiter
        self.line_num = 0

    def __iter__(self) -> Iterator[list[str]]:
        for line in self._lines:
            self.line_num += 1
            line = line.rstrip("\r\n")
            yield line.split(self._delimiter) if line else []


class Blocks:
    """Whole lines of a stream of UTF-8 bytes."""

    def __init__(self, stream: Any, where: str, size: int) -> None:
        self._stream = stream
        self._size = size
        self._where = where
        self._held = b""
        self.row = 1  # number of the next row
        self.line = 1

    def next(self) -> bytes:
        """Return the next block; b"" at the end."""
        while chunk := self._stream.read(self._size):
            data = self._held + chunk
            cut = max(data.rfind(b"\n"), data.rfind(b"\r", 0, len(data) - 1)) + 1
            self._held = data[cut:]
            if len(self._held) > MAX_ROW_BYTES:
                row = self.row + data.count(b"\n", 0, cut)
                raise ValueError(
                    f"{self._where}, row {row:,}: a line of more than {MAX_ROW_BYTES:,} bytes; it "
                    "is no table"
                )
            if cut:
                return data[:cut]
        data = self._held
        self._held = b""
        return data


def check_text(block: bytes, dialect: Dialect, row: int, where: str) -> None:
    """ValueError, naming the row, where a block holds NUL or invalid UTF-8.

    `row` is the number of its first row.
    """
    at, problem = block.find(b"\0"), "there is a NUL byte, which is no text"
    if at >= 0 and max(block[0:8:2].count(0), block[1:8:2].count(0)) > 1:
        order = "be" if block[0:8:2].count(0) > 1 else "le"
        problem += f" (if it is UTF-16 without its mark, pass --encoding utf-16-{order})"
    if at < 0 and not block.isascii():
        try:
            block.decode()
        except UnicodeDecodeError as error:
            at, problem = error.start, explain_bytes(block, error)
    if at >= 0:
        before = lines_of(
            block[:at].decode(errors="replace") + "x"
        )  # x stands for the rest of the row
        row += sum(1 for _ in dialect.reader(before, strict=False)) - 1
        raise ValueError(f"{where}, row {row:,}: {problem}")


def lines_of(text: str) -> list[str]:
    """Return the lines with their ends, split at \\n, \\r\\n and \\r as the csv module requires."""
    return list(io.StringIO(text, newline=""))


def is_plain(block: bytes, dialect: Dialect) -> bool:
    """Return whether the lines of the block are its rows, and quotes enclose whole cells only."""
    if b"\n\n" in block or b"\n\r" in block or block.startswith((b"\n", b"\r", b"\xef\xbb\xbf")):
        return False
    if b"\r" in block and block.count(b"\r") != block.count(b"\r\n"):
        return False
    return not dialect.quotes or b'"' not in block or _encloses_cells(block, dialect.delimiter)


def _encloses_cells(block: bytes, delimiter: str) -> bool:
    """Return whether quotes come in pairs, each around one cell of one line."""
    letters = np.frombuffer(block, np.uint8)
    places = np.flatnonzero(letters == ord('"'))
    if len(places) % 2 or not delimiter.isascii():
        return False
    opening, closing = places[0::2], places[1::2]
    before, after = letters[opening - 1], letters[np.minimum(closing + 1, len(letters) - 1)]
    opens = (before == ord(delimiter)) | (before == ord("\n")) | (opening == 0)
    closes = (
        (after == ord(delimiter))
        | (after == ord("\n"))
        | (after == ord("\r"))
        | (closing == len(letters) - 1)
    )
    if not (opens.all() and closes.all()):
        return False
    breaks = np.flatnonzero(letters == ord("\n"))
    return bool((np.searchsorted(breaks, opening) == np.searchsorted(breaks, closing)).all())
