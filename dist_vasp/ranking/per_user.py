"""Metrics of each user as a Parquet file, over all held-out items and by the popularity of the
held-out item.

Thirds of popularity. Order the items by descending training popularity, ties to the lower item row.
An item is head where the items before it hold less than a third of all training interactions,
middle where they hold less than two thirds, else tail: each third holds about a third of the
interactions, the head very few items, the tail most of the catalogue.

A metric of a third asks how well the user's one list finds the held-out items of that third: the
target is cut down to them, the list is not. Recall@k of the tail is its hits among the first k /
min(k, held-out tail items); NDCG likewise, with the ranks of the whole list. A user without a
held-out item in a third is not scored there.

Shapes: U users of a block, E held-out items, I items of the vocabulary.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.data.held_out import EvalBlock
from dist_vasp.data.items import ItemTable
from dist_vasp.data.manifest import MANIFEST, Manifest, users_file
from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.files import new_file
from dist_vasp.ranking.metrics import user_metrics

THIRDS = ("head", "middle", "tail")


def is_per_user(path: Path) -> bool:
    """Whether a file holds metrics of users that `PerUserFile` wrote."""
    return pq.read_schema(path).names[:3] == ["key", "id", "n_held_out"]


def popularity_thirds(popularity: np.ndarray) -> np.ndarray:
    """The third of each item, (I,) int8: 0 head, 1 middle, 2 tail.

    popularity (I,): training interactions of each item.
    """
    order = np.argsort(-popularity, kind="stable")
    before = np.concatenate([[0], np.cumsum(popularity[order])])[:-1]
    total = int(popularity.sum())
    thirds = np.empty(len(popularity), np.int8)
    thirds[order] = (3 * before >= total).astype(np.int8) + (3 * before >= 2 * total)
    return thirds


def keep_items(rows: Rows, keep: np.ndarray) -> Rows:
    """The rows with only the items where `keep` (I,) bool is True; rows may become empty."""
    kept = keep[rows.items]
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    return Rows(indptr_of(np.diff(before[rows.indptr])), rows.items[kept])


class PerUserFile:
    """Written block by block: `key`, `id`, `n_held_out`, the metrics, and the same with `_head`,
    `_middle`, `_tail`.

    A metric is null where its target is empty. A context manager: the file appears when the block
    ends without an error. Raises ValueError where it cannot be written, or the users of the data
    folder cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        folder: str | Path,
        split: str,
        manifest: Manifest,
        items: ItemTable,
        recall_denominator: str = "min",
    ) -> None:
        self.path = Path(path)
        self._thirds = popularity_thirds(items.popularity)
        self._keys, self._ids = _read_users(folder, split, manifest)
        self._order = np.argsort(self._keys)
        self._denominator = recall_denominator
        self._writer: pq.ParquetWriter | None = None
        self._files = ExitStack()
        self._file = self._files.enter_context(new_file(path, "--per_user", ours=is_per_user))

    def __enter__(self) -> PerUserFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None and self._writer is None:
            error = GeneratorExit()  # nobody was scored: there is no file
        try:
            if self._writer is not None:
                self._writer.close()
        except BaseException as failed:
            error = error or failed
            raise
        finally:
            self._files.__exit__(type(error) if error else None, error, None)

    def write(self, block: EvalBlock, topk_ids: np.ndarray) -> None:
        """Add the users of `block`; topk_ids (U, K) their lists."""
        columns: dict[str, np.ndarray | pa.Array] = {
            "key": block.user_keys,
            "id": self._ids_of(block.user_keys),
        }
        columns |= self._scores(topk_ids, block.held_out, "")
        for third, name in enumerate(THIRDS):
            columns |= self._scores(
                topk_ids, keep_items(block.held_out, self._thirds == third), f"_{name}"
            )
        table = pa.table(
            {name: pa.array(column, from_pandas=True) for name, column in columns.items()}
        )  # NaN becomes null
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def _scores(self, topk_ids: np.ndarray, held_out: Rows, suffix: str) -> dict[str, np.ndarray]:
        scores = user_metrics(topk_ids, held_out, self._denominator)
        return {f"n_held_out{suffix}": held_out.lengths.astype(np.int32)} | {
            f"{n}{suffix}": v for n, v in scores.items()
        }

    def _ids_of(self, keys: np.ndarray) -> pa.Array:
        places = self._order[
            np.minimum(np.searchsorted(self._keys, keys, sorter=self._order), len(self._order) - 1)
        ]
        if not np.array_equal(self._keys[places], keys):
            raise ValueError(
                f"{self.path}: the shards hold users that the file of user ids does not; shard "
                "the data again"
            )
        return self._ids.take(pa.array(places))


def _read_users(folder: str | Path, split: str, manifest: Manifest) -> tuple[np.ndarray, pa.Array]:
    """Keys (uint64) and original ids of the users of a split; ValueError unless the file is the one
    of the manifest."""
    name = users_file(split)
    path = Path(folder) / name
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
            raise ValueError(
                f"{path} is not the file that {MANIFEST} lists; restore it or shard the data again"
            )
        table = pq.read_table(pa.BufferReader(data), columns=["key", "id"])
        return np.asarray(table.column("key")).astype(np.uint64), table.column(
            "id"
        ).combine_chunks()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read as the list of users ({error}); shard the data again"
        ) from None
