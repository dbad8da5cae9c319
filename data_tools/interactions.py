"""Raw interactions grouped by user, out of core: rating filter, dense codes, one external sort,
duplicates dropped.

The interactions go by three times, never all in memory. (1) Batches from a reader are filtered,
their ids become codes in order of first appearance, and DuckDB sorts (user, position) with spilling
to disk. (2) Of several rows of a pair one decides (dist_vasp/data/positives.py); the positives land
in a flat scratch file, one uint32 an interaction. (3) Everything after that reads users from the
scratch file, in any order.

From here on a user or an item is its rank among the ascending ids. Shapes: U users, I items, E
interactions.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.cli import Progress
from dist_vasp.data.ids import IdIndex
from dist_vasp.data.positives import PositiveRule, positive_rows

ROWS_PER_BATCH = 1 << 19
SPLIT_VALUES = pa.array(["0", "train", "1", "test", "2", "validation"])
TRAIN, TEST, VALIDATION = 0, 1, 2
_SORTED = [("user", pa.uint32()), ("item", pa.uint32()), ("position", pa.uint64())]
_EXTRA = {
    "split": pa.uint8(),
    "rating": pa.float64(),
}  # columns that are sorted along where they are needed


def _ascending(index: IdIndex) -> tuple[pa.Array, np.ndarray]:
    """The ids in ascending order (strings by their UTF-8 bytes) and, for every code, its rank
    there."""
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
    """Distinct interactions by user, in input order within a user, in a scratch file that must
    outlive this object."""

    user_ids: pa.Array  # (U,) int64 or string, ascending
    item_ids: pa.Array  # (I,) int64 or string, ascending
    starts: np.ndarray  # (U,) int64, position of a user's first interaction in the scratch file
    sizes: np.ndarray  # (U,) int64, distinct interactions of a user
    has_splits: bool
    folder: Path
    has_ratings: bool = False  # whether the input had ratings; without them every row is a positive
    counts: Counts = field(default_factory=Counts)

    def blocks(
        self, users: np.ndarray, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Of `users`, in this order: (users (B,), indptr (B+1,) int64, items (E,) uint32, splits
        (E,) uint8), B by `sizes`."""
        bounds = (
            np.cumsum([0, *sizes])
            if sizes is not None
            else np.append(np.arange(0, len(users), 4096), len(users))
        )
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
    """`width` bytes for each of the `sizes` (B,) entries from `starts` (B,), one user after
    another."""
    ends = starts + sizes
    if len(starts) and np.array_equal(starts[1:], ends[:-1]):  # neighbours in the file: one read
        starts, sizes = starts[:1], np.array([ends[-1] - starts[0]])
    return b"".join(
        [
            os.pread(handle, n * width, s * width)
            for s, n in zip(starts.tolist(), sizes.tolist(), strict=True)
        ]
    )


def collect(
    batches: Iterable[pa.RecordBatch],
    folder: Path,
    min_rating: float,
    memory_limit: str,
    repeats: str = "first",
) -> Interactions:
    """Group the positives of `batches` by user, with scratch files in `folder`.

    batches: columns user, item, perhaps rating, split and time. Without a rating column every row
    counts. `repeats` says which of several rows of a pair counts; times, where there are any, order
    them. ValueError from the reader passes through; ValueError too for unknown split values, no row
    at all and no row left.
    """
    first = next(iterator := iter(batches), None)
    names = first.schema.names if first is not None else []
    if repeats == "max" and first is not None and "rating" not in names:
        raise ValueError(
            "--repeats max takes the highest rating of a pair, and no rating column was read; "
            "pass --rating_column NAME"
        )
    rule = (
        PositiveRule(rating_column="rating", min_rating=min_rating, repeats=repeats)
        if "rating" in names
        else None
    )
    rule = rule or PositiveRule(repeats=repeats)
    extra = [name for name in ("split", "time") if name in names]
    if "rating" in names and repeats != "first":
        extra.append("rating")
    encoder = _Encoder(rule, extra)
    failure: list[BaseException] = []

    def encoded() -> Iterator[pa.RecordBatch]:
        try:
            with Progress("reading", "rows") as progress:
                for batch in itertools.chain([first] if first is not None else [], iterator):
                    progress.add(len(batch))
                    kept = encoder.encode(batch)
                    if len(kept):
                        yield kept
        except BaseException as error:  # DuckDB would hand on its text alone
            failure.append(error)
            raise

    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect(
        config={"temp_directory": str(folder / "spill"), "preserve_insertion_order": False}
    )
    try:
        try:
            connection.execute(
                "SET threads = 1"
            )  # the reader feeds it from one thread; more only cost memory
            connection.execute("SET memory_limit = ?", [memory_limit])
            kinds = _EXTRA | {
                "time": first["time"].type if first is not None and "time" in names else None
            }
            schema = pa.schema([*_SORTED, *((name, kinds[name]) for name in extra)])
            connection.register("rows", pa.RecordBatchReader.from_batches(schema, encoded()))
            columns = ", ".join(["user", "item", *extra])
            stream = connection.sql(
                f"SELECT {columns} FROM rows ORDER BY user, position"
            ).to_arrow_reader(ROWS_PER_BATCH)
            starts, sizes = _write_scratch(stream, folder, encoder)
        except Exception as error:
            if failure:
                raise failure[0] from None
            if isinstance(error, duckdb.OutOfMemoryException):
                reason = str(error).split("Possible solutions")[0].strip()
                raise ValueError(
                    f"the sort does not fit into --memory_limit {memory_limit}; pass a larger one "
                    f"({reason})"
                ) from None
            if isinstance(error, duckdb.IOException):
                raise ValueError(
                    f"the sort cannot spill beside the output ({error}); free some space or "
                    "choose another place"
                ) from None
            raise
    finally:
        connection.close()
    counts, users, items = encoder.counts, encoder.users, encoder.items
    if users.ids is None or items.ids is None or not sizes.any():
        left = f"all {counts.rows} rows have a rating below {min_rating:g}; lower --min_rating"
        if repeats == "last":
            left = f"the last rating of every pair is below {min_rating:g}; lower --min_rating"
        if not counts.rows:
            left = "it holds no rows; name another"
        raise ValueError(f"the input has no interaction to keep: {left}")
    user_ids, user_rank = _ascending(users)
    order = np.argsort(user_rank)
    has_ratings = "rating" in names
    data = Interactions(
        user_ids,
        _ascending(items)[0],
        starts[order],
        sizes[order],
        "split" in names,
        folder,
        has_ratings,
        encoder.counts,
    )
    if repeats == "last" and has_ratings:  # what only rows of low ratings have named
        return without_items(data, item_counts(data) == 0)
    return data


class _Encoder:
    """Turns batches of ids into batches of codes, without the rows that are too low to decide
    anything."""

    def __init__(self, rule: PositiveRule, extra: Sequence[str]):
        self.rule, self.extra = rule, extra
        self.users, self.items, self.counts = IdIndex(), IdIndex(), Counts()
        self._position = 0

    def encode(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        self.counts.rows += len(batch)
        kept = batch
        if (
            self.rule.min_rating is not None and self.rule.repeats != "last"
        ):  # the last row may be a low one
            kept = batch.filter(pc.greater_equal(batch["rating"], self.rule.min_rating))
            self.counts.below_min_rating += len(batch) - len(kept)
        positions = np.arange(self._position, self._position + len(kept), dtype=np.uint64)
        self._position += len(kept)
        columns = {
            "user": self.users.encode(kept["user"]),
            "item": self.items.encode(kept["item"]),
            "position": pa.array(positions),
        }
        columns |= {
            name: _split_codes(kept["split"]) if name == "split" else kept[name]
            for name in self.extra
        }
        return pa.record_batch(columns)


def _split_codes(splits: pa.Array) -> pa.Array:
    codes = pc.index_in(splits, value_set=SPLIT_VALUES)
    if codes.null_count:
        bad = splits.filter(pc.is_null(codes))[0].as_py()
        raise ValueError(
            f"the split column holds {bad!r}; expected 0 or train, 1 or test, 2 or validation"
        )
    return pa.array((np.asarray(codes) // 2).astype(np.uint8))


def _write_scratch(
    stream: Iterable[pa.RecordBatch], folder: Path, encoder: _Encoder
) -> tuple[np.ndarray, np.ndarray]:
    """Write the positives to `folder`; starts and sizes of every user, both (U,) int64, by user
    code."""
    sizes: list[np.ndarray] = []
    item_rank: np.ndarray | None = None
    item_path, split_path = folder / "items", folder / "splits"
    with (
        open(item_path, "wb") as item_file,
        open(split_path, "wb") as split_file,
        Progress("grouping", "rows") as progress,
    ):
        for rows in _whole_users(stream, ["user", "item", *encoder.extra]):
            if item_rank is None:  # the sort has consumed all input, so the index is complete
                item_rank = _ascending(encoder.items)[1]
            user, item = rows["user"], rows["item"]
            progress.add(len(user))
            local = user - user[0]  # codes are dense: every user has a row
            n_users = int(local[-1]) + 1
            pairs = local.astype(np.int64) * len(item_rank) + item
            kept = positive_rows(encoder.rule, pairs, rows.get("rating"), rows.get("time"))
            n_pairs = (
                len(np.unique(pairs))
                if encoder.rule.repeats == "last" and not encoder.rule.is_implicit
                else len(kept)
            )
            encoder.counts.duplicates += len(user) - n_pairs
            encoder.counts.below_min_rating += n_pairs - len(kept)
            item_file.write(item_rank[item[kept]].tobytes())
            if "split" in rows:
                split_file.write(rows["split"][kept].tobytes())
            sizes.append(np.bincount(local[kept], minlength=n_users))
    size = np.concatenate([np.empty(0, np.int64), *sizes]).astype(np.int64)
    return np.cumsum(size) - size, size


def _whole_users(
    stream: Iterable[pa.RecordBatch], names: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    """The columns `names` of `stream`, cut where the user changes, so that no user is in two
    pieces."""
    held: list[dict[str, np.ndarray]] = []

    def joined() -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in held]) for name in names}

    for batch in stream:
        if not len(batch):
            continue
        columns = {name: np.asarray(batch[name]) for name in names}
        user = columns["user"]
        cut = int(np.searchsorted(user, user[-1]))
        if cut:
            held.append({name: column[:cut] for name, column in columns.items()})
            yield joined()
            held = []
        elif held and held[-1]["user"][-1] != user[0]:
            yield joined()
            held = []
        held.append({name: column[cut:] for name, column in columns.items()})
    if held:
        yield joined()


# --- items that are dropped -----------------------------------------------------------------------


def item_counts(data: Interactions) -> np.ndarray:
    """The users of every item, (I,) int64."""
    counts = np.zeros(len(data.item_ids), np.int64)
    for _, _, items, _ in data.blocks(np.argsort(data.starts, kind="stable")):
        counts += np.bincount(items, minlength=len(counts))
    return counts


def without_items(data: Interactions, dropped: np.ndarray) -> Interactions:
    """The interactions without the items of `dropped`, (I,) bool, and without users who are left
    with none.

    The scratch file is written anew; `data` can no longer be read.
    """
    rank = np.cumsum(~dropped, dtype=np.int64) - 1
    sizes, fresh = (
        np.zeros(len(data.sizes), np.int64),
        {name: data.folder / f"{name}.next" for name in ("items", "splits")},
    )
    order = np.argsort(data.starts, kind="stable")  # as they lie in the file
    with open(fresh["items"], "wb") as item_file, open(fresh["splits"], "wb") as split_file:
        for users, indptr, items, splits in data.blocks(order):
            kept = ~dropped[items]
            item_file.write(rank[items[kept]].astype(np.uint32).tobytes())
            if data.has_splits:
                split_file.write(splits[kept].tobytes())
            owner = np.repeat(np.arange(len(users)), np.diff(indptr))
            sizes[users] = np.bincount(owner[kept], minlength=len(users))
    for name, path in fresh.items():
        os.replace(path, data.folder / name)
    starts = np.empty(len(sizes), np.int64)
    starts[order] = np.cumsum(sizes[order]) - sizes[order]
    left = np.flatnonzero(sizes)
    return replace(
        data,
        user_ids=data.user_ids.take(pa.array(left)),
        item_ids=data.item_ids.filter(pa.array(~dropped)),
        starts=starts[left],
        sizes=sizes[left],
    )
