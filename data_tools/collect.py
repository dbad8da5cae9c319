"""Group raw interactions by user, out of core.

The interactions are read once and never held in memory together:

1. Batches from a reader are filtered by rating, and ids become codes in order of first appearance.
2. DuckDB sorts the codes by (user, position) and spills to disk.
3. Where a user and an item have several rows, one row decides (dist_vasp/data/positives.py). The
   positives go to the scratch files of `Interactions`, sorted by user.

Shapes: U users, I items, E interactions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.grouping import Grouping, ScratchWriter, whole_users
from data_tools.interactions import (
    FolderStore,
    Interactions,
    Store,
    Summary,
    item_counts,
    without_items,
)
from dist_vasp.data.ids import IdIndex
from dist_vasp.data.positives import PositiveRule
from dist_vasp.progress import Progress

ROWS_PER_BATCH = 1 << 19
SPLIT_VALUES = pa.array(["0", "train", "1", "test", "2", "validation"])  # code = position // 2


def collect(
    batches: Iterable[pa.RecordBatch],
    folder: Path,
    min_rating: float,
    memory_limit: str,
    repeats: str = "first",
    by_time: bool = False,
    keep_ratings: bool = False,
) -> tuple[Interactions, Summary]:
    """Group the positives of `batches` by user, with scratch files in `folder`.

    batches: columns user and item, and optionally rating, split and time. Without a rating column
    every row counts. `repeats` says which of several rows of a pair counts; times, where there are
    any, order them. With `by_time` the positives of a user come in the order of their times, which
    are kept beside them; without times in the order of the input. With `keep_ratings` the ratings
    are kept beside them. ValueError for unknown split values, for an input without rows, for one
    without positives, and for one without the ratings that are to be kept; ValueError of the reader
    passes through.
    """
    rest = iter(batches)
    first = next(rest, None)
    schema = first.schema if first is not None else pa.schema([])
    grouping = grouping_of(
        None if first is None else schema.names, min_rating, repeats, by_time, keep_ratings
    )
    encoder = _Encoder(grouping, has_ratings="rating" in schema.names)
    folder.mkdir(parents=True, exist_ok=True)
    encoded = _EncodedBatches(encoder, itertools.chain([] if first is None else [first], rest))
    types = {"split": pa.uint8(), "rating": pa.float64()}
    if "time" in schema.names:
        types["time"] = schema.field("time").type
    fields = [("user", pa.uint32()), ("item", pa.uint32()), ("position", pa.uint64())]
    sorted_schema = pa.schema([*fields, *((name, types[name]) for name in grouping.extra)])
    with _sorted_by_user(encoded, sorted_schema, folder, memory_limit) as stream:
        sizes, store = _write_scratch(stream, folder, encoder, grouping)
    if not sizes.any():
        raise ValueError(nothing_kept(encoder.summary, min_rating, repeats))
    user_ids, user_rank = ascending(encoder.users)
    data = interactions_of(user_ids, user_rank, ascending(encoder.items)[0], sizes, store)
    return only_positives(data, grouping, encoder.summary), encoder.summary


def grouping_of(
    columns: Sequence[str] | None,
    min_rating: float,
    repeats: str,
    by_time: bool,
    keep_ratings: bool,
) -> Grouping:
    """Return what becomes of the rows of a user, for an input with these columns (None: it has no
    rows); ValueError where `repeats` needs a rating and there is none."""
    names = columns or []
    rule, extra = _rule_and_columns(names, min_rating, repeats, columns is None)
    if keep_ratings and "rating" not in extra:
        extra.append("rating")
    kept = {
        "splits": "split" in extra,
        "times": by_time and "time" in extra,
        "ratings": keep_ratings,
    }
    return Grouping(rule, tuple(extra), tuple(name for name, is_kept in kept.items() if is_kept))


def _rule_and_columns(
    names: Sequence[str], min_rating: float, repeats: str, is_empty: bool
) -> tuple[PositiveRule, list[str]]:
    """Return which rows are positives, and which columns the sort carries besides user and item."""
    if repeats == "max" and not is_empty and "rating" not in names:
        raise ValueError(
            "--repeats max takes the highest rating of a pair, and no rating column was read; "
            "pass --rating_column NAME"
        )
    extra = [name for name in ("split", "time") if name in names]
    if "rating" not in names:
        return PositiveRule(repeats=repeats), extra
    if repeats != "first":
        extra.append("rating")
    return PositiveRule(rating_column="rating", min_rating=min_rating, repeats=repeats), extra


def nothing_kept(summary: Summary, min_rating: float, repeats: str) -> str:
    """Return the message for an input without positives."""
    reason = f"all {summary.rows} rows have a rating below {min_rating:g}; lower --min_rating"
    if repeats == "last":
        reason = f"the last rating of every pair is below {min_rating:g}; lower --min_rating"
    if not summary.rows:
        reason = "it holds no rows; name another"
    return f"the input has no interaction to keep: {reason}"


def interactions_of(
    user_ids: pa.Array,
    user_rank: np.ndarray,
    item_ids: pa.Array,
    sizes: np.ndarray,
    store: Store,
) -> Interactions:
    """Return the interactions of a store.

    user_ids (U,) and item_ids (I,) ascend; user_rank (U,) and sizes (U,) are in the store's order.
    """
    order = np.argsort(user_rank)
    starts = np.cumsum(sizes) - sizes
    return Interactions(user_ids, item_ids, starts[order], sizes[order], store)


def only_positives(data: Interactions, grouping: Grouping, summary: Summary) -> Interactions:
    """Return the interactions without users and items that have none."""
    if grouping.rule.repeats == "last" and summary.has_ratings:
        # some users and items appear only in rows of low ratings
        return without_items(data, item_counts(data) == 0)
    return data


def ascending(index: IdIndex) -> tuple[pa.Array, np.ndarray]:
    """Return the ids in ascending order (strings by their UTF-8 bytes), and the rank of each code
    there, uint32."""
    assert index.ids is not None
    order = np.asarray(pc.array_sort_indices(index.ids))
    rank = np.empty(len(order), np.uint32)
    rank[order] = np.arange(len(order), dtype=np.uint32)
    return index.ids.take(pa.array(order)), rank


class _Encoder:
    """Turns batches of ids into batches of codes, and drops the rows whose rating is too low."""

    def __init__(self, grouping: Grouping, has_ratings: bool):
        self._grouping = grouping
        self.users = IdIndex()
        self.items = IdIndex()
        self.summary = Summary(has_ratings=has_ratings)
        self._position = 0

    def encode(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        kept = kept_rows(batch, self._grouping.rule, self.summary)
        positions = np.arange(self._position, self._position + len(kept), dtype=np.uint64)
        self._position += len(kept)
        columns = {
            "user": self.users.encode(kept["user"]),
            "item": self.items.encode(kept["item"]),
            "position": pa.array(positions),
        }
        columns |= extra_columns(kept, self._grouping.extra)
        return pa.record_batch(columns)


def kept_rows(batch: pa.RecordBatch, rule: PositiveRule, summary: Summary) -> pa.RecordBatch:
    """Return the rows whose ratings are high enough, and count all rows in `summary`."""
    summary.rows += len(batch)
    if rule.min_rating is None or rule.repeats == "last":
        return batch  # with `last`, a low rating may be the last row of its pair
    kept = batch.filter(pc.greater_equal(batch["rating"], rule.min_rating))
    summary.below_min_rating += len(batch) - len(kept)
    return kept


def extra_columns(batch: pa.RecordBatch, names: Sequence[str]) -> dict[str, pa.Array]:
    """Return the columns besides user and item; ValueError for an unknown split."""
    return {
        name: _split_codes(batch["split"]) if name == "split" else batch[name] for name in names
    }


def _split_codes(splits: pa.Array) -> pa.Array:
    codes = pc.index_in(splits, value_set=SPLIT_VALUES)
    if codes.null_count:
        bad = splits.filter(pc.is_null(codes))[0].as_py()
        raise ValueError(
            f"the split column holds {bad!r}; expected 0 or train, 1 or test, 2 or validation"
        )
    return pa.array((np.asarray(codes) // 2).astype(np.uint8))


class _EncodedBatches:
    """The encoded batches as DuckDB reads them.

    DuckDB reports only the text of an error that reading raises; `failure` keeps the error itself.
    """

    def __init__(self, encoder: _Encoder, batches: Iterable[pa.RecordBatch]):
        self._encoder = encoder
        self._batches = batches
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        try:
            with Progress("reading", None, "row", brief=True) as progress:
                for batch in self._batches:
                    progress.add(len(batch))
                    kept = self._encoder.encode(batch)
                    if len(kept):
                        yield kept
        except BaseException as error:
            self.failure = error
            raise


@contextmanager
def _sorted_by_user(
    batches: _EncodedBatches, schema: pa.Schema, folder: Path, memory_limit: str
) -> Iterator[Iterable[pa.RecordBatch]]:
    """Sort the batches by (user, position) with a bound on memory, spilling to `folder`.

    ValueError where the sort lacks memory or disk; an error of the reader passes through.
    """
    connection = duckdb.connect(
        config={"temp_directory": str(folder / "spill"), "preserve_insertion_order": False}
    )
    try:
        # one thread feeds the sort; more threads only cost memory
        connection.execute("SET threads = 1")
        connection.execute("SET memory_limit = ?", [memory_limit])
        connection.register("rows", pa.RecordBatchReader.from_batches(schema, iter(batches)))
        columns = ", ".join(name for name in schema.names if name != "position")
        query = connection.sql(f"SELECT {columns} FROM rows ORDER BY user, position")
        yield query.to_arrow_reader(ROWS_PER_BATCH)
    except Exception as error:
        if batches.failure is not None:
            raise batches.failure from None
        if isinstance(error, duckdb.OutOfMemoryException):
            reason = str(error).split("Possible solutions")[0].strip()
            raise ValueError(
                f"the sort does not fit into --memory_limit {memory_limit}; pass a larger one "
                f"({reason})"
            ) from None
        if isinstance(error, duckdb.IOException):
            raise ValueError(
                f"the sort cannot spill beside the output ({error}); free some space or choose "
                "another place"
            ) from None
        raise
    finally:
        connection.close()


def _write_scratch(
    stream: Iterable[pa.RecordBatch], folder: Path, encoder: _Encoder, grouping: Grouping
) -> tuple[np.ndarray, FolderStore]:
    """Write the positives to `folder`; return their number for every user, (U,) int64, by code."""
    item_rank: np.ndarray | None = None
    with (
        ScratchWriter(folder, grouping, encoder.summary) as scratch,
        Progress("grouping", None, "row", brief=True) as progress,
    ):
        for rows in whole_users(stream, ["user", "item", *grouping.extra]):
            if item_rank is None:  # the sort has consumed all input, so the index is complete
                item_rank = ascending(encoder.items)[1]
            progress.add(len(rows["user"]))
            scratch.add(rows, item_rank)
        return scratch.sizes, scratch.store()
