"""Raw interactions grouped by user, out of core: rating filter, dense codes, one external sort, duplicates dropped.

The interactions go by three times, never all in memory. (1) Batches from a reader are filtered, their ids become codes
in order of first appearance, and DuckDB sorts (user, position) with spilling to disk. (2) The sorted stream loses
duplicate pairs (the first in input order stays) and lands in a flat scratch file, one uint32 an interaction. (3) Everything
after that reads users from the scratch file, in any order.

From here on a user or an item is its rank among the ascending ids. Shapes: U users, I items, E interactions.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.cli import Progress

ROWS_PER_BATCH = 1 << 19
SPLIT_VALUES = pa.array(["0", "train", "1", "test", "2", "validation"])
TRAIN, TEST, VALIDATION = 0, 1, 2
_SORTED = pa.schema([("user", pa.uint32()), ("item", pa.uint32()), ("split", pa.uint8()), ("position", pa.uint64())])


class IdIndex:
    """Codes for ids in order of first appearance; works a batch at a time and never leaves Arrow."""

    def __init__(self) -> None:
        self.ids: pa.Array | None = None

    def encode(self, ids: pa.Array) -> pa.Array:
        """(E,) uint32 codes of `ids`, (E,) int64 or string."""
        if self.ids is None:
            self.ids = ids.slice(0, 0)
        codes = pc.index_in(ids, value_set=self.ids)
        if codes.null_count:
            self.ids = pa.concat_arrays([self.ids, pc.unique(ids.filter(pc.is_null(codes)))])
            codes = pc.index_in(ids, value_set=self.ids)
        return codes.cast(pa.uint32())


def _ascending(index: IdIndex) -> tuple[pa.Array, np.ndarray]:
    """The ids in ascending order (strings by their UTF-8 bytes) and, for every code, its rank there."""
    assert index.ids is not None
    order = np.asarray(pc.array_sort_indices(index.ids))
    rank = np.empty(len(order), np.uint32)
    rank[order] = np.arange(len(order), dtype=np.uint32)
    return index.ids.take(pa.array(order)), rank


@dataclass
class Counts:
    """What was read, and what was left out before any split."""

    rows: int = 0
    below_min_rating: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class Interactions:
    """Distinct interactions by user, in input order within a user, in a scratch file that must outlive this object."""

    user_ids: pa.Array  # (U,) int64 or string, ascending
    item_ids: pa.Array  # (I,) int64 or string, ascending
    starts: np.ndarray  # (U,) int64, position of a user's first interaction in the scratch file
    sizes: np.ndarray  # (U,) int64, distinct interactions of a user
    has_splits: bool
    folder: Path
    counts: Counts = field(default_factory=Counts)

    def blocks(
        self, users: np.ndarray, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Of `users`, in this order: (users (B,), indptr (B+1,) int64, items (E,) uint32, splits (E,) uint8), B by `sizes`."""
        bounds = np.cumsum([0, *sizes]) if sizes is not None else np.append(np.arange(0, len(users), 4096), len(users))
        items = os.open(self.folder / "items", os.O_RDONLY)
        splits = os.open(self.folder / "splits", os.O_RDONLY) if self.has_splits else -1
        try:
            for first, last in itertools.pairwise(bounds.tolist()):
                block = users[first:last]
                starts, lengths = self.starts[block], self.sizes[block]
                indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
                item = np.frombuffer(_read(items, starts, lengths, 4), np.uint32)
                split = np.zeros(len(item), np.uint8)
                if self.has_splits:
                    split = np.frombuffer(_read(splits, starts, lengths, 1), np.uint8)
                yield block, indptr, item, split
        finally:
            os.close(items)
            if splits >= 0:
                os.close(splits)


def _read(handle: int, starts: np.ndarray, sizes: np.ndarray, width: int) -> bytes:
    """`width` bytes for each of the `sizes` (B,) entries from `starts` (B,), one user after another."""
    ends = starts + sizes
    if len(starts) and np.array_equal(starts[1:], ends[:-1]):  # neighbours in the file: one read
        starts, sizes = starts[:1], np.array([ends[-1] - starts[0]])
    return b"".join([os.pread(handle, n * width, s * width) for s, n in zip(starts.tolist(), sizes.tolist(), strict=True)])


def collect(batches: Iterable[pa.RecordBatch], folder: Path, min_rating: float, memory_limit: str) -> Interactions:
    """Group `batches` (columns user, item, perhaps rating, perhaps split) by user, with scratch files in `folder`.

    A row whose rating is below `min_rating` is dropped; without a rating column every row counts. ValueError from the
    reader passes through; ValueError too for unknown split values, no row at all and no row left.
    """
    users, items, counts = IdIndex(), IdIndex(), Counts()
    failure: list[BaseException] = []
    first = next(iterator := iter(batches), None)
    has_splits = first is not None and "split" in first.schema.names

    def encoded() -> Iterator[pa.RecordBatch]:
        position, batch = 0, first
        try:
            with Progress("reading", "rows") as progress:
                while batch is not None:
                    counts.rows += len(batch)
                    progress.add(len(batch))
                    kept = _keep_rated(batch, min_rating)
                    counts.below_min_rating += len(batch) - len(kept)
                    if len(kept):
                        positions = np.arange(position, position + len(kept), dtype=np.uint64)
                        position += len(kept)
                        yield pa.record_batch(
                            [users.encode(kept["user"]), items.encode(kept["item"]), _splits(kept), pa.array(positions)],
                            schema=_SORTED,
                        )
                    batch = next(iterator, None)
        except BaseException as error:  # DuckDB would hand on its text alone
            failure.append(error)
            raise

    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(config={"temp_directory": str(folder / "spill"), "preserve_insertion_order": False})
    try:
        try:
            connection.execute("SET threads = 1")  # the reader feeds it from one thread; more only cost memory
            connection.execute("SET memory_limit = ?", [memory_limit])
            connection.register("rows", pa.RecordBatchReader.from_batches(_SORTED, encoded()))
            columns = "user, item, split" if has_splits else "user, item"
            stream = connection.sql(f"SELECT {columns} FROM rows ORDER BY user, position").to_arrow_reader(ROWS_PER_BATCH)
            starts, sizes = _write_scratch(stream, folder, users, items, counts, has_splits)
        except Exception as error:
            if failure:
                raise failure[0] from None
            if isinstance(error, duckdb.OutOfMemoryException):
                reason = str(error).split("Possible solutions")[0].strip()
                raise ValueError(
                    f"the sort does not fit into --memory_limit {memory_limit}; pass a larger one ({reason})"
                ) from None
            if isinstance(error, duckdb.IOException):
                raise ValueError(
                    f"the sort cannot spill beside the output ({error}); free some space or choose another place"
                ) from None
            raise
    finally:
        connection.close()
    if users.ids is None or items.ids is None:
        left = (
            f"all {counts.rows} rows have a rating below {min_rating:g}; lower --min_rating"
            if counts.rows
            else "it holds no rows; name another"
        )
        raise ValueError(f"the input has no interaction to keep: {left}")
    user_ids, user_rank = _ascending(users)
    order = np.argsort(user_rank)
    return Interactions(user_ids, _ascending(items)[0], starts[order], sizes[order], has_splits, folder, counts)


def _keep_rated(batch: pa.RecordBatch, min_rating: float) -> pa.RecordBatch:
    return batch.filter(pc.greater_equal(batch["rating"], min_rating)) if "rating" in batch.schema.names else batch


def _splits(batch: pa.RecordBatch) -> pa.Array:
    if "split" not in batch.schema.names:
        return pa.array(np.zeros(len(batch), np.uint8))
    codes = pc.index_in(batch["split"], value_set=SPLIT_VALUES)
    if codes.null_count:
        bad = batch["split"].filter(pc.is_null(codes))[0].as_py()
        raise ValueError(f"the split column holds {bad!r}; expected 0 or train, 1 or test, 2 or validation")
    return pa.array((np.asarray(codes) // 2).astype(np.uint8))


def _write_scratch(
    stream: Iterable[pa.RecordBatch], folder: Path, users: IdIndex, items: IdIndex, counts: Counts, has_splits: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Write distinct interactions to `folder`; starts and sizes of every user, both (U,) int64, by user code."""
    sizes: list[np.ndarray] = []
    item_rank: np.ndarray | None = None
    item_path, split_path = folder / "items", folder / "splits"
    with open(item_path, "wb") as item_file, open(split_path, "wb") as split_file, Progress("grouping", "rows") as progress:
        for user, item, split in _whole_users(stream, has_splits):
            if item_rank is None:  # the sort has consumed all input, so the index is complete
                item_rank = _ascending(items)[1]
            progress.add(len(user))
            local = user - user[0]  # codes are dense: every user has a row
            first = _first_of_pairs(local.astype(np.int64) * len(item_rank) + item)
            if first is not None:
                counts.duplicates += len(user) - len(first)
                local, item, split = local[first], item[first], split[first] if has_splits else split
            item_file.write(item_rank[item].tobytes())
            if has_splits:
                split_file.write(split.tobytes())
            sizes.append(np.bincount(local))
    size = np.concatenate([np.empty(0, np.int64), *sizes]).astype(np.int64)
    return np.cumsum(size) - size, size


def _first_of_pairs(pairs: np.ndarray) -> np.ndarray | None:
    """Ascending positions of each pair's first appearance, or None where all differ (a plain sort finds that out faster)."""
    in_order = np.sort(pairs)
    if (in_order[1:] != in_order[:-1]).all():
        return None
    return np.sort(np.unique(pairs, return_index=True)[1])


def _whole_users(stream: Iterable[pa.RecordBatch], has_splits: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The columns of `stream`, cut where the user changes, so that no user is in two pieces."""
    held: list[list[np.ndarray]] = []

    def joined() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        user, item, split = (np.concatenate(parts) for parts in zip(*held, strict=True))
        return user, item, split

    for batch in stream:
        columns = [np.asarray(batch["user"]), np.asarray(batch["item"])]
        columns.append(np.asarray(batch["split"]) if has_splits else np.empty(0, np.uint8))
        cut = int(np.searchsorted(columns[0], columns[0][-1])) if len(batch) else 0
        if cut:
            held.append([c[:cut] for c in columns])
            yield joined()
            held = []
        elif held and len(batch) and held[-1][0][-1] != columns[0][0]:
            yield joined()
            held = []
        held.append([c[cut:] for c in columns])
    if held and sum(len(h[0]) for h in held):
        yield joined()
