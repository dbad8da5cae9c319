"""Rows of a CSV file as Python's csv module reads them in strict mode, but a block at a time and
mostly without it.

A block of whole lines has only one reading where it holds no lone carriage return, no blank line,
and no quotes but those around whole cells of one line: Arrow splits it. Every other block goes
through csv.reader. So the rows are those of the csv module, or there is an error with the row.

Rows are numbered from 1, the header included; cells with line breaks make a row of several lines.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from dist_vasp.data.tables.encodings import explain_bytes

BLOCK_BYTES = 8 << 20
MAX_ROW_BYTES = 16 << 20
MAX_COLUMNS = 100_000
_SEPARATOR = "\x1f"  # stands for a delimiter of several characters


@dataclass(frozen=True)
class Dialect:
    delimiter: str
    quoting: bool

    @property
    def quotes(self) -> bool:
        """Whether a quote may enclose a cell: never where the delimiter has several characters."""
        return self.quoting and len(self.delimiter) == 1

    def reader(self, lines: Sequence[str], strict: bool = True) -> Any:
        """Records of the lines; `line_num` of it counts the lines of those that were returned."""
        csv.field_size_limit(2 * MAX_ROW_BYTES + BLOCK_BYTES)  # longer ones are refused as rows
        if len(self.delimiter) > 1:
            return _Split(lines, self.delimiter)
        if not self.quoting:
            return csv.reader(
                lines, delimiter=self.delimiter, strict=strict, quoting=csv.QUOTE_NONE
            )
        return csv.reader(lines, delimiter=self.delimiter, strict=strict)


class _Split:
    """Records of lines with a delimiter of several characters, which knows no quotes."""

    def __init__(self, lines: Sequence[str], delimiter: str) -> None:
        self._lines, self._delimiter, self.line_num = lines, delimiter, 0

    def __iter__(self) -> Iterator[list[str]]:
        for line in self._lines:
            self.line_num += 1
            line = line.rstrip("\r\n")
            yield line.split(self._delimiter) if line else []


@dataclass(frozen=True)
class Piece:
    """Some rows: their numbers, and the text of the columns that were asked for, in that order."""

    numbers: Sequence[int]
    columns: list[pa.Array]  # string, without nulls


class Blocks:
    """Whole lines of a stream of UTF-8 bytes."""

    def __init__(self, stream: Any, where: str, size: int) -> None:
        self._stream, self._size, self._where, self._held = stream, size, where, b""
        self.row = 1  # number of the next row
        self.line = 1

    def next(self) -> bytes:
        """The next block; b"" at the end."""
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
        data, self._held = self._held, b""
        return data


def check_text(block: bytes, dialect: Dialect, row: int, where: str) -> None:
    """ValueError that names the row where the block, which begins with `row`, holds a NUL or is not
    UTF-8."""
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
        before = lines_of(block[:at].decode(errors="replace") + "x")  # x: the row has begun
        row += sum(1 for _ in dialect.reader(before, strict=False)) - 1
        raise ValueError(f"{where}, row {row:,}: {problem}")


def lines_of(text: str) -> list[str]:
    """Lines with their ends, split where the csv module's documentation has files split: at \\n,
    \\r\\n and \\r."""
    return list(io.StringIO(text, newline=""))


def is_plain(block: bytes, dialect: Dialect) -> bool:
    """True where the lines of the block are its rows, and quotes only enclose whole cells without
    quotes and line breaks."""
    if b"\n\n" in block or b"\n\r" in block or block.startswith((b"\n", b"\r", b"\xef\xbb\xbf")):
        return False
    if b"\r" in block and block.count(b"\r") != block.count(b"\r\n"):
        return False
    return not dialect.quotes or b'"' not in block or _encloses_cells(block, dialect.delimiter)


def _encloses_cells(block: bytes, delimiter: str) -> bool:
    """True where quotes come in pairs, each pair around one cell of one line."""
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


class Rows:
    """The rows of `blocks` below the header, in pieces.

    `n_columns` is the width that every row must have.
    """

    def __init__(
        self, blocks: Blocks, dialect: Dialect, n_columns: int, wanted: Sequence[int], where: str
    ) -> None:
        self._blocks, self._dialect, self._n_columns, self._wanted, self._where = (
            blocks,
            dialect,
            n_columns,
            wanted,
            where,
        )
        self.id_columns: list[int] = []  # where a swallowed row would show
        self.n_broken = 0  # rows of several lines
        self._names = [str(i) for i in range(n_columns)]
        included = [str(i) for i in dict.fromkeys(wanted)]
        self._convert = pa_csv.ConvertOptions(
            include_columns=included,
            column_types=dict.fromkeys(included, pa.string()),
            null_values=[],
            strings_can_be_null=False,
        )

    def pieces(self, block: bytes) -> Iterator[Piece]:
        """Pieces of `block` and of all that follow it."""
        while block:
            check_text(block, self._dialect, self._blocks.row, self._where)
            if is_plain(block, self._dialect):
                piece = self._plain(block)
                if piece is not None:
                    yield piece
                    block = self._blocks.next()
                    continue
            piece, rest = self._strict(block)
            yield piece
            block = self._blocks.next()
            if rest and not block:
                raise self._unclosed("never closes")
            block = rest + block

    def _plain(self, block: bytes) -> Piece | None:
        """The piece of a plain block by Arrow; None where Arrow would not say the same of it as the
        csv module."""
        n_rows = block.count(b"\n") + (not block.endswith(b"\n"))
        delimiter = self._dialect.delimiter
        if len(delimiter.encode()) > 1:
            if _SEPARATOR.encode() in block:
                return None
            block, delimiter = block.replace(delimiter.encode(), _SEPARATOR.encode()), _SEPARATOR
        read = pa_csv.ReadOptions(
            use_threads=False, block_size=len(block) + 1, column_names=self._names
        )
        quote = '"' if self._dialect.quotes else False
        parse = pa_csv.ParseOptions(
            delimiter=delimiter, quote_char=quote, double_quote=False, ignore_empty_lines=False
        )
        try:
            table = pa_csv.read_csv(pa.BufferReader(block), read, parse, self._convert)
        except pa.ArrowInvalid:
            return None
        if table.num_rows != n_rows:
            return None
        first = self._blocks.row
        self._blocks.row += n_rows
        self._blocks.line += n_rows
        return Piece(
            range(first, first + n_rows),
            [table.column(str(i)).combine_chunks() for i in self._wanted],
        )

    def _strict(self, block: bytes) -> tuple[Piece, bytes]:
        """The piece of a block by the csv module, and the bytes of a last row that goes on in the
        next block."""
        lines = lines_of(block.decode())
        reader = self._dialect.reader(lines)
        records: list[list[str]] = []
        done, broken = 0, list[tuple[int, int, int]]()
        rest = b""
        try:
            for record in reader:
                records.append(record)
                line = reader.line_num
                if line - done > 1:
                    broken.append((len(records) - 1, done, line))
                done = line
        except csv.Error as error:
            if str(error) != "unexpected end of data":
                self._check_width(records, range(self._blocks.row, self._blocks.row + len(records)))
                raise self._malformed(str(error), len(records), done) from None
            rest = "".join(lines[done:]).encode()
        numbers: Sequence[int] = range(self._blocks.row, self._blocks.row + len(records))
        self._check_width(records, numbers)
        for index, first, last in broken:
            self._check_swallowed(lines[first:last], numbers[index])
        self.n_broken += len(broken)
        self._blocks.row += len(records)
        self._blocks.line += done
        if len(rest) > MAX_ROW_BYTES:
            raise self._unclosed(f"does not close within {MAX_ROW_BYTES:,} bytes")
        if not all(records):
            numbers = [number for number, record in zip(numbers, records, strict=True) if record]
            records = [record for record in records if record]
        return Piece(
            numbers,
            [pa.array([record[i] for record in records], pa.string()) for i in self._wanted],
        ), rest

    def _check_width(self, records: list[list[str]], numbers: Sequence[int]) -> None:
        if set(map(len, records)) <= {0, self._n_columns}:  # a blank line has no cell
            return
        at = next(i for i, record in enumerate(records) if len(record) not in (0, self._n_columns))
        raise ValueError(
            f"{self._where}, row {numbers[at]:,}: {len(records[at])} cells where the header has "
            f"{self._n_columns} "
            f"(delimiter {self._dialect.delimiter!r}); correct the row"
        )

    def _check_swallowed(self, lines: list[str], number: int) -> None:
        """ValueError where every line of a row is a row itself: a stray quote has opened a cell,
        and another has closed it."""
        delimiter = self._dialect.delimiter
        if (
            any(line.count(delimiter) != self._n_columns - 1 for line in lines)
            or self._n_columns < 2
        ):
            return
        cells = [
            [cell.strip('"') for cell in line.rstrip("\r\n").split(delimiter)] for line in lines
        ]
        numeric = bool(self.id_columns) and all(
            _is_number(line[i]) for line in cells for i in self.id_columns
        )
        if numeric or (len(lines) > 3 and self._n_columns > 2):
            raise ValueError(
                f"{self._where}, row {number:,}: a quote opens here and the cell holds "
                f"{len(lines) - 1:,} lines that "
                "look like rows of the table; correct the quote, or pass --no_quoting if quotes "
                "are plain characters"
            )

    def _unclosed(self, problem: str) -> ValueError:
        line = self._line(self._blocks.line, self._blocks.row)
        return ValueError(
            f"{self._where}, row {self._blocks.row:,}{line}: the quote that opens here {problem}; "
            "correct it, or pass --no_quoting if quotes are plain characters"
        )

    def _malformed(self, error: str, n_records: int, n_lines: int) -> ValueError:
        row = self._blocks.row + n_records
        at = f"{self._where}, row {row:,}{self._line(self._blocks.line + n_lines, row)}: "
        if "expected after" in error:
            return ValueError(
                f"{at}text follows the quote that closes a cell; double the quotes inside cells, "
                "or pass --no_quoting if quotes are plain characters"
            )
        if "field limit" in error:
            return ValueError(
                f"{at}a cell has more than {MAX_ROW_BYTES:,} characters; is a quote not closed?"
            )
        return ValueError(f"{at}{error}; correct the row")

    def _line(self, line: int, row: int) -> str:
        return f" (line {line:,})" if line and line != row else ""


def _is_number(cell: str) -> bool:
    return cell.isascii() and cell.isdecimal()
