"""Lists on their way to a file: CSV, Parquet or JSON Lines by the file's ending, complete or not there at all.

One row is one recommendation: `user`, `rank` (from 1), `item`, `score`; explained ones have `p_flvae`, `p_nease` and, N times,
`because_1`, `weight_1`, ... besides. In JSON Lines the latter are one list, `"because": [{"item": ..., "weight": ...}, ...]`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dist_vasp.checkpoint import sync

_ROWS_PER_GROUP = 1 << 18  # of a Parquet file: its list of row groups stays in memory until the end


class _Writer(Protocol):
    def write_table(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class _ParquetWriter:
    """Joins blocks to row groups."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._writer, self._schema = pq.ParquetWriter(path, schema), schema
        self._held: list[pa.Table] = []
        self._n_held = 0

    def write_table(self, table: pa.Table) -> None:
        self._held.append(table)
        self._n_held += len(table)
        if self._n_held >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._n_held:
            self._writer.write_table(pa.concat_tables(self._held), self._n_held)
        self._held, self._n_held = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class _JsonLinesWriter:
    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - held until close
        self._flat = [name for name in schema.names if not name.startswith(("because_", "weight_"))]
        self._n = sum(name.startswith("because_") for name in schema.names)

    def write_table(self, table: pa.Table) -> None:
        columns = {name: _plain(table.column(name)) for name in table.column_names}
        reasons = [(columns[f"because_{n}"], columns[f"weight_{n}"]) for n in range(1, self._n + 1)]
        for row in range(len(table)):
            line: dict[str, Any] = {name: columns[name][row] for name in self._flat}
            if self._n:
                line["because"] = [{"item": i[row], "weight": w[row]} for i, w in reasons if i[row] is not None]
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Python values; a float32 as the shortest number that reads back as it."""
    if not pa.types.is_float32(column.type):
        return column.to_pylist()
    return [None if text is None else float(text) for text in column.cast(pa.string()).to_pylist()]


_WRITERS: dict[str, Any] = {".csv": pa_csv.CSVWriter, ".parquet": _ParquetWriter, ".jsonl": _JsonLinesWriter}


def check_output(output: str | Path, overwrite: bool) -> None:
    """ValueError unless `output` has a known ending, a folder to lie in, and does not exist yet."""
    path = Path(output)
    if path.suffix not in _WRITERS:
        raise ValueError(f"--output {output} ends in {path.suffix or 'nothing'}, expected one of {', '.join(_WRITERS)}")
    if not path.parent.is_dir():
        raise ValueError(f"--output {output}: the folder {path.parent} does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"--output {output} is a folder; name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"--output {output} exists; pass --overwrite to replace it, or choose another name")


def skipped_file(output: str | Path) -> Path:
    path = Path(output)
    return path.with_name(f"{path.stem}.skipped.csv")


class ListFile:
    """An output file and its `<output stem>.skipped.csv` under temporary names until `finish`. ValueError where the disk fails."""

    def __init__(self, output: Path, schema: pa.Schema, user_type: pa.DataType) -> None:
        self.output, self.n_rows, self.n_skipped = output, 0, 0
        self._paths = {path: path.with_name(f".{path.name}.tmp") for path in (output, skipped_file(output))}
        self._skipped_schema = pa.schema([("user", user_type), ("reason", pa.string())])
        self._skipped: _Writer | None = None
        self._writer: _Writer | None = None
        self._guard(self._open, schema)

    def _open(self, schema: pa.Schema) -> None:
        self._writer = _WRITERS[self.output.suffix](str(self._paths[self.output]), schema)

    def write(self, table: pa.Table, skipped: pa.Array, reasons: pa.Array) -> None:
        """Add lists, and users without one, each with its reason."""
        self._guard(self._write, table, skipped, reasons)

    def _write(self, table: pa.Table, skipped: pa.Array, reasons: pa.Array) -> None:
        assert self._writer is not None
        self._writer.write_table(table)
        self.n_rows += len(table)
        if len(skipped):
            if self._skipped is None:
                self._skipped = pa_csv.CSVWriter(str(self._paths[skipped_file(self.output)]), self._skipped_schema)
            self._skipped.write_table(pa.Table.from_arrays([skipped, reasons], schema=self._skipped_schema))
            self.n_skipped += len(skipped)

    def finish(self) -> None:
        self._guard(self._finish)

    def _finish(self) -> None:
        assert self._writer is not None
        self._writer.close()
        if self._skipped is not None:
            self._skipped.close()
        else:  # it belongs to this output: one that an earlier run left is removed if nobody is skipped now
            skipped_file(self.output).unlink(missing_ok=True)
        for path, temporary in self._paths.items():
            if path == self.output or self._skipped is not None:
                sync(temporary)
                os.replace(temporary, path)

    def discard(self) -> None:
        """Remove what is not finished."""
        for temporary in self._paths.values():
            temporary.unlink(missing_ok=True)

    def _guard(self, work: Any, *arguments: Any) -> None:
        try:
            work(*arguments)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.output} cannot be written ({error}); free some space or choose another --output") from None
