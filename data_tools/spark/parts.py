"""The scratch files of all parts of the users, as one store.

A part is a range of the hashes of its users, and its users lie in the order of their hashes. So
the users of a shard of the protocols that order users by hash are neighbours.

Shapes: P parts, U users, I items, B users of a block, E interactions of a block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.collect import ascending, interactions_of
from data_tools.interactions import FolderStore, Interactions, Summary
from dist_vasp.data import ids
from dist_vasp.data.rows import Rows, indptr_of

_CODES, _RANKS = "codes.npy", "ranks.npy"


@dataclass(frozen=True)
class PartsStore:
    """Several scratch folders, one behind the other.

    Each numbers the items in a way of its own; `ranks.npy` holds their ranks among all items.
    """

    folder: Path
    parts: tuple[FolderStore, ...]
    bounds: np.ndarray  # (P+1,) int64: part p holds the interactions [bounds[p], bounds[p + 1])

    @property
    def beside(self) -> tuple[str, ...]:
        """See `Store`."""
        return self.parts[0].beside

    def read(self, name: str, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """See `Store`."""
        places = np.searchsorted(self.bounds, starts, side="right") - 1
        places = np.minimum(places, len(self.parts) - 1)  # of users without interactions
        order = np.argsort(places, kind="stable")
        pieces = []
        for p in np.unique(places).tolist():
            of_part = order[places[order] == p]
            values = self.parts[p].read(name, starts[of_part] - self.bounds[p], sizes[of_part])
            if name == "items":
                ranks = np.load(self.parts[p].folder / _RANKS, mmap_mode="r", allow_pickle=False)
                values = ranks[values]
            pieces.append(values)
        if len(pieces) == 1:
            return pieces[0]
        by_part = Rows(indptr_of(sizes[order]), np.concatenate([np.empty(0, np.uint32), *pieces]))
        return by_part.take(np.argsort(order)).items

    def files(self, name: str) -> list[Path]:
        """See `Store`; not of the items, whose numbers differ between the parts."""
        assert name != "items"
        return [part.folder / name for part in self.parts]

    def remove(self) -> None:
        """See `Store`."""
        for part in self.parts:
            part.remove()


def gather(folder: Path, beside: Sequence[str], summary: Summary) -> Interactions | None:
    """Return the interactions of all parts in `folder`, None where there is none; add the counts
    to `summary`."""
    folders = sorted(p for p in folder.glob("part-*") if p.suffix != ".tmp")
    if not folders:
        return None
    items = ids.IdIndex()
    user_ids, sizes = [], []
    for part in folders:
        users = pq.read_table(part / "users.parquet").combine_chunks()
        user_ids.append(users["id"].chunk(0))
        sizes.append(np.asarray(users["size"]))
        of_part = pq.read_table(part / "items.parquet")["id"].combine_chunks()
        np.save(part / _CODES, np.asarray(items.encode(of_part)), allow_pickle=False)
        counts = json.loads((part / "counts.json").read_text())
        summary.duplicates += counts["duplicates"]
        summary.below_min_rating += counts["below_min_rating"]
    item_ids, item_rank = ascending(items)
    for part in folders:
        codes = np.load(part / _CODES, allow_pickle=False)
        np.save(part / _RANKS, item_rank[codes], allow_pickle=False)
    users_in_order = ids.IdIndex()
    users_in_order.ids = pa.concat_arrays(user_ids)
    all_ids, user_rank = ascending(users_in_order)
    bounds = indptr_of(np.array([int(of_part.sum()) for of_part in sizes]))
    stores = tuple(FolderStore(part, tuple(beside)) for part in folders)
    store = PartsStore(folder, stores, bounds)
    return interactions_of(all_ids, user_rank, item_ids, np.concatenate(sizes), store)
