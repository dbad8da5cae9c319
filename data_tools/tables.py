"""CSV and Parquet as record batches with columns `user`, `item` and, where there are any, `rating` and `split`.

Ids come as int64 (every id in [0, 2^63)) or as strings, ratings as float64 without gaps, splits as strings. All other
readers end here too, so what is checked here is checked for every format.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

BLOCK_BYTES = 8 << 20
ROWS_PER_BATCH = 1 << 19


@dataclass(frozen=True)
class Columns:
    """Names of the input's columns. `rating` None: the column `rating` if there is one; `split` None: not read."""

    user: str = "user"
    item: str = "item"
    rating: str | None = None
    split: str | None = None


class TextIdsError(Exception):
    """A CSV id column, `user` or `item`, turned out not to be all integers: read it again as strings."""

    def __init__(self, column: str):
        super().__init__(column)
        self.column = column


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Turn what libraries raise on a damaged or foreign file into a ValueError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        text = str(error).rstrip(".") or type(error).__name__
        hint = ""
        if re.search("runcated|ended before|unexpected end|CRC|magic bytes", text):
            hint = "; the file is cut off or damaged, fetch it again"
        elif "incorrect header check" in text:
            hint = "; it is not compressed with gzip, drop the .gz from its name"
        elif "CSV parse error" in text:
            hint = "; every row needs the columns of the header"
        raise ValueError(f"{where} cannot be read: {text}{hint}") from None


def find_columns(names: Sequence[str], columns: Columns, where: str) -> dict[str, str]:
    """The input's column for `user`, `item` and, where they are read, `rating` and `split`; ValueError naming what is missing."""
    wanted = {"user": columns.user, "item": columns.item}
    if columns.rating is not None or "rating" in names:
        wanted["rating"] = columns.rating or "rating"
    if columns.split is not None:
        wanted["split"] = columns.split
    for role, name in wanted.items():
        if list(names).count(name) != 1:
            found = "has no column" if name not in names else "has more than one column"
            raise ValueError(f"{where} {found} {name!r}; its columns are {', '.join(names) or 'none'}; pass --{role}_column NAME")
    return wanted


def checked(batch: dict[str, Any], first_row: int, where: str) -> pa.RecordBatch:
    """The batch, once no id is missing and every rating is a number. `first_row` numbers the first row in the message."""
    for role in ("user", "item"):
        ids = batch[role]
        missing = pc.is_null(ids) if pa.types.is_integer(ids.type) else pc.or_kleene(pc.is_null(ids), pc.equal(ids, ""))
        _refuse(missing, first_row, where, f"the {role} id is missing; every row needs one")
    if "rating" in batch:
        absent = pc.is_null(batch["rating"], nan_is_null=True)
        _refuse(absent, first_row, where, "the rating is missing; give every row a number, or leave the column out")
    if "split" in batch:
        _refuse(pc.is_null(batch["split"]), first_row, where, "the split is missing; expected train, test or validation")
    return pa.RecordBatch.from_arrays(list(batch.values()), list(batch))


def _refuse(bad: pa.Array, first_row: int, where: str, problem: str) -> None:
    if pc.any(bad, min_count=0).as_py():
        raise ValueError(f"{where}, row {first_row + pc.index(bad, True).as_py()}: {problem}")


# --- CSV -------------------------------------------------------------------------------------------------------------


def csv_batches(
    opener: Callable[[], Any],
    where: str,
    columns: Columns,
    text: frozenset[str],
    names: list[str] | None = None,
    delimiter: str = ",",
) -> Iterator[pa.RecordBatch]:
    """Batches of one CSV stream; `names` where it has no header, `text` the roles to read as strings.

    Raises TextIdsError where an id column that is not in `text` has an id outside [0, 2^63), ValueError for everything else.
    """
    read = pa.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names)
    parse = pa.csv.ParseOptions(delimiter=delimiter)
    with readable(where):
        if names is None:
            with opener() as stream:
                header = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").split(b"\n")[0]
            if not header.strip():
                raise ValueError(f"{where} is empty; expected a header line with the names of the columns")
            names = pa.csv.read_csv(pa.BufferReader(header + b"\n"), parse_options=parse).column_names
        wanted = find_columns(names, columns, where)
        types: dict[str, pa.DataType] = {wanted[r]: pa.string() if r in text else pa.int64() for r in ("user", "item")}
        types |= {wanted[role]: kind for role, kind in (("rating", pa.float64()), ("split", pa.string())) if role in wanted}
        convert = pa.csv.ConvertOptions(column_types=types, include_columns=list(types), null_values=[""])
        row = 1 if read.column_names else 2
        with opener() as stream:
            try:
                for batch in pa.csv.open_csv(stream, read, parse, convert):
                    arrays = {role: batch[name] for role, name in wanted.items()}
                    for role in ("user", "item"):
                        if role not in text and (pc.min(arrays[role]).as_py() or 0) < 0:
                            raise TextIdsError(role)
                    yield checked(arrays, row, where)
                    row += len(batch)
            except pa.ArrowInvalid as error:
                failed = re.search(r"CSV column #(\d+): (?:Row #(\d+): )?CSV conversion error to (\w+): (.*)", str(error))
                if failed is None:
                    raise
                name = names[int(failed[1])]
                role = next(r for r, n in wanted.items() if n == name)
                if failed[3] == "int64":
                    raise TextIdsError(role) from None
                expected = "a number; correct it" if role == "rating" else "UTF-8 text; save the file as UTF-8"
                at = f", row {failed[2]}" if failed[2] else ""
                raise ValueError(f"{where}{at}: column {name!r} has {failed[4]}; expected {expected}") from None


def _open_csv(path: Path) -> pa.NativeFile:
    return pa.input_stream(str(path), compression="gzip" if path.suffix.lower() == ".gz" else None)


@dataclass(frozen=True)
class CsvSource:
    """One or more .csv or .csv.gz files, one after another."""

    paths: list[Path]
    columns: Columns

    def batches(self, text: frozenset[str] = frozenset()) -> Iterator[pa.RecordBatch]:
        for path in self.paths:
            yield from csv_batches(partial(_open_csv, path), str(path), self.columns, text)

    def titles(self) -> dict[int, str] | None:
        return None


# --- Parquet ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParquetSource:
    """One or more Parquet files, one after another. Id columns are integers or strings."""

    paths: list[Path]
    columns: Columns

    def batches(self, text: frozenset[str] = frozenset()) -> Iterator[pa.RecordBatch]:
        kinds: dict[str, pa.DataType] = {}
        for path in self.paths:
            with readable(str(path)), pq.ParquetFile(path) as file:
                wanted = find_columns(file.schema_arrow.names, self.columns, str(path))
                row = 1
                for batch in file.iter_batches(ROWS_PER_BATCH, columns=list(dict.fromkeys(wanted.values())), use_threads=False):
                    arrays = {role: _parquet_column(role, name, batch[name], row, str(path)) for role, name in wanted.items()}
                    for role in ("user", "item"):
                        if kinds.setdefault(role, arrays[role].type) != arrays[role].type:
                            raise ValueError(
                                f"{path}: column {wanted[role]!r} is {arrays[role].type}, in the files before it {kinds[role]}"
                            )
                    yield checked(arrays, row, str(path))
                    row += len(batch)

    def titles(self) -> dict[int, str] | None:
        return None


def _parquet_column(role: str, name: str, values: pa.Array, row: int, where: str) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if role == "rating":
        try:
            return values.cast(pa.float64())
        except pa.ArrowException as error:
            raise ValueError(f"{where}: column {name!r} of type {kind} has ratings that are not numbers: {error}") from None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.string())
    if role == "split" and pa.types.is_integer(kind):
        return values.cast(pa.string())
    if role == "split" or not pa.types.is_integer(kind):
        raise ValueError(f"{where}: column {name!r} is of type {kind}, expected integers or strings; convert it first")
    outside = pc.greater(values, pa.scalar(2**63 - 1, pa.uint64())) if pa.types.is_uint64(kind) else pc.less(values, 0)
    if pc.any(outside, min_count=0).as_py():
        position = pc.index(outside, True).as_py()
        raise ValueError(
            f"{where}, row {row + position}: the {role} id {values[position].as_py()} of integer column {name!r} is outside 0 to 2^63-1; "
            "make the ids non-negative, or write the column as strings"
        )
    return values.cast(pa.int64())
