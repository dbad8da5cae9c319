"""Interaction rows as ids: sums of weight rows and their gradients, never a dense (G, I).

    forward   out_g   = sum of table_i over the items i of row g          (a bag per row)
    gradient  dtable_i = sum of dout_g over the rows g that hold item i   (a bag per item, over the transposed ids)

Shapes: G rows, E interactions, I items, C columns of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dist_vasp.data.stream import Rows
from dist_vasp.parallel.comm import Group, all_gather


def sum_rows(table: Tensor, ids: Tensor, indptr: Tensor) -> Tensor:
    """Row n of the result is the sum of `table[ids[indptr[n]:indptr[n + 1]]]`: (n, C). An empty bag sums to zero."""
    if len(ids) == 0:
        return table.new_zeros((len(indptr) - 1, table.shape[1]))
    return embedding_bag(ids, table, indptr, mode="sum", include_last_offset=True)


@dataclass(frozen=True)
class ItemRows:
    """G rows of item ids in CSR form, on the device. `items` ascend within a row."""

    indptr: Tensor  # (G+1,) int64
    items: Tensor  # (E,) int64
    n_items: int
    real_rows: Tensor  # (G,) bool; False marks padding, which is empty and counts for nothing

    @property
    def n_rows(self) -> int:
        return len(self.indptr) - 1

    @cached_property
    def lengths(self) -> Tensor:
        """(G,) interactions per row."""
        return self.indptr.diff()

    @cached_property
    def row_of(self) -> Tensor:
        """(E,) the row of each interaction."""
        return torch.repeat_interleave(torch.arange(self.n_rows, device=self.items.device), self.lengths)

    @cached_property
    def _by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        """Interactions sorted by item: their rows (E,), their items (E,), and the index pointer over items (I+1,)."""
        items, order = torch.sort(self.items, stable=True)
        bounds = torch.arange(self.n_items + 1, device=items.device)
        return self.row_of[order], items, torch.searchsorted(items, bounds)

    def rows_by_item(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """For items [lo, hi): the rows that hold each, as ids and index pointer (hi - lo + 1,)."""
        rows, _, indptr = self._by_item
        window = indptr[lo : hi + 1]
        return rows[window[0] : window[-1]], window - window[0]

    def positions(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """(row, item - lo) of every interaction with an item in [lo, hi)."""
        rows, items, indptr = self._by_item
        first, last = indptr[lo], indptr[hi]
        return rows[first:last], items[first:last] - lo

    def restricted(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """The rows with only their items in [lo, hi): ids minus lo, and index pointer (G+1,)."""
        keep = (self.items >= lo) & (self.items < hi)
        kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        return self.items[keep] - lo, kept_before[self.indptr]


def gather_rows(rows: list[Rows], n_real: int, n_padded: int, n_items: int, group: Group, device: torch.device) -> list[ItemRows]:
    """Each CSR of this rank's rows -> the same of all G = size * n_padded rows of the partition group.

    Two collectives: the lengths of the rows, then the ids, padded to the longest rank. Padding rows are empty.
    """
    lengths = torch.full((1, len(rows), n_padded), -1, dtype=torch.int32)
    for k, csr in enumerate(rows):
        lengths[0, k, :n_real] = torch.from_numpy(np.diff(csr.indptr).astype(np.int32))
    lengths_PKB = all_gather(lengths.to(device), group).long()
    totals_PK = lengths_PKB.clamp(min=0).sum(dim=2)
    items = torch.from_numpy(np.concatenate([csr.items for csr in rows]).astype(np.int32, copy=False)).to(device)
    if group.size > 1:
        padded = items.new_zeros((1, int(totals_PK.sum(dim=1).max())))
        padded[0, : len(items)] = items
        items_PE = all_gather(padded, group)
    else:
        items_PE = items[None]
    gathered = []
    ends_PK = totals_PK.cumsum(dim=1).tolist()
    for k in range(len(rows)):
        starts = [end[k - 1] if k else 0 for end in ends_PK]
        ids = torch.cat([items_PE[p, starts[p] : ends_PK[p][k]] for p in range(group.size)]).long()
        lengths_G = lengths_PKB[:, k].reshape(-1)
        indptr = torch.cat([lengths_G.new_zeros(1), lengths_G.clamp(min=0).cumsum(0)])
        gathered.append(ItemRows(indptr, ids, n_items, lengths_G >= 0))
    return gathered
