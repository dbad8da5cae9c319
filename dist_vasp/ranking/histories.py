"""Interaction histories with original ids -> item rows: of a table in memory, or of a file that streams by, user by user.

A file is read twice: once to check every row and to see in what order the users come, once to hand out blocks of users. What is
held is one batch and one block. The rows of a user must lie together for that; where they do not, DuckDB brings them together
on disk, so any file may come and users keep the order of their first appearance.

Items that are not in the vocabulary are ignored and counted; users without a known item are told of, never dropped silently.

Shapes: U users of a block, E interactions, I items.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from dist_vasp.data import ids
from dist_vasp.data.format import ItemTable
from dist_vasp.data.positives import PositiveRule, ServingColumns, positive_rows
from dist_vasp.data.stream import Rows, indptr_of
from dist_vasp.data.tables.read import of_memory

COLUMNS = ("user", "item")
ROWS_PER_BATCH = 1 << 17
_BLOCK_BYTES = 4 << 20  # of a CSV
_SORT_MEMORY = "800MB"  # of DuckDB, which spills to disk beyond


NO_KNOWN_ITEM = "no item of the history is in the vocabulary"
NO_LIKE = "no known item of the history is a positive of the rule the model was trained with"


@dataclass(frozen=True)
class Read:
    """What became of the rows of histories: the five add up to `rows`.

    likes: pairs of a user and an item that are input of the model. disliked: further pairs, which are
    masked. repeated: further rows of the same pairs. unknown: rows of items outside the vocabulary.
    missing: rows without an id.
    """

    rows: int = 0
    likes: int = 0
    disliked: int = 0
    repeated: int = 0
    unknown: int = 0
    missing: int = 0

    def __add__(self, other: Read) -> Read:
        return Read(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __str__(self) -> str:
        """One line for the user."""
        used = f"read {self.rows:,} rows: {self.likes:,} likes used as input, {self.disliked:,} further items masked"
        left_out = {"repeated": self.repeated, "of unknown items": self.unknown, "without an id": self.missing}
        return "; left out: ".join([used, ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n) or "nothing"])


@dataclass(frozen=True)
class Histories:
    """Some users with a like among the known items, in order of first appearance, and what was left out."""

    users: pa.Array  # (U,) original ids
    rows: Rows  # (U,) the item rows of their likes, ascending, without repeats
    seen: Rows  # (U,) the same of everything they have seen, liked or not
    skipped: pa.Array  # users without a like among the known items
    reasons: pa.Array  # why, one for each of `skipped`
    read: Read

    @property
    def n_users(self) -> int:
        return len(self.users)

    @property
    def n_unknown(self) -> int:
        """Rows with an item outside the vocabulary."""
        return self.read.unknown


def find_items(ids: pa.Array, items: ItemTable) -> np.ndarray:
    """(E,) int32 item rows of original ids, -1 where unknown. Ids compare as text: 17 in a CSV is 17 in a column of integers."""
    if pa.types.is_integer(ids.type) and pa.types.is_integer(items.ids.type) and not pa.types.is_uint64(ids.type):
        found = pc.index_in(ids.cast(pa.int64()), value_set=items.ids.cast(pa.int64()))
    else:
        found = pc.index_in(ids.cast(pa.string()), value_set=items.ids.cast(pa.string()))
    return np.asarray(pc.fill_null(found, -1)).astype(np.int32)


def known_rows(owner: np.ndarray, item_rows: np.ndarray, n_users: int, n_items: int) -> Rows:
    """(n_users,) rows from E pairs: ascending, without repeats; a pair of item row -1 is left out."""
    listed = item_rows >= 0
    pairs = np.unique(owner[listed].astype(np.int64) * n_items + item_rows[listed])
    users, rows = np.divmod(pairs, n_items)
    return Rows(indptr_of(np.bincount(users, minlength=n_users)), rows.astype(np.int32))


def histories_of(
    user_ids: pa.Array,
    item_rows: np.ndarray,
    n_items: int,
    rule: PositiveRule | None = None,
    ratings: np.ndarray | None = None,
    times: np.ndarray | None = None,
) -> Histories:
    """The histories in E rows of a table, in any order. Without ratings every row is a like."""
    encoded = user_ids.dictionary_encode()
    users, owner = encoded.dictionary, np.asarray(encoded.indices).astype(np.int64)
    seen = known_rows(owner, item_rows, len(users), n_items)
    rows = seen
    if rule is not None and ratings is not None:
        rows = liked_rows(owner, item_rows, len(users), n_items, rule, ratings, times)
    found = rows.lengths > 0
    reasons = np.where(seen.lengths[~found] > 0, NO_LIKE, NO_KNOWN_ITEM)
    taken = np.flatnonzero(found)
    likes = rows.take(taken)
    return Histories(
        users.filter(pa.array(found)),
        likes,
        likes if rows is seen else seen.take(taken),
        users.filter(pa.array(~found)),
        pa.array(reasons.tolist(), pa.string()),
        count_rows(item_rows, rows, seen),
    )


def count_rows(item_rows: np.ndarray, likes: Rows, seen: Rows) -> Read:
    """What became of E rows with these item rows, -1 where unknown."""
    n_known = int((item_rows >= 0).sum())
    return Read(
        rows=len(item_rows),
        likes=len(likes.items),
        disliked=len(seen.items) - len(likes.items),
        repeated=n_known - len(seen.items),
        unknown=len(item_rows) - n_known,
    )


def liked_rows(
    owner: np.ndarray,
    item_rows: np.ndarray,
    n_users: int,
    n_items: int,
    rule: PositiveRule,
    ratings: np.ndarray,
    times: np.ndarray | None = None,
) -> Rows:
    """(n_users,) rows of the pairs that are positives, from E rated pairs in input order."""
    known = np.flatnonzero(item_rows >= 0)
    pairs = owner[known].astype(np.int64) * n_items + item_rows[known]
    liked = known[positive_rows(rule, pairs, ratings[known], None if times is None else times[known])]
    return known_rows(owner[liked], item_rows[liked], n_users, n_items)


def histories_of_table(
    table: pa.Table, columns: ServingColumns, items: ItemTable, rule: PositiveRule | None, where: str
) -> Histories:
    """The histories of a table in memory; rows without an id are left out and counted."""
    missing = ids.MISSING if rule is None or rule.missing is None else rule.missing
    numbers = range(1, len(table) + 1)
    found = {
        role: ids.of_column(table.column(name), numbers, f"{where}: column {name!r}", missing)
        for role, name in (("user", columns.user), ("item", columns.item))
    }
    for role, name in (("rating", columns.rating), ("time", columns.time)):
        if name is not None:
            found[role] = of_memory(table.column(name), role, f"{where}: column {name!r}")
    present = pc.and_(found["user"].is_valid(), found["item"].is_valid())
    kept = {role: column.filter(present) for role, column in found.items()}
    ratings, times = (np.asarray(kept[role]) if role in kept else None for role in ("rating", "time"))
    histories = histories_of(kept["user"], find_items(kept["item"], items), len(items.keys), rule, ratings, times)
    n_missing = len(table) - len(kept["user"])
    return replace(histories, read=histories.read + Read(rows=n_missing, missing=n_missing))


def table_columns(table: pa.Table, where: str) -> tuple[pa.Array, pa.Array]:
    """The columns user and item of a table in memory; ValueError where they cannot be used."""
    _check_names(table.column_names, where)
    users, items = (table.column(name).combine_chunks() for name in COLUMNS)
    return checked_ids(users, f"{where}: column user"), checked_ids(items, f"{where}: column item")


def checked_ids(ids: Any, where: str, first_row: int = 1) -> pa.Array:
    """One array of numbers or text; ValueError names `where` if there is another type or an empty cell."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if pa.types.is_dictionary(ids.type):
        ids = ids.dictionary_decode()
    if ids.null_count:
        row = int(np.flatnonzero(np.asarray(ids.is_null()))[0])
        raise ValueError(f"{where} is empty in row {first_row + row}; every row needs a user and an item")
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(ids.type) for is_kind in kinds):
        raise ValueError(f"{where} holds {ids.type}, expected whole numbers or text; convert it first")
    return ids


def _check_names(names: list[str], where: str) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{where} has no column {', '.join(missing)}; it has {', '.join(names)}; expected user and item")


# --- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_histories(path: str | Path, scratch: str | Path) -> Iterator[HistoryFile]:
    """A CSV(.gz) or Parquet file with columns user and item, checked; ValueError if it cannot be used.

    Where the rows of a user do not lie together, DuckDB sorts in a folder of its own under `scratch`, gone at the end.
    """
    path = Path(path)
    with _readable(path):
        seen = _look_through(path)
    if seen.ascending:
        yield HistoryFile(path, seen, None)
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.grouping-", dir=scratch))
    except OSError as error:
        raise ValueError(f"{path} cannot be grouped by user under {scratch} ({error.strerror}); name another --output") from None
    connection = duckdb.connect(config={"temp_directory": str(folder), "preserve_insertion_order": False})
    try:
        connection.execute("SET threads = 1")  # the reader feeds it from one thread; more only cost memory
        connection.execute(f"SET memory_limit = '{_SORT_MEMORY}'")
        yield HistoryFile(path, seen, connection)
    finally:
        connection.close()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Seen:
    """What the first reading found. A run is a stretch of rows with one user."""

    user_type: pa.DataType
    n_runs: int = 0
    ascending: bool = True  # then every run is another user


class HistoryFile:
    """The histories of a file: `n_users` of `user_type` in all, handed out in `blocks`."""

    def __init__(self, path: Path, seen: _Seen, connection: duckdb.DuckDBPyConnection | None) -> None:
        self.path, self.user_type, self.n_users = path, seen.user_type, seen.n_runs
        self._connection, self._scattered = connection, False
        if connection is not None:
            with _disk_errors(path):
                self._find_scattered(connection)

    def _find_scattered(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Where users do not ascend, whether some have several runs; the first place of each is kept then."""
        runs = pa.RecordBatchReader.from_batches(pa.schema([("user", self.user_type), ("place", pa.int64())]), self._runs())
        connection.register("runs", runs)
        connection.execute("CREATE TABLE firsts AS SELECT user, min(place) AS first, count(*) AS n FROM runs GROUP BY user")
        self.n_users, most = connection.execute("SELECT count(*), coalesce(max(n), 0) FROM firsts").fetchall()[0]
        self._scattered = most > 1
        if not self._scattered:
            connection.close()  # with what it has cached

    def blocks(self, items: ItemTable, users_per_block: int) -> Iterator[Histories]:
        """Blocks of `users_per_block` users (the skipped ones counted), in order of their first appearance."""
        batches = self._grouped(items) if self._scattered else self._batches(items)
        held: list[tuple[pa.Array, np.ndarray]] = []
        with _readable(self.path), _disk_errors(self.path):
            for batch in batches:
                held.append(batch)
                users, rows = pa.concat_arrays([u for u, _ in held]), np.concatenate([r for _, r in held])
                starts = run_starts(users)
                whole = (len(starts) - 1) // users_per_block * users_per_block  # the last user's rows may go on
                for first in range(0, whole, users_per_block):
                    lo, hi = starts[first], starts[first + users_per_block]
                    yield histories_of(users[lo:hi], rows[lo:hi], len(items.keys))
                rest = starts[whole] if len(starts) else 0
                held = [(users[rest:], rows[rest:].copy())]
            users, rows = held[0] if held else (pa.array([], self.user_type), np.empty(0, np.int32))
            starts = np.append(run_starts(users), len(users))
            for first in range(0, len(starts) - 1, users_per_block):
                lo, hi = starts[first], starts[min(first + users_per_block, len(starts) - 1)]
                yield histories_of(users[lo:hi], rows[lo:hi], len(items.keys))

    def _batches(self, items: ItemTable) -> Iterator[tuple[pa.Array, np.ndarray]]:
        for _, users, item_ids in _read(self.path):
            yield users.cast(self.user_type), find_items(item_ids, items)

    def _runs(self) -> Iterator[pa.RecordBatch]:
        last: pa.Scalar | None = None
        for place, users, _ in _read(self.path):
            starts = run_starts(users)
            if len(users) and last is not None and users[0] == last:
                starts = starts[1:]  # the batch before has begun this run
            last = users[-1] if len(users) else last
            yield pa.record_batch([users.take(pa.array(starts)).cast(self.user_type), pa.array(place + starts)], ["user", "place"])

    def _grouped(self, items: ItemTable) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """The rows by first place of the user, in input order within."""
        assert self._connection is not None
        schema = pa.schema([("user", self.user_type), ("item", pa.int32()), ("place", pa.int64())])

        def rows() -> Iterator[pa.RecordBatch]:
            for place, users, item_ids in _read(self.path):
                places = pa.array(np.arange(place, place + len(users)))
                yield pa.record_batch([users.cast(self.user_type), pa.array(find_items(item_ids, items)), places], schema=schema)

        self._connection.register("rows", pa.RecordBatchReader.from_batches(schema, rows()))
        query = "SELECT user, item FROM rows JOIN firsts USING (user) ORDER BY first, place"
        for batch in self._connection.sql(query).to_arrow_reader(ROWS_PER_BATCH):
            yield batch["user"].cast(self.user_type), np.asarray(batch["item"])


def run_starts(users: pa.Array) -> np.ndarray:
    """Positions at which another user begins, int64; the first row is one."""
    if len(users) == 0:
        return np.empty(0, np.int64)
    changes = np.asarray(pc.not_equal(users[1:], users[:-1]))
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


def _look_through(path: Path) -> _Seen:
    """Check every row. Users of a CSV are integers if that loses nothing of any of them."""
    kind: pa.DataType | None = None
    number = path.suffix != ".parquet"
    ascends = {"as stored": True, "as numbers": True}
    n_runs, last = 0, None
    for _, users, _ in _read(path):
        kind = users.type
        heads = users.take(pa.array(run_starts(users)))
        if last is not None and len(heads):
            heads = pa.concat_arrays([last, heads]) if heads[0] != last[0] else heads
            n_runs -= 1  # the batch before has counted its last user, who stands in front now
        n_runs += len(heads)
        last = heads[-1:] if len(heads) else last
        ascends["as stored"] = ascends["as stored"] and bool(pc.all(pc.less(heads[:-1], heads[1:]), min_count=0).as_py())
        numbers = _as_numbers(heads) if number else None
        number = numbers is not None
        if numbers is not None and ascends["as numbers"]:
            ascends["as numbers"] = bool(pc.all(pc.less(numbers[:-1], numbers[1:]), min_count=0).as_py())
    if kind is None:
        kind = pq.read_schema(path).field("user").type if path.suffix == ".parquet" else pa.string()
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _Seen(pa.int64() if number else kind, n_runs, ascends["as numbers" if number else "as stored"])


def _as_numbers(ids: pa.Array) -> pa.Array | None:
    """The ids as int64 if that loses nothing of any of them."""
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return None
    return numbers if numbers.cast(pa.string()).equals(ids) else None


def _read(path: Path) -> Iterator[tuple[int, pa.Array, pa.Array]]:
    """(rows before, users, items) of every batch, as stored; the ids of a CSV as text."""
    before = 0
    for batch in _raw_batches(path):
        columns = (checked_ids(batch[name], f"{path}: column {name}", before + 1) for name in COLUMNS)
        yield before, *columns
        before += len(batch)


def _raw_batches(path: Path) -> Iterable[Any]:
    if path.is_dir():
        raise ValueError(f"--histories {path} is a folder; name a CSV or Parquet file")
    if path.suffix == ".parquet":
        with pq.ParquetFile(path, pre_buffer=False) as file:  # buffered, all that was read stays
            _check_names(file.schema_arrow.names, str(path))
            yield from file.iter_batches(ROWS_PER_BATCH, columns=list(COLUMNS), use_threads=False)
    elif path.name.endswith((".csv", ".csv.gz")):
        read = pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES)
        with pa_csv.open_csv(path, read) as reader:
            _check_names(reader.schema.names, str(path))
        # as text: a type guessed from the first rows would change ids such as 007, and only an empty cell is no id
        options = pa_csv.ConvertOptions(
            include_columns=list(COLUMNS),
            column_types=dict.fromkeys(COLUMNS, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        )
        with pa_csv.open_csv(path, read, convert_options=options) as reader:
            yield from reader
    else:
        raise ValueError(f"--histories {path} ends in {path.suffix or 'nothing'}, expected .csv, .csv.gz or .parquet")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"--histories {path} does not exist; name a CSV or Parquet file") from None
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read ({text}); expected a CSV or Parquet file with columns user and item") from None


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        text = " ".join(str(error).split())
        raise ValueError(
            f"{path} cannot be grouped by user beside the output ({text}); sort it by user, or free some space"
        ) from None
