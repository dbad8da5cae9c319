"""Read the columns of one CSV file by role, as text, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dist_vasp.data.tables import csv_blocks, csv_rows
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.csv_header import DELIMITERS, read_header
from dist_vasp.data.tables.encodings import Utf8

_HEADER_BYTES = 1 << 16  # read at a time where only the header is wanted


@dataclass(frozen=True)
class Raw:
    """Some rows as in the file: their numbers, and columns by role."""

    numbers: Sequence[int]
    columns: dict[str, pa.Array]


class CsvFile:
    """The columns of one CSV file.

    `names` (of the columns, by role) and `unused` are known after the first batch, and `n_broken`
    (rows of several lines) after the last one.
    """

    def __init__(
        self,
        opener: Callable[[], Any],
        where: str,
        columns: Columns,
        reading: Reading,
        constants: Collection[str],
    ) -> None:
        self._opener = opener
        self._where = where
        self._columns = columns
        self._reading = reading
        self._constants = constants
        self.names: dict[str, str] = {}
        self.unused: list[str] = []
        self.n_broken = 0

    def batches(self) -> Generator[Raw, None, None]:
        """Yield the rows; every cell is text. ValueError names `where` and the row."""
        where, stream = self._where, self._opener()
        try:
            text = Utf8(stream, self._reading.encoding, where)
            blocks = csv_blocks.Blocks(text, where, csv_blocks.BLOCK_BYTES)
            header = read_header(blocks, self._columns, self._reading, self._constants, where)
            self.names = {role: header.names[i] for role, i in header.wanted.items()}
            used = header.wanted.values()
            self.unused = [name for i, name in enumerate(header.names) if i not in used]
            rows = csv_rows.RowReader(blocks, header, where)
            for batch in rows.batches(header.body or blocks.next()):
                yield Raw(batch.numbers, dict(zip(header.wanted, batch.columns, strict=True)))
            self.n_broken = rows.n_broken
        finally:
            stream.close()


def csv_names(opener: Callable[[], Any], where: str, reading: Reading) -> list[str]:
    """Return the names of the columns, split by the delimiter that gives the most of them."""
    names: list[str] = []
    for delimiter in DELIMITERS if reading.delimiter is None else (reading.delimiter,):
        stream = opener()
        try:
            blocks = csv_blocks.Blocks(Utf8(stream, reading.encoding, where), where, _HEADER_BYTES)
            nothing = Columns(None, None, optional_rating=False)
            header = read_header(blocks, nothing, replace(reading, delimiter=delimiter), (), where)
        finally:
            stream.close()
        names = max(names, header.names, key=len)
    return names
