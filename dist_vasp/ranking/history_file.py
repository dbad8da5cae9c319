"""Histories of a file or several, user by user, in the memory of one block.

The files are read twice: once to check every row and to see in what order the users come, once to
hand out blocks of users. The rows of a user must lie together for that; where they do not, DuckDB
brings them together on disk, so rows may come in any order and users keep the order of their first
appearance.

Shapes: U users of a block, E rows, I items.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_vasp.data.items import ItemTable
from dist_vasp.data.positives import PositiveRule
from dist_vasp.data.tables.columns import Columns, Reading
from dist_vasp.data.tables.read import Table, open_table
from dist_vasp.ranking.histories import Histories, Read, find_items, histories_of

ROWS_PER_BATCH = 1 << 17
_SORT_MEMORY = "800MB"  # of DuckDB, which spills to disk beyond
_KINDS = {"row": pa.int32(), "rating": pa.float64(), "time": pa.float64()}
_EXAMPLES = 3


@contextmanager
def open_histories(
    inputs: str | Path | Sequence[str | Path],
    scratch: str | Path,
    columns: Columns | None = None,
    reading: Reading | None = None,
    rule: PositiveRule | None = None,
    kind: str | None = None,
) -> Iterator[HistoryFile]:
    """The histories in files, folders or globs, checked; ValueError if they cannot be used.

    columns: default user and item alone. kind: csv or parquet, None: by the names. With a column of
    ratings `rule` says which rows are likes. Where the rows of a user do not lie together, DuckDB
    sorts in a folder of its own under `scratch`, gone at the end.
    """
    named = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    table = open_table(named, columns or Columns(optional_rating=False), reading, kind)
    seen = _look_through(table)
    name = Path(str(named[0])).name
    if seen.ascending:
        yield HistoryFile(table, name, seen, rule, None)
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.grouping-", dir=scratch))
    except OSError as error:
        raise ValueError(
            f"{name} cannot be grouped by user under {scratch} ({error.strerror}); name another "
            "--output"
        ) from None
    connection = duckdb.connect(
        config={"temp_directory": str(folder), "preserve_insertion_order": False}
    )
    try:
        connection.execute(
            "SET threads = 1"
        )  # the reader feeds it from one thread; more only cost memory
        connection.execute(f"SET memory_limit = '{_SORT_MEMORY}'")
        yield HistoryFile(table, name, seen, rule, connection)
    finally:
        connection.close()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Seen:
    """What the first reading found. A run is a stretch of rows with one user."""

    user_type: pa.DataType = field(
        default_factory=pa.int64
    )  # string where one id is not a canonical integer
    n_runs: int = 0
    ascending: bool = True  # then every run is another user
    examples: list[str] = field(default_factory=list)  # of item ids
    read: Read = field(
        default_factory=Read
    )  # the rows that are left out before anything is looked up


class HistoryFile:
    """The histories of a table: `n_users` of `user_type` in all, handed out in `blocks`.

    `left_out` counts the rows without an id, which no block counts.
    """

    def __init__(
        self,
        table: Table,
        name: str,
        seen: _Seen,
        rule: PositiveRule | None,
        connection: duckdb.DuckDBPyConnection | None,
    ) -> None:
        self.table, self.name, self.user_type, self.n_users = (
            table,
            name,
            seen.user_type,
            seen.n_runs,
        )
        self.left_out, self._examples, self._rule = seen.read, seen.examples, rule
        self._connection, self._scattered = connection, False
        if connection is not None:
            with _disk_errors(name):
                self._find_scattered(connection)

    def _find_scattered(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Where users do not ascend, whether some have several runs; the first place of each is
        kept then."""
        runs = pa.RecordBatchReader.from_batches(
            pa.schema([("user", self.user_type), ("place", pa.int64())]), self._runs()
        )
        connection.register("runs", runs)
        connection.execute(
            "CREATE TABLE firsts AS SELECT user, min(place) AS first, count(*) AS n FROM runs "
            "GROUP BY user"
        )
        self.n_users, most = connection.execute(
            "SELECT count(*), coalesce(max(n), 0) FROM firsts"
        ).fetchall()[0]
        self._scattered = most > 1
        if not self._scattered:
            connection.close()  # with what it has cached

    def blocks(self, items: ItemTable, users_per_block: int) -> Iterator[Histories]:
        """Blocks of `users_per_block` users (the skipped ones counted), in order of their first
        appearance."""
        held: list[pa.RecordBatch] = []
        with _disk_errors(self.name):
            for batch in self._grouped(items) if self._scattered else self._batches(items):
                held.append(batch)
                rows = pa.concat_batches(held)
                starts = run_starts(rows["user"])
                whole = (
                    (len(starts) - 1) // users_per_block * users_per_block
                )  # the last user's rows may go on
                for first in range(0, whole, users_per_block):
                    yield self._histories(
                        rows, starts[first], starts[first + users_per_block], len(items.keys)
                    )
                rest = starts[whole] if len(starts) else 0
                held = [
                    rows.take(pa.array(np.arange(rest, len(rows))))
                ]  # a copy, so that the others can go
            if not held:
                return
            rows = held[0]
            starts = np.append(run_starts(rows["user"]), len(rows))
            for first in range(0, len(starts) - 1, users_per_block):
                yield self._histories(
                    rows,
                    starts[first],
                    starts[min(first + users_per_block, len(starts) - 1)],
                    len(items.keys),
                )

    def no_list(self, items: ItemTable, n_known: int, n_ended: int = 0) -> ValueError:
        """What to say where nobody has a list, and `n_known` rows are of known items.

        Without such rows: how ids are written here and there. n_ended: users who have seen all that
        may be listed.
        """
        if n_ended:
            return ValueError(
                f"{self.name}: {n_ended:,} users have seen every item that may be listed, so that "
                "nobody gets a list; "
                "pass --keep_seen to list seen items, too, or allow more items"
            )
        if n_known:
            return ValueError(
                f"{self.name}: {n_known:,} rows are of items that the model knows, and none is a "
                "like, so that nobody gets a list "
                f"({self._rule}); name another --rating_column, or pass --all_positive to take "
                "every row as a like"
            )
        wanted = [repr(one) for one in items.ids[:_EXAMPLES].to_pylist()]
        return ValueError(
            f"{self.name}: no item is known to the model, so that nobody gets a list; its items "
            "are written "
            f"{', '.join(self._examples)}, those of the model {', '.join(wanted)}; ids must be "
            "equal as texts"
        )

    def _histories(self, rows: pa.RecordBatch, lo: int, hi: int, n_items: int) -> Histories:
        part = {name: rows[name][lo:hi] for name in rows.schema.names}
        ratings, times = (
            np.asarray(part[name]) if name in part else None for name in ("rating", "time")
        )
        return histories_of(
            part["user"], np.asarray(part["row"]), n_items, self._rule, ratings, times
        )

    def _batches(self, items: ItemTable) -> Iterator[pa.RecordBatch]:
        for batch in self.table.batches():
            columns = {
                "user": batch["user"].cast(self.user_type),
                "row": pa.array(find_items(batch["item"], items)),
            }
            yield pa.record_batch(
                columns
                | {name: batch[name] for name in ("rating", "time") if name in batch.schema.names}
            )

    def _runs(self) -> Iterator[pa.RecordBatch]:
        last: pa.Scalar | None = None
        place = 0
        for batch in self.table.batches():
            users = batch["user"].cast(self.user_type)
            starts = run_starts(users)
            if last is not None and users[0] == last:
                starts = starts[1:]  # the batch before has begun this run
            last = users[-1]
            yield pa.record_batch(
                [users.take(pa.array(starts)), pa.array(place + starts)], ["user", "place"]
            )
            place += len(batch)

    def _grouped(self, items: ItemTable) -> Iterator[pa.RecordBatch]:
        """The rows by first place of the user, in input order within."""
        assert self._connection is not None
        extra = [
            name for name in ("rating", "time") if getattr(self.table.columns, name) is not None
        ]
        names = ["row", *extra]
        schema = pa.schema(
            [
                ("user", self.user_type),
                *((name, _KINDS[name]) for name in names),
                ("place", pa.int64()),
            ]
        )

        def rows() -> Iterator[pa.RecordBatch]:
            place = 0
            for batch in self._batches(items):
                places = pa.array(np.arange(place, place + len(batch)))
                yield pa.record_batch([*batch.columns, places], schema=schema)
                place += len(batch)

        self._connection.register("rows", pa.RecordBatchReader.from_batches(schema, rows()))
        columns = ", ".join(["user", *(f'"{name}"' for name in names)])
        query = f"SELECT {columns} FROM rows JOIN firsts USING (user) ORDER BY first, place"
        for batch in self._connection.sql(query).to_arrow_reader(ROWS_PER_BATCH):
            yield pa.record_batch(
                {
                    "user": batch["user"].cast(self.user_type),
                    **{name: batch[name] for name in names},
                }
            )


def run_starts(users: pa.Array) -> np.ndarray:
    """Positions at which another user begins, int64; the first row is one."""
    if len(users) == 0:
        return np.empty(0, np.int64)
    changes = np.asarray(pc.not_equal(users[1:], users[:-1]))
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


def _look_through(table: Table) -> _Seen:
    """Check every row, and see whether the users ascend: as numbers while all are, else as texts."""
    seen, last = _Seen(), None
    for n, batch in enumerate(table.batches()):
        users = batch["user"]
        if users.type != seen.user_type and pa.types.is_integer(seen.user_type):
            seen.user_type = pa.string()
            seen.ascending = n == 0  # what came before was not compared as text
            last = None if last is None else last.cast(pa.string())
        users = users.cast(seen.user_type)
        heads = users.take(pa.array(run_starts(users)))
        if last is not None:
            heads = pa.concat_arrays([last, heads]) if heads[0] != last[0] else heads
            seen.n_runs -= 1  # the batch before has counted its last user, who stands in front now
        seen.n_runs += len(heads)
        last = heads[-1:]
        seen.ascending = seen.ascending and bool(
            pc.all(pc.less(heads[:-1], heads[1:]), min_count=0).as_py()
        )
        if len(seen.examples) < _EXAMPLES:
            found = [repr(one) for one in pc.unique(batch["item"][: 1 << 10]).to_pylist()]
            seen.examples = list(dict.fromkeys([*seen.examples, *found]))[:_EXAMPLES]
    n_missing = sum(table.left_out.values())
    seen.read = Read(rows=n_missing, missing=n_missing)
    return seen


@contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"{name} cannot be grouped by user beside the output ({text}); sort it by user, or "
            "free some space"
        ) from None
