"""Read tables: from files to record batches with the columns user, item, rating, split and time.

    table = open_table(["ratings-*.csv"], Columns(rating="stars"))
    for batch in table.batches(): ...

`user` and `item` are ids (dist_vasp/data/ids.py): int64 in a batch whose ids are all canonical
integers, else strings. `ids.join` and `ids.IdIndex` combine batches of both types. The other
columns are described in values.py. Rows without a user or an item are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dist_vasp.data import ids
from dist_vasp.data.tables import movielens
from dist_vasp.data.tables.columns import ROLES, Columns, Reading
from dist_vasp.data.tables.csv_file import CsvFile, Raw, csv_names
from dist_vasp.data.tables.inputs import File, expand, find_files
from dist_vasp.data.tables.parquet_file import ParquetFile
from dist_vasp.data.tables.streams import readable
from dist_vasp.data.tables.values import convert

_NAMED = 10  # skipped files that a note names


@dataclass
class Table:
    """A table in one or several files; it can be read more than once.

    The counts are those of the last reading.
    """

    files: list[File]
    columns: Columns
    reading: Reading
    skipped: list[str] = field(default_factory=list)  # files that are not read, with the reason
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # rows by reason
    unused: list[str] = field(default_factory=list)  # names of columns that are not read
    n_broken: int = 0  # rows of several lines
    roles: list[str] | None = None  # of the columns of every file; None before the first one

    def with_columns(self, columns: Columns) -> Table:
        """Return the same files, read with other columns."""
        return Table(self.files, columns, self.reading, self.skipped)

    def part(self, numbers: Sequence[int]) -> Table:
        """Return a table of some of the files, which must have the columns found so far."""
        files = [self.files[number] for number in numbers]
        return Table(files, self.columns, self.reading, roles=self.roles)

    def names(self) -> list[str]:
        """Return the names of the first file's columns and folders, without blanks around them."""
        file = self.files[0]
        with readable(file.where):
            is_parquet = file.kind == "parquet"
            names = (
                pq.read_schema(file.path).names
                if is_parquet
                else csv_names(file.open, file.where, self.reading)
            )
        return [
            name.strip() for name in [*names, *(key for key in file.partitions if key not in names)]
        ]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches of all files that have rows; ValueError names file and row."""
        self.rows = 0
        self.left_out = {}
        self.unused = []
        self.n_broken = 0
        self.roles = None
        yield from self.read()
        self.check_ids()

    def read(self) -> Iterator[pa.RecordBatch]:
        """Yield the batches of all files that have rows, and add to the counts."""
        for file in self.files:
            reader = self._reader(file)
            for raw in _readable_batches(reader, file.where):
                self.roles = self._same_roles(file, reader.names)
                batch = self._batch(raw, file, reader.names)
                if len(batch):
                    yield batch
            # a file without rows has columns, too
            self.roles = self._same_roles(file, reader.names)
            self.add_counts(0, {}, reader.unused, reader.n_broken)

    def add_counts(
        self, rows: int, left_out: Mapping[str, int], unused: Sequence[str], n_broken: int
    ) -> None:
        """Add the counts of a reading of some of the files."""
        self.rows += rows
        for reason, n in left_out.items():
            self.left_out[reason] = self.left_out.get(reason, 0) + n
        self.unused += [name for name in unused if name not in self.unused]
        self.n_broken += n_broken

    def check_ids(self) -> None:
        """ValueError where rows were read and every one is without a user or an item."""
        if self.rows and self.rows == sum(self.left_out.values()):
            named = ", ".join(self.reading.missing)
            raise ValueError(
                f"{self.files[0].where}: all {self.rows:,} rows are without a user or an item; "
                f"empty cells and {named or 'no other text'} stand for a missing id, name others "
                "with --missing"
            )

    def _reader(self, file: File) -> CsvFile | ParquetFile:
        if file.kind == "parquet":
            return ParquetFile(file.path, self.columns, file.partitions)
        return CsvFile(file.open, file.where, self.columns, self.reading, file.partitions)

    def _same_roles(self, file: File, names: dict[str, str]) -> list[str]:
        """Return the roles of the file's columns; ValueError where an earlier file has others."""
        roles = [role for role in ROLES if role in names or self._name(role) in file.partitions]
        if self.roles is not None and roles != self.roles:
            raise ValueError(
                f"{file.where} has the columns {', '.join(roles)}, the files before it "
                f"{', '.join(self.roles)}; name files of one kind"
            )
        return roles

    def match_columns(self) -> tuple[dict[str, str], list[str]]:
        """Return the names of the columns that are read, by role, and of the others.

        Only the first file is inspected. ValueError where a column is missing.
        """
        file = self.files[0]
        reader = self._reader(file)
        with closing(_readable_batches(reader, file.where)) as batches:
            next(batches, None)
        names = dict(reader.names)
        for role in ROLES:
            name = self._name(role)
            if role not in names and name in file.partitions:
                names[role] = name
        others = [name for name in file.partitions if name not in names.values()]
        named = {role: name.strip() for role, name in names.items()}
        return named, list(dict.fromkeys(name.strip() for name in [*reader.unused, *others]))

    def _name(self, role: str) -> str | None:
        """Return the name of the column with this role, None where it is not read."""
        return getattr(self.columns, role) or (
            "rating" if role == "rating" and self.columns.optional_rating else None
        )

    def notes(self) -> list[str]:
        """Return notes for the user on the last reading."""
        notes = [f"skipped {name}" for name in self.skipped[:_NAMED]]
        if len(self.skipped) > _NAMED:
            notes.append(f"skipped {len(self.skipped) - _NAMED:,} more files")
        if self.n_broken:
            notes.append(f"{self.n_broken:,} rows hold quoted line breaks")
        return notes

    def _batch(self, raw: Raw, file: File, file_names: dict[str, str]) -> pa.RecordBatch:
        """Convert rows; rows without a user or an item are dropped and counted."""
        columns, names = dict(raw.columns), dict(file_names)
        for role in ROLES:
            name = self._name(role)
            if name in file.partitions:
                constant = pa.repeat(
                    pa.scalar(file.partitions[name], pa.string()), len(raw.numbers)
                )
                if role in columns:
                    self._check_folder(
                        role, columns[role], constant, raw.numbers, f"{file.where}: column {name!r}"
                    )
                else:
                    columns[role], names[role] = constant, name
        where = {role: f"{file.where}: column {name!r}" for role, name in names.items()}
        self.rows += len(raw.numbers)
        kept: Any = None
        for role in ("user", "item"):
            if role in columns:
                columns[role] = ids.of_column(
                    columns[role], raw.numbers, where[role], self.reading.missing
                )
                kept = self._count_missing(role, columns[role], kept)
        numbers = raw.numbers
        if kept is not None:
            columns = {role: column.filter(kept) for role, column in columns.items()}
            numbers = np.asarray(numbers)[np.asarray(kept)]
        for role in columns:
            columns[role] = convert(role, columns[role], numbers, where[role])
        ordered = {role: columns[role] for role in ROLES if role in columns}
        return pa.RecordBatch.from_arrays(list(ordered.values()), list(ordered))

    def _check_folder(
        self, role: str, column: pa.Array, constant: pa.Array, numbers: Sequence[int], where: str
    ) -> None:
        """ValueError where a column contradicts the name of the folder."""
        both = []
        for values in (column, constant):
            if role in ("user", "item"):
                texts = ids.as_text(ids.of_column(values, numbers, where, self.reading.missing))
            else:
                texts = convert(role, values, numbers, where).cast(pa.string())
            both.append(pc.fill_null(texts, ""))
        differs = pc.not_equal(*both)
        if pc.any(differs, min_count=0).as_py():
            at = pc.index(differs, True).as_py()
            raise ValueError(
                f"{where}, row {numbers[at]}: {both[0][at].as_py()!r} where the name of the "
                f"folder says {both[1][at].as_py()!r}; "
                "move the row to its folder, or rename one of the two"
            )

    def _count_missing(self, role: str, column: pa.Array, kept: Any) -> Any:
        """Count the rows that lack this id, and return which rows to keep (None: all).

        `kept`: the rows to keep so far. A row that lacks both ids is counted once.
        """
        if not column.null_count:
            return kept
        present = column.is_valid()
        now = present if kept is None else pc.and_(kept, present)
        before = len(column) if kept is None else pc.sum(kept).as_py()
        n_missing = before - (pc.sum(now).as_py() or 0)
        if n_missing:
            reason = f"rows_without_{role}"
            self.left_out[reason] = self.left_out.get(reason, 0) + n_missing
        return now


def _readable_batches(reader: CsvFile | ParquetFile, where: str) -> Generator[Raw, None, None]:
    with readable(where):
        yield from reader.batches()


def open_table(
    inputs: Sequence[str | Path],
    columns: Columns | None = None,
    reading: Reading | None = None,
    kind: str | None = None,
) -> Table:
    """Return the table in files, folders, globs and zips; ValueError where there is none.

    For a MovieLens data set this is its ratings file, unless `kind` or `reading` give a format.
    """
    reading = reading or Reading()
    if kind is None and reading == Reading(missing=reading.missing) and len(inputs) == 1:
        paths = expand(str(inputs[0]))
        ratings = movielens.find(paths[0]) if len(paths) == 1 else None
        if ratings is not None:
            return Table(
                [ratings.file()], columns or ratings.columns(), ratings.reading(reading.missing)
            )
    selected = find_files(inputs, kind)
    return Table(selected.files, columns or Columns(), reading, selected.skipped)
