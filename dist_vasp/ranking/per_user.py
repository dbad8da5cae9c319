"""Write the metrics of each user to a Parquet file, in total and by popularity of the items.

Thirds of popularity: order the items by descending training popularity, ties by item row. An item
is `head` if the items before it have less than a third of all training interactions, `middle` if
they have less than two thirds, else `tail`. So each third has about a third of the interactions;
the head has few items, and the tail most of the catalogue.

The metrics of a third use the user's whole list, but only the held-out items of that third as the
target. Recall@k of the tail is its hits among the first k / min(k, held-out tail items); NDCG uses
the ranks in the whole list. A user without held-out items in a third is not scored there.

Shapes: U users of a block, E held-out items, I items of the vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_vasp.data.held_out import EvalBlock
from dist_vasp.data.items import ItemTable
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows
from dist_vasp.data.users import read_users
from dist_vasp.files import new_file
from dist_vasp.ranking.user_metrics import UserMetrics

THIRDS = ("head", "middle", "tail")


def is_per_user(path: Path) -> bool:
    """Return whether `PerUserFile` wrote a file."""
    return pq.read_schema(path).names[:3] == ["key", "id", "n_held_out"]


def popularity_thirds(popularity: np.ndarray) -> np.ndarray:
    """Return the third of each item, (I,) int8: 0 head, 1 middle, 2 tail.

    popularity (I,): training interactions of each item.
    """
    order = np.argsort(-popularity, kind="stable")
    before = np.concatenate([[0], np.cumsum(popularity[order])])[:-1]
    total = int(popularity.sum())
    thirds = np.empty(len(popularity), np.int8)
    thirds[order] = (3 * before >= total).astype(np.int8) + (3 * before >= 2 * total)
    return thirds


def keep_items(rows: Rows, keep: np.ndarray) -> Rows:
    """Return the rows with only the items marked in `keep`, (I,) bool; rows may become empty."""
    return rows.where(keep[rows.items])


class PerUserFile:
    """The file of metrics by user, written block by block.

    Columns: `key` and `id`, then `n_held_out` and the metrics, then these again for each third,
    with `_head`, `_middle` or `_tail` added to their names. A metric is null where its target is
    empty. Novelty needs no target: it is there once, and null where the list is empty. As a
    context manager, it lets the file appear if the block ends without an error.
    ValueError where it cannot be written, or the users of the data folder cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        folder: str | Path,
        split: str,
        manifest: Manifest,
        items: ItemTable,
        of_users: UserMetrics | None = None,
    ) -> None:
        self.path = Path(path)
        self._thirds = popularity_thirds(items.popularity)
        self._keys, self._ids = read_users(folder, split, manifest)
        self._order = np.argsort(self._keys)
        self._of_users = of_users or UserMetrics()
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
            error = GeneratorExit()  # no user was scored: write no file
        try:
            if self._writer is not None:
                self._writer.close()
        except BaseException as failed:
            error = error or failed
            raise
        finally:
            self._files.__exit__(type(error) if error else None, error, None)

    def write(self, block: EvalBlock, topk_ids: np.ndarray) -> None:
        """Add the users of `block` with their lists `topk_ids`, (U, K)."""
        columns: dict[str, np.ndarray | pa.Array] = {
            "key": block.user_keys,
            "id": self._ids_of(block.user_keys),
        }
        columns["n_held_out"] = block.held_out.lengths.astype(np.int32)
        columns |= self._of_users.of_user(topk_ids, block.held_out)
        for third, name in enumerate(THIRDS):
            columns |= self._of_third(topk_ids, block.held_out, third, f"_{name}")
        # from_pandas: NaN becomes null
        table = pa.table({name: pa.array(c, from_pandas=True) for name, c in columns.items()})
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def _of_third(
        self, topk_ids: np.ndarray, held_out: Rows, third: int, suffix: str
    ) -> dict[str, np.ndarray]:
        target = keep_items(held_out, self._thirds == third)
        scores = self._of_users.of_target(topk_ids, target)
        return {f"n_held_out{suffix}": target.lengths.astype(np.int32)} | {
            f"{name}{suffix}": values for name, values in scores.items()
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
