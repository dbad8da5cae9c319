"""The one reader of tables: files in, record batches with the columns user, item, rating, split,
time out.

    table = open_table(["ratings-*.csv"], Columns(rating="stars"))
    for batch in table.batches(): ...

`user` and `item` are ids (dist_vasp/data/ids.py): int64 in a batch whose ids are all canonical integers, else strings;
ids.join and ids.IdIndex bring batches together. `rating` is float64 without gaps, `split` and `title` are strings, `time`
is float64: a number as it stands, a date in microseconds since 1970. Rows without a user or an item are left out and counted.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
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
from dist_vasp.data.tables.csv_file import Facts, Raw, csv_names, csv_pieces
from dist_vasp.data.tables.inputs import File, expand, find_files
from dist_vasp.data.tables.parquet_file import parquet_pieces
from dist_vasp.data.tables.streams import readable

_ZONE = r":[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)$"  # the end of a time
_NAMED = 10  # of the files that are skipped


@dataclass
class Table:
    """Some files, one after another.

    It can be read more than once; the counts are those of the last reading.
    """

    files: list[File]
    columns: Columns
    reading: Reading
    skipped: list[str] = field(default_factory=list)  # files that are not read, with the reason
    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)  # rows by reason
    unused: list[str] = field(default_factory=list)  # names of columns that are not read
    n_broken: int = 0  # rows of several lines

    def names(self) -> list[str]:
        """The names of the first file's columns, those of its folders included, without the blanks
        around them."""
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
        """Batches of all files, never empty ones; ValueError names file and row."""
        self.rows, self.left_out, self.unused, self.n_broken = 0, {}, [], 0
        roles: list[str] | None = None
        for file in self.files:
            facts = Facts()
            for raw in self._pieces(file, facts):
                roles = self._same_roles(file, facts, roles)
                batch = self._batch(raw, file, facts)
                if len(batch):
                    yield batch
            roles = self._same_roles(file, facts, roles)  # a file without rows has columns, too
            self.unused += [name for name in facts.unused if name not in self.unused]
            self.n_broken += facts.n_broken
        if self.rows and self.rows == sum(self.left_out.values()):
            named = ", ".join(self.reading.missing)
            raise ValueError(
                f"{self.files[0].where}: all {self.rows:,} rows are without a user or an item; "
                f"empty cells and {named or 'no other text'} stand for a missing id, name others "
                "with --missing"
            )

    def _same_roles(self, file: File, facts: Facts, before: list[str] | None) -> list[str]:
        """The roles that the file has columns of; ValueError where the files before it have others."""
        roles = [
            role for role in ROLES if role in facts.names or self._name(role) in file.partitions
        ]
        if before is not None and roles != before:
            raise ValueError(
                f"{file.where} has the columns {', '.join(roles)}, the files before it "
                f"{', '.join(before)}; name files of one kind"
            )
        return roles

    def look(self) -> tuple[dict[str, str], list[str]]:
        """Names of the first file's columns that are read, by role, and of the others; ValueError
        where one is missing."""
        file, facts = self.files[0], Facts()
        with closing(self._pieces(file, facts)) as pieces:
            next(pieces, None)
        for role in ROLES:
            name = self._name(role)
            if role not in facts.names and name in file.partitions:
                facts.names[role] = name
        others = [name for name in file.partitions if name not in facts.names.values()]
        named = {role: name.strip() for role, name in facts.names.items()}
        return named, list(dict.fromkeys(name.strip() for name in [*facts.unused, *others]))

    def _name(self, role: str) -> str | None:
        """The name of the column with this role, None where it is not read."""
        return getattr(self.columns, role) or (
            "rating" if role == "rating" and self.columns.optional_rating else None
        )

    def notes(self) -> list[str]:
        """What there is to say of the last reading besides its counts."""
        said = [f"skipped {name}" for name in self.skipped[:_NAMED]]
        if len(self.skipped) > _NAMED:
            said.append(f"skipped {len(self.skipped) - _NAMED:,} more files")
        if self.n_broken:
            said.append(f"{self.n_broken:,} rows hold quoted line breaks")
        return said

    def _pieces(self, file: File, facts: Facts) -> Generator[Raw, None, None]:
        with readable(file.where):
            if file.kind == "parquet":
                yield from parquet_pieces(file.path, self.columns, file.partitions, facts)
            else:
                yield from csv_pieces(
                    file.open, file.where, self.columns, self.reading, file.partitions, facts
                )

    def _batch(self, raw: Raw, file: File, facts: Facts) -> pa.RecordBatch:
        """The rows with their ids, checked; rows without one are counted and left out."""
        columns, names = dict(raw.columns), dict(facts.names)
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
            columns[role] = _CONVERT[role](columns[role], numbers, where[role])
        ordered = {role: columns[role] for role in ROLES if role in columns}
        return pa.RecordBatch.from_arrays(list(ordered.values()), list(ordered))

    def _check_folder(
        self, role: str, column: pa.Array, constant: pa.Array, numbers: Sequence[int], where: str
    ) -> None:
        """ValueError where a column holds another value than the name of the folder says."""
        both = []
        for values in (column, constant):
            if role in ("user", "item"):
                texts = ids.as_text(ids.of_column(values, numbers, where, self.reading.missing))
            else:
                texts = _CONVERT[role](values, numbers, where).cast(pa.string())
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
        """The rows to keep so far, None for all of them, with those of a missing id counted once."""
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


def open_table(
    inputs: Sequence[str | Path],
    columns: Columns | None = None,
    reading: Reading | None = None,
    kind: str | None = None,
) -> Table:
    """The table in the files, folders, globs and zips that are named; ValueError where there is
    none.

    A data set of MovieLens is its ratings, unless `kind` or `reading` say how the files are
    written.
    """
    reading = reading or Reading()
    if kind is None and reading == Reading(missing=reading.missing) and len(inputs) == 1:
        paths = expand(str(inputs[0]))
        ratings = movielens.find(paths[0]) if len(paths) == 1 else None
        if ratings is not None:
            return Table(
                [ratings.file()], columns or ratings.columns(), ratings.reading(reading.missing)
            )
    found = find_files(inputs, kind)
    return Table(found.files, columns or Columns(), reading, found.skipped)


# --- columns --------------------------------------------------------------------------------------


def _ids(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    return ids.compact(column)


def _ratings(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    values = _numbers(column, numbers, where)
    _refuse(
        pc.is_null(values, nan_is_null=True),
        numbers,
        where,
        "the rating is missing; give every row a number, or leave the column out",
    )
    _refuse(pc.is_inf(values), numbers, where, "the rating is not a finite number; correct it")
    return values


def _texts(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    """Text, null where it is missing."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        ids.is_text(column.type)
        or pa.types.is_integer(column.type)
        or pa.types.is_null(column.type)
    ):
        raise ValueError(
            f"{where} is of type {column.type}, expected text or integers; convert it first"
        )
    return column.cast(pa.string())


def _splits(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    values = _texts(column, numbers, where)
    missing = pc.or_kleene(pc.is_null(values), pc.equal(values, ""))
    _refuse(missing, numbers, where, "the split is missing; expected train, test or validation")
    return values


def _times(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        values = _microseconds(column)
    elif ids.is_text(column.type) and _is_date(column):
        values = _dates(pc.utf8_trim_whitespace(column), where)
    else:
        values = _numbers(column, numbers, where)
    _refuse(
        pc.is_null(values, nan_is_null=True),
        numbers,
        where,
        "the time is missing; give every row one, or do not name the column",
    )
    return values


def _microseconds(column: pa.Array) -> pa.Array:
    """float64 since 1970, of times or of the texts of times.

    A text may have more digits than microseconds need.
    """
    if ids.is_text(column.type):
        column = pc.replace_substring_regex(column, r"(\.[0-9]{6})[0-9]+", r"\1")
        column = pc.replace_substring_regex(column, r"\s*(UTC|Z)$", "Z")
    kind = pa.timestamp("us")
    if (
        ids.is_text(column.type)
        and pc.all(pc.match_substring_regex(column, _ZONE), min_count=0).as_py()
    ):
        kind = pa.timestamp("us", "UTC")
    return column.cast(kind, safe=False).cast(pa.int64()).cast(pa.float64(), safe=False)


def _dates(column: pa.Array, where: str) -> pa.Array:
    try:
        return _microseconds(column)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{where} holds a time that is no date ({str(error).splitlines()[0].rstrip('.')}); "
            "write all as 2026-01-31 12:00:00, all with an offset such as +02:00 or Z, or all as "
            "numbers"
        ) from None


def _is_date(column: pa.Array) -> bool:
    return bool(
        pc.any(
            pc.match_substring_regex(column, r"^\s*[0-9]{4}-[0-9]{2}-[0-9]{2}"), min_count=0
        ).as_py()
    )


_CONVERT = {
    "user": _ids,
    "item": _ids,
    "rating": _ratings,
    "split": _splits,
    "time": _times,
    "title": _texts,
}


def of_memory(column: Any, role: str, where: str) -> pa.Array:
    """float64 of a column in memory that holds the role rating or time; ValueError names `where`
    and the row."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return _CONVERT[role](column, range(1, len(column) + 1), where)


def _numbers(column: pa.Array, numbers: Sequence[int], where: str) -> pa.Array:
    """float64, null where the text is empty."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not ids.is_text(column.type):
        try:
            return column.cast(pa.float64(), safe=not pa.types.is_integer(column.type))
        except pa.ArrowException:
            raise ValueError(
                f"{where} of type {column.type} holds no numbers; convert it first"
            ) from None
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        pass
    column = pc.utf8_trim_whitespace(column)
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    try:
        return column.cast(pa.float64())
    except pa.ArrowInvalid:
        at, text = next(
            (i, t) for i, t in enumerate(column.to_pylist()) if t is not None and not _is_number(t)
        )
        raise ValueError(
            f"{where}, row {numbers[at]}: {text[:80]!r} is not a number; correct it"
        ) from None


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _refuse(bad: pa.Array, numbers: Sequence[int], where: str, problem: str) -> None:
    if pc.any(bad, min_count=0).as_py():
        raise ValueError(
            f"{where.rsplit(': column ', 1)[0]}, row {numbers[pc.index(bad, True).as_py()]}: "
            f"{problem}"
        )
