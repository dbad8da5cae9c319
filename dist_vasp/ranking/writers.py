"""Write lists to a CSV, Parquet or JSON Lines file, which appears only when complete.

One row is one recommendation: `user`, `rank` (from 1), `item`, `score`. Explained rows also have
`p_flvae`, `p_nease` and N pairs `because_1`, `weight_1`, ... In JSON Lines the pairs are one list,
`"because": [{"item": ..., "weight": ...}, ...]`. Titles, where they are asked for, are `title` and
`title_1`, ..., in JSON Lines `"title"` of the row and of each reason.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dist_vasp.files import new_file
from dist_vasp.places import Inputs, check_file
from dist_vasp.recognise import begins_with
from dist_vasp.temporary import finish

_ROWS_PER_GROUP = 1 << 18  # of a Parquet file: its list of row groups stays in memory until the end


class _Writer(Protocol):
    def write_table(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class _ParquetWriter:
    """Writes a Parquet file, joining blocks to row groups."""

    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(file, schema)
        self._waiting: list[pa.Table] = []
        self._n_waiting = 0

    def write_table(self, table: pa.Table) -> None:
        self._waiting.append(table)
        self._n_waiting += len(table)
        if self._n_waiting >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._n_waiting:
            self._writer.write_table(pa.concat_tables(self._waiting), self._n_waiting)
        self._waiting = []
        self._n_waiting = 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class _JsonLinesWriter:
    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        self._file = file
        reasons = ("because_", "weight_", "title_")
        self._flat = [name for name in schema.names if not name.startswith(reasons)]
        self._keys = {"item": "because", "title": "title", "weight": "weight"}
        if "title" not in schema.names:
            del self._keys["title"]
        self._n = sum(name.startswith("because_") for name in schema.names)

    def write_table(self, table: pa.Table) -> None:
        columns = {name: _plain(table.column(name)) for name in table.column_names}
        reasons = [
            {key: columns[f"{name}_{n}"] for key, name in self._keys.items()}
            for n in range(1, self._n + 1)
        ]
        for row in range(len(table)):
            line: dict[str, Any] = {name: columns[name][row] for name in self._flat}
            if self._n:
                line["because"] = [
                    {key: values[row] for key, values in reason.items()}
                    for reason in reasons
                    if reason["item"][row] is not None
                ]
            self._file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

    def close(self) -> None:
        """Leave the file open; its opener closes it."""


def _plain(column: pa.ChunkedArray) -> list[Any]:
    """Return Python values; a float32 becomes the shortest number that is equal to it."""
    if not pa.types.is_float32(column.type):
        return column.to_pylist()
    return [None if text is None else float(text) for text in column.cast(pa.string()).to_pylist()]


_WRITERS: dict[str, Any] = {
    ".csv": pa_csv.CSVWriter,
    ".parquet": _ParquetWriter,
    ".jsonl": _JsonLinesWriter,
}


_is_skipped = begins_with(b'"user","reason"', b"user,reason")


def _is_list(path: Path) -> bool:
    """Return whether a file holds lists that this module wrote."""
    columns = ["user", "rank", "item", "score"]
    if path.suffix == ".parquet":
        return pq.read_schema(path).names[:4] == columns
    if path.suffix == ".csv":
        return begins_with(b'"user","rank","item","score"', b"user,rank,item,score")(path)
    with open(path, "rb") as handle:
        return list(json.loads(handle.readline(1 << 20)))[:4] == columns


def check_output(output: str | Path, overwrite: bool | None, inputs: Inputs = ()) -> None:
    """ValueError unless lists may be written to `output`, and skipped users next to it.

    `inputs`: as in `dist_vasp.places`.
    """
    check_file(output, "--output", overwrite, _is_list, inputs, tuple(_WRITERS))
    check_file(skipped_file(output), "", overwrite, _is_skipped, inputs)


def skipped_file(output: str | Path) -> Path:
    path = Path(output)
    return path.with_name(f"{path.stem}.skipped.csv")


class ListFile:
    """An output file and its `<output stem>.skipped.csv`, which appear at `finish`.

    Until then both are locked, so that no other command writes them. ValueError where writing
    fails.
    """

    def __init__(
        self,
        output: Path,
        schema: pa.Schema,
        user_type: pa.DataType,
        overwrite: bool | None = None,
        inputs: Inputs = (),
    ) -> None:
        self.output = output
        self.n_rows = 0
        self.n_skipped = 0
        self._skipped_schema = pa.schema([("user", user_type), ("reason", pa.string())])
        self._skipped: _Writer | None = None
        self._options: dict[str, Any] = {"overwrite": overwrite, "inputs": inputs}
        check_output(output, overwrite, inputs)
        with ExitStack() as files:
            file = files.enter_context(new_file(output, "--output", ours=_is_list, **self._options))
            self._writer: _Writer = self._guard(_WRITERS[output.suffix], file, schema)
            self._files = files.pop_all()
            self._written = [file]

    def write(self, table: pa.Table, skipped: pa.Array, reasons: pa.Array) -> None:
        """Add lists, and users without a list, each with a reason."""
        self._guard(self._write, table, skipped, reasons)

    def _write(self, table: pa.Table, skipped: pa.Array, reasons: pa.Array) -> None:
        self._writer.write_table(table)
        self.n_rows += len(table)
        if len(skipped):
            if self._skipped is None:
                file = self._files.enter_context(
                    new_file(skipped_file(self.output), "", ours=_is_skipped, **self._options)
                )
                self._written.append(file)
                self._skipped = pa_csv.CSVWriter(file, self._skipped_schema)
            self._skipped.write_table(
                pa.Table.from_arrays([skipped, reasons], schema=self._skipped_schema)
            )
            self.n_skipped += len(skipped)

    def finish(self) -> None:
        self._guard(self._finish)

    def _finish(self) -> None:
        self._writer.close()
        if self._skipped is not None:
            self._skipped.close()
        for file in self._written:
            finish(file)
        self._files.close()
        if self._skipped is None:  # remove the skipped users of earlier lists
            earlier = skipped_file(self.output)
            if earlier.is_file() and not earlier.is_symlink() and _is_skipped(earlier):
                earlier.unlink()

    def discard(self) -> None:
        """Remove the files if they are not finished."""
        self._files.__exit__(GeneratorExit, GeneratorExit(), None)

    def _guard(self, work: Any, *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.output} cannot be written ({error}); free some space or choose another "
                "--output"
            ) from None
