"""Read the header of a CSV file, and find the delimiter: --delimiter, or the one that gives the
wanted columns."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import dataclass

from dist_vasp.data.tables.columns import (
    Columns,
    MissingColumnError,
    Reading,
    find_columns,
    shown,
    without_constants,
)
from dist_vasp.data.tables.csv_blocks import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    Blocks,
    Dialect,
    check_text,
    lines_of,
)

DELIMITERS = (",", "\t", ";", "|", "::")
_HEAD_BYTES = 1 << 16  # in which the first row is sought at first
_NAMED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}


@dataclass(frozen=True)
class Header:
    names: list[str]  # 1, 2, ... where there is no header
    dialect: Dialect
    wanted: dict[str, int]  # positions of columns by role
    body: bytes  # the bytes after the header that were read with it


def check_delimiter(text: str) -> str:
    """Return the delimiter that --delimiter names; ValueError where it cannot be one."""
    delimiter = _NAMED.get(text, text)
    if delimiter != "::" and (
        len(delimiter) != 1 or delimiter.isalnum() or delimiter in '"\r\n\0.-+'
    ):
        raise ValueError(
            f"--delimiter {text!r} cannot separate cells; pass one character such as ';', tab or "
            "space, or '::'"
        )
    return delimiter


def read_header(
    blocks: Blocks, columns: Columns, reading: Reading, constants: Collection[str], where: str
) -> Header:
    """Return the header; a file without one has the numbers of its columns as names.

    `constants`: columns that the names of folders give. ValueError where the file is empty or no
    delimiter gives the wanted columns.
    """
    block = _skip_blank_lines(blocks)
    if not block:
        expected = "a header line with the names of the columns" if reading.header else "rows"
        raise ValueError(f"{where} is empty; expected {expected}")
    candidates = DELIMITERS if reading.delimiter is None else (check_delimiter(reading.delimiter),)
    errors: dict[str, ValueError] = {}
    for delimiter in candidates:
        dialect = Dialect(delimiter, reading.quoting)
        try:
            names, n_lines, n_bytes, block = _first_record(blocks, block, dialect, where)
            labels = names if reading.header else _labels(len(names), reading, where)
            wanted = find_columns(
                labels, without_constants(columns, constants, labels), where, reading.header
            )
        except ValueError as error:
            errors[delimiter] = error
            continue
        if reading.header:
            check_text(block[:n_bytes], dialect, blocks.row, where)
            block = block[n_bytes:]
            blocks.row, blocks.line = blocks.row + 1, blocks.line + n_lines
        elif reading.delimiter is None:
            _check_unambiguous(names, delimiter, where)
        return Header(labels, dialect, wanted, block)
    first = _lines(_beginning(block, _HEAD_BYTES))[0]
    likely = max(candidates, key=lambda d: (first.count(d), -candidates.index(d)))
    check_text(block, Dialect(likely, reading.quoting), blocks.row, where)
    raise _explained(errors[likely], likely, first, reading, where)


def _lines(block: bytes) -> list[str]:
    """Return the lines of a block, whose text is checked later."""
    return lines_of(block.decode(errors="surrogateescape"))


def _bytes(lines: list[str]) -> bytes:
    return "".join(lines).encode(errors="surrogateescape")


def _labels(n_columns: int, reading: Reading, where: str) -> list[str]:
    if reading.names and len(reading.names) != n_columns:
        raise ValueError(
            f"{where}, row 1: {n_columns} cells where {len(reading.names)} are expected "
            f"({', '.join(reading.names)})"
        )
    return list(reading.names) or [str(i + 1) for i in range(n_columns)]


def _skip_blank_lines(blocks: Blocks) -> bytes:
    block = blocks.next()
    while block.startswith((b"\n", b"\r")):
        block = block[2 if block.startswith(b"\r\n") else 1 :]
        blocks.row += 1
        blocks.line += 1
        block = block or blocks.next()
    return block


def _first_record(
    blocks: Blocks, block: bytes, dialect: Dialect, where: str
) -> tuple[list[str], int, int, bytes]:
    """Return the cells of the first row, its numbers of lines and bytes, and the block.

    The block is extended where the header has more lines than it.
    """
    size = _HEAD_BYTES
    while True:
        lines = _lines(_beginning(block, size))
        if lines[0].count(dialect.delimiter) >= MAX_COLUMNS:
            raise ValueError(
                f"{where}: the first row has more than {MAX_COLUMNS:,} cells; it is no table of "
                "interactions"
            )
        reader = dialect.reader(lines)
        try:
            cells = next(iter(reader))
            return cells, reader.line_num, len(_bytes(lines[: reader.line_num])), block
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
            if unclosed and size < len(block):
                size *= 4
                continue
            more = blocks.next() if unclosed and len(block) <= MAX_ROW_BYTES else b""
            if not more:
                problem = (
                    "a quote in the header does not close"
                    if unclosed
                    else f"the header is malformed: {error}"
                )
                raise ValueError(
                    f"{where}, row {blocks.row}: {problem}; correct it, or pass --no_quoting if "
                    "quotes are plain characters"
                ) from None
            block += more
            size = len(block)


def _beginning(block: bytes, size: int) -> bytes:
    """Return the first whole lines of the block, about `size` bytes and at least one line."""
    while size < len(block):
        cut = max(block.rfind(b"\n", 0, size), block.rfind(b"\r", 0, size - 1)) + 1
        if cut:
            return block[:cut]
        size *= 4
    return block


def _check_unambiguous(cells: list[str], delimiter: str, where: str) -> None:
    others = [d for d in DELIMITERS if any(d in cell for cell in cells)]
    if others:
        raise ValueError(
            f"{where}: the first line holds both {delimiter!r} and {others[0]!r}; pass the one "
            "that separates the cells as --delimiter"
        )


def _explained(
    error: ValueError, delimiter: str, first: str, reading: Reading, where: str
) -> ValueError:
    """Return the error with the likely delimiter, or with what the first line looks like."""
    if not isinstance(error, MissingColumnError):
        return error
    cells: list[str] = next(
        iter(Dialect(delimiter, reading.quoting).reader([first], strict=False)), []
    )
    if reading.header and sum(_is_number(cell) for cell in cells) * 2 > len(cells):
        return ValueError(
            f"{where} has no column {error.name!r}; its first line, {shown(cells)}, looks like "
            "data: "
            "pass --no_header, then --user_column 1 --item_column 2 name columns by number"
        )
    if len(cells) < 2:
        return ValueError(
            f"{where} has no column {error.name!r}; its first line is one cell, {shown(cells)}; "
            "pass the character that separates the cells as --delimiter"
        )
    return ValueError(
        str(error).replace("its columns are", f"its columns, separated by {delimiter!r}, are")
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
