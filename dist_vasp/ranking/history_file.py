"""Read histories from files, in blocks of users; memory holds one block.

The files are read twice: first to check every row and the order of the users, then to yield blocks.
If the rows of a user are not next to each other, DuckDB groups them on disk. So rows may come in
any order, and users keep the order of their first appearance.

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
from dist_vasp.ranking.histories import Histories, RowCounts, find_items, histories_of

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
    """Check and yield the histories in files, folders or globs; ValueError for bad ones.

    columns: default user and item. kind: csv or parquet, None: by the names. With a rating column,
    `rule` says which rows are likes. If the rows of a user must be grouped, DuckDB uses a folder
    under `scratch`, which is removed at the end.
    """
    named = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    table = open_table(named, columns or Columns(optional_rating=False), reading, kind)
    order = _check_order(table)
    name = Path(str(named[0])).name
    if order.is_ascending:
        yield HistoryFile(table, name, order, rule, None)
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
        # one thread feeds the sort; more threads only cost memory
        connection.execute("SET threads = 1")
        connection.execute(f"SET memory_limit = '{_SORT_MEMORY}'")
        yield HistoryFile(table, name, order, rule, connection)
    finally:
        connection.close()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Order:
    """The result of the first reading. A run is a stretch of rows of one user."""

    # string where some id is not a canonical integer
    user_type: pa.DataType = field(default_factory=pa.int64)
    n_runs: int = 0
    is_ascending: bool = True  # then every run is a different user
    examples: list[str] = field(default_factory=list)  # of item ids
    left_out: RowCounts = field(default_factory=RowCounts)  # rows without an id


class HistoryFile:
    """The histories of a table: `n_users` users of `user_type`, read in `blocks`.

    `left_out` counts the rows without an id, which no block counts.
    """

    def __init__(
        self,
        table: Table,
        name: str,
        order: _Order,
        rule: PositiveRule | None,
        connection: duckdb.DuckDBPyConnection | None,
    ) -> None:
        self.table = table
        self.name = name
        self.user_type = order.user_type
        self.n_users = order.n_runs
        self.left_out = order.left_out
        self._examples = order.examples
        self._rule = rule
        self._connection = connection
        self._is_scattered = False  # some user has several runs
        if connection is not None:
            with _disk_errors(name):
                self._find_scattered(connection)

    def _find_scattered(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Find whether some users have several runs, and record where each user appears first."""
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
        self._is_scattered = most > 1
        if not self._is_scattered:
            connection.close()  # frees its memory

    def blocks(self, items: ItemTable, users_per_block: int) -> Iterator[Histories]:
        """Yield blocks of `users_per_block` users, in order of first appearance.

        Skipped users count as users of a block.
        """
        waiting: list[pa.RecordBatch] = []
        with _disk_errors(self.name):
            for batch in self._grouped(items) if self._is_scattered else self._batches(items):
                waiting.append(batch)
                rows = pa.concat_batches(waiting)
                starts = run_starts(rows["user"])
                # the last user may have more rows in the next batch
                whole = (len(starts) - 1) // users_per_block * users_per_block
                for first in range(0, whole, users_per_block):
                    stop = starts[first + users_per_block]
                    yield self._histories(rows, starts[first], stop, len(items.keys))
                rest = starts[whole] if len(starts) else 0
                # a copy, so that the memory of the others is freed
                waiting = [rows.take(pa.array(np.arange(rest, len(rows))))]
            if not waiting:
                return
            rows = waiting[0]
            starts = np.append(run_starts(rows["user"]), len(rows))
            for first in range(0, len(starts) - 1, users_per_block):
                stop = starts[min(first + users_per_block, len(starts) - 1)]
                yield self._histories(rows, starts[first], stop, len(items.keys))

    def no_list(self, items: ItemTable, n_known: int, n_ended: int = 0) -> ValueError:
        """Return the error for the case that nobody gets a list.

        n_known: rows of known items. n_ended: users who have seen all items that may be listed.
        """
        if n_ended:
            return ValueError(
                f"{self.name}: {n_ended:,} users have seen every item that may be listed, so that "
                "nobody gets a list; pass --keep_seen to list seen items, too, or allow more items"
            )
        if n_known:
            return ValueError(
                f"{self.name}: {n_known:,} rows are of items that the model knows, and none is a "
                f"like, so that nobody gets a list ({self._rule}); name another --rating_column, "
                "or pass --all_positive to take every row as a like"
            )
        wanted = [repr(one) for one in items.ids[:_EXAMPLES].to_pylist()]
        return ValueError(
            f"{self.name}: no item is known to the model, so that nobody gets a list; its items "
            f"are written {', '.join(self._examples)}, those of the model {', '.join(wanted)}; "
            "ids must be equal as texts"
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
                starts = starts[1:]  # the run began in the batch before
            last = users[-1]
            yield pa.record_batch(
                [users.take(pa.array(starts)), pa.array(place + starts)], ["user", "place"]
            )
            place += len(batch)

    def _grouped(self, items: ItemTable) -> Iterator[pa.RecordBatch]:
        """Yield the rows by the users' first appearance, and in input order within a user."""
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
    """Return the positions at which a user begins, int64, including the first row."""
    if len(users) == 0:
        return np.empty(0, np.int64)
    changes = np.asarray(pc.not_equal(users[1:], users[:-1]))
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


def _check_order(table: Table) -> _Order:
    """Check every row, and whether the users ascend, as numbers or else as texts."""
    order = _Order()
    last = None
    for n, batch in enumerate(table.batches()):
        users = batch["user"]
        if users.type != order.user_type and pa.types.is_integer(order.user_type):
            order.user_type = pa.string()
            order.is_ascending = n == 0  # earlier ids were not compared as text
            last = None if last is None else last.cast(pa.string())
        users = users.cast(order.user_type)
        heads = users.take(pa.array(run_starts(users)))
        if last is not None:
            heads = pa.concat_arrays([last, heads]) if heads[0] != last[0] else heads
            order.n_runs -= 1  # the last user of the batch before is counted already
        order.n_runs += len(heads)
        last = heads[-1:]
        ascends = pc.all(pc.less(heads[:-1], heads[1:]), min_count=0).as_py()
        order.is_ascending = order.is_ascending and bool(ascends)
        if len(order.examples) < _EXAMPLES:
            more = [repr(one) for one in pc.unique(batch["item"][: 1 << 10]).to_pylist()]
            order.examples = list(dict.fromkeys([*order.examples, *more]))[:_EXAMPLES]
    n_missing = sum(table.left_out.values())
    order.left_out = RowCounts(rows=n_missing, missing=n_missing)
    return order


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
