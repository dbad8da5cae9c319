"""Read the columns of one Parquet file by role, a batch at a time.

The sizes that the file declares are checked before it is read. Text columns are read with their
dictionaries, so that a long text that repeats is in memory once.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.data import ids
from dist_vasp.data.tables.columns import Columns, find_columns, without_constants
from dist_vasp.data.tables.csv_file import Raw

ROWS_PER_BATCH = 1 << 17
DELTA_ROWS_PER_BATCH = 1 << 10
MAX_CHUNK_BYTES = 4 << 30  # of one column in one row group, unpacked
MAX_MEAN_BYTES = 1 << 16  # of one value of a column


class ParquetFile:
    """The columns of one Parquet file; `names` (by role) and `unused` as in `CsvFile`."""

    n_broken = 0

    def __init__(self, path: Path, columns: Columns, constants: Collection[str]) -> None:
        self._path = path
        self._columns = columns
        self._constants = constants
        self.names: dict[str, str] = {}
        self.unused: list[str] = []

    def batches(self) -> Generator[Raw, None, None]:
        """Yield batches in the file's own types, with encoded dictionaries.

        ValueError names the file.
        """
        names, text, n_rows = self._inspect()
        # without a buffer size, everything that was read stays in memory
        options = {"read_dictionary": text, "pre_buffer": False, "buffer_size": 1 << 20}
        with pq.ParquetFile(self._path, **options) as file:
            row = 1
            for batch in file.iter_batches(n_rows, columns=names, use_threads=False):
                columns = {role: batch[name] for role, name in self.names.items()}
                yield Raw(range(row, row + len(batch)), columns)
                row += len(batch)

    def _inspect(self) -> tuple[list[str], list[str], int]:
        """Return the columns to read, those of them that are text, and the rows of a batch."""
        with pq.ParquetFile(self._path, memory_map=False) as file:
            schema = file.schema_arrow
            columns = without_constants(self._columns, self._constants, schema.names)
            wanted = find_columns(schema.names, columns, str(self._path))
            self.names = {role: schema.names[i] for role, i in wanted.items()}
            used = wanted.values()
            self.unused = [name for i, name in enumerate(schema.names) if i not in used]
            names = list(dict.fromkeys(self.names.values()))
            delta = _delta_encoded(file.metadata)
            text = [n for n in names if n not in delta and _is_text(schema.field(n).type)]
            n_rows = ROWS_PER_BATCH
            if not delta.isdisjoint(names):
                n_rows = min(ROWS_PER_BATCH, DELTA_ROWS_PER_BATCH)
            _check_sizes(file.metadata, names, str(self._path))
        return names, text, n_rows


def _is_text(kind: pa.DataType) -> bool:
    return ids.is_text(kind) or pa.types.is_binary(kind)


def _delta_encoded(metadata: pq.FileMetaData) -> set[str]:
    """Return the columns whose texts are stored as differences.

    Arrow reads no dictionary of them, and few bytes may hold long texts.
    """
    groups = (metadata.row_group(g) for g in range(metadata.num_row_groups))
    chunks = (group.column(c) for group in groups for c in range(group.num_columns))
    return {
        chunk.path_in_schema
        for chunk in chunks
        if any(e.startswith("DELTA_") and "BYTE" in e for e in chunk.encodings)
    }


def _check_sizes(metadata: pq.FileMetaData, names: list[str], where: str) -> None:
    """ValueError where a column of a row group unpacks to more than may be in memory."""
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            chunk = group.column(c)
            if chunk.path_in_schema.split(".")[0] not in names:
                continue
            size, values = chunk.total_uncompressed_size, chunk.num_values
            if size > MAX_CHUNK_BYTES or size > MAX_MEAN_BYTES * max(values, 16):
                raise ValueError(
                    f"{where}: column {chunk.path_in_schema!r} has {size:,} bytes for {values:,} "
                    f"values in row group {g}; "
                    f"at most {MAX_CHUNK_BYTES:,} bytes and {MAX_MEAN_BYTES:,} a value are read; "
                    "write smaller row groups of short ids"
                )
