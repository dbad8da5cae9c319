"""Read the rows of a CSV file exactly as Python's csv module does in strict mode, but faster.

The file is read in blocks of whole lines. A block is plain if it holds no lone carriage return, no
blank line, and quotes only around whole cells of one line; then Arrow splits it, because there is
only one way to read it. csv.reader splits all other blocks.

Rows are numbered from 1, including the header. A cell with line breaks makes a row of several
lines.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.csv as pa_csv

from dist_vasp.data.tables.csv_blocks import (
    MAX_ROW_BYTES,
    Blocks,
    check_text,
    is_plain,
    lines_of,
)
from dist_vasp.data.tables.csv_header import Header

_SEPARATOR = "\x1f"  # stands for a delimiter of several characters


@dataclass(frozen=True)
class RowBatch:
    """Some rows: their numbers, and the text of the wanted columns, in that order."""

    numbers: Sequence[int]
    columns: list[pa.Array]  # string, without nulls


class RowReader:
    """Reads the rows of `blocks` below the header; every row must be as wide as the header."""

    def __init__(self, blocks: Blocks, header: Header, where: str) -> None:
        self._blocks = blocks
        self._dialect = header.dialect
        self._n_columns = len(header.names)
        self._wanted = list(header.wanted.values())
        self._where = where
        # in which a stray quote would hide whole rows
        self._id_columns = [header.wanted[r] for r in ("user", "item") if r in header.wanted]
        self.n_broken = 0  # rows of several lines
        self._names = [str(i) for i in range(self._n_columns)]
        included = [str(i) for i in dict.fromkeys(self._wanted)]
        self._convert = pa_csv.ConvertOptions(
            include_columns=included,
            column_types=dict.fromkeys(included, pa.string()),
            null_values=[],
            strings_can_be_null=False,
        )

    def batches(self, block: bytes) -> Iterator[RowBatch]:
        """Yield the rows of `block` and of all blocks after it."""
        while block:
            check_text(block, self._dialect, self._blocks.row, self._where)
            if is_plain(block, self._dialect):
                batch = self._plain(block)
                if batch is not None:
                    yield batch
                    block = self._blocks.next()
                    continue
            batch, rest = self._strict(block)
            yield batch
            block = self._blocks.next()
            if rest and not block:
                raise self._unclosed("never closes")
            block = rest + block

    def _plain(self, block: bytes) -> RowBatch | None:
        """Split a plain block with Arrow; None where Arrow would differ from the csv module."""
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
        return RowBatch(
            range(first, first + n_rows),
            [table.column(str(i)).combine_chunks() for i in self._wanted],
        )

    def _strict(self, block: bytes) -> tuple[RowBatch, bytes]:
        """Split a block with the csv module; return its rows, and the bytes of an unfinished last
        row."""
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
            self._check_stray_quote(lines[first:last], numbers[index])
        self.n_broken += len(broken)
        self._blocks.row += len(records)
        self._blocks.line += done
        if len(rest) > MAX_ROW_BYTES:
            raise self._unclosed(f"does not close within {MAX_ROW_BYTES:,} bytes")
        if not all(records):
            numbers = [number for number, record in zip(numbers, records, strict=True) if record]
            records = [record for record in records if record]
        return RowBatch(
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

    def _check_stray_quote(self, lines: list[str], number: int) -> None:
        """ValueError where every line of a row looks like a row.

        Then a stray quote has probably opened a cell, and another one closed it.
        """
        delimiter = self._dialect.delimiter
        if (
            any(line.count(delimiter) != self._n_columns - 1 for line in lines)
            or self._n_columns < 2
        ):
            return
        cells = [
            [cell.strip('"') for cell in line.rstrip("\r\n").split(delimiter)] for line in lines
        ]
        numeric = bool(self._id_columns) and all(
            _is_number(line[i]) for line in cells for i in self._id_columns
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
