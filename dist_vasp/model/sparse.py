"""Interaction rows as ids: sums of weight rows and their gradients, never a dense (G, I).

    forward   out_g    = sum of table_i over the items i of row g    (a bag per row)
    gradient  dtable_i = sum of dout_g over the rows g that hold item i
                         (a bag per item, over the transposed ids)

Shapes: G rows, E interactions, I items, C columns of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.nn.functional import pad

from dist_vasp.data.rows import Rows
from dist_vasp.parallel.comm import Gathering, Group


@dataclass(frozen=True)
class ItemRows:
    """G rows of item ids in CSR form, on the device. `items` ascend within a row.

    values: the rating of each interaction; None where every interaction counts as 1. has_room:
    `items` may hold more than the rows do; those beyond the last row are n_items, which is no item.
    """

    indptr: Tensor  # (G+1,) int64
    items: Tensor  # (E,) int64
    n_items: int
    real_rows: Tensor  # (G,) bool; False marks padding, which is empty and counts for nothing
    values: Tensor | None = None  # (E,) float32
    has_room: bool = False

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
        if self.has_room:
            numbers = torch.arange(len(self.items), device=self.items.device)
            rows = torch.searchsorted(self.indptr[1:], numbers, right=True)
            return rows.clamp_(max=self.n_rows - 1)
        return torch.repeat_interleave(
            torch.arange(self.n_rows, device=self.items.device),
            self.lengths,
            output_size=len(self.items),  # else it would be read back from the device
        )

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """The items in ascending order (E,), and where each stood (E,)."""
        items, order = torch.sort(self.items, stable=True)
        return items, order

    @cached_property
    def _by_item(self) -> tuple[Tensor, Tensor, Tensor]:
        """Interactions sorted by item: their rows (E,), their items (E,), and the index pointer
        over items (I+1,)."""
        items, order = self._sorted
        bounds = torch.arange(self.n_items + 1, device=items.device)
        return self.row_of[order], items, torch.searchsorted(items, bounds)

    def rows_by_item(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """For items [lo, hi): the rows that hold each, as ids and index pointer (hi - lo + 1,)."""
        rows, _, indptr = self._by_item
        if (lo, hi) == (0, self.n_items):
            return rows, indptr
        window = indptr[lo : hi + 1]
        return rows[window[0] : window[-1]], window - window[0]

    def bags_of_items(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """As `rows_by_item`, with the rows of all items and an index pointer into them: nothing is
        read back from the device."""
        rows, _, indptr = self._by_item
        return rows, indptr[lo : hi + 1]

    @cached_property
    def transposed(self) -> scipy.sparse.csr_matrix:
        """The rows that hold each item, as a matrix of ones (I, G) on the host."""
        rows, _, indptr = self._by_item
        ones = np.ones(len(rows), np.float32)
        of_items = (ones, rows.numpy().astype(np.int32), indptr.numpy().astype(np.int32))
        return scipy.sparse.csr_matrix(of_items, shape=(self.n_items, self.n_rows))

    def positions(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """(row, item - lo) of every interaction with an item in [lo, hi); of rows with room also
        (a row, n_items)."""
        rows, items, indptr = self._by_item
        if (lo, hi) == (0, self.n_items):
            return rows, items
        first, last = indptr[lo], indptr[hi]
        return rows[first:last], items[first:last] - lo

    def values_by_item(self, lo: int, hi: int) -> Tensor:
        """The ratings in the order of `rows_by_item` and `positions`, for rows that have some."""
        assert self.values is not None
        values, indptr = self.values[self._sorted[1]], self._by_item[2]
        return values[indptr[lo] : indptr[hi]]

    def restricted_values(self, lo: int, hi: int) -> Tensor:
        """The ratings in the order of `restricted`, for rows that have some."""
        assert self.values is not None
        return self.values[(self.items >= lo) & (self.items < hi)]

    def restricted(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """The rows with only their items in [lo, hi): ids minus lo, and index pointer (G+1,)."""
        if (lo, hi) == (0, self.n_items):
            return self.items, self.indptr
        keep = (self.items >= lo) & (self.items < hi)
        kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        return self.items[keep] - lo, kept_before[self.indptr]


class RowExchange:
    """The CSRs of this rank's rows on their way to every rank of the partition group, G = size *
    n_padded rows in all.

    Two collectives: the lengths of the rows, then the ids, padded to the longest rank; both go on
    while this rank does other work. Ratings, where there are some, are a third. `advance` when
    there is time, `finish` when the rows are needed. Padding rows are empty. A group of one rank
    reads nothing back from the device.
    """

    def __init__(
        self,
        rows: list[Rows],
        n_real: int,
        n_padded: int,
        n_items: int,
        group: Group,
        device: torch.device,
    ) -> None:
        self.n_items, self.group = n_items, group
        lengths = torch.full((1, len(rows), n_padded), -1, dtype=torch.int32)
        for k, csr in enumerate(rows):
            lengths[0, k, :n_real] = torch.from_numpy(np.diff(csr.indptr).astype(np.int32))
        items = torch.from_numpy(
            np.concatenate([csr.items for csr in rows]).astype(np.int32, copy=False)
        )
        self._items = _to_device(items, device)
        self._ends_PK = [np.cumsum([len(csr.items) for csr in rows]).tolist()]  # of this rank alone
        self._lengths = Gathering(_to_device(lengths, device), group)
        self._ids: Gathering | None = None
        self._ratings: Gathering | None = None
        values = [csr.values for csr in rows if csr.values is not None]
        assert len(values) in (0, len(rows)), "some rows have ratings, others none"
        self._values = None
        if values:
            self._values = _to_device(torch.from_numpy(np.concatenate(values)), device)

    def advance(self) -> None:
        """Once the lengths have arrived, send the ids."""
        if self._ids is None:
            self._lengths_PKB = self._lengths.wait().long()
            if self.group.size > 1:
                self._ends_PK = self._lengths_PKB.clamp(min=0).sum(dim=2).cumsum(dim=1).tolist()
            self._ids = self._send(self._items)
            if self._values is not None:
                self._ratings = self._send(self._values)

    def _send(self, own_E: Tensor) -> Gathering:
        """Start gathering one number of each interaction, padded to the longest rank."""
        longest = max(ends[-1] for ends in self._ends_PK)
        return Gathering(pad(own_E, (0, longest - len(own_E)))[None], self.group)

    def finish(self) -> list[ItemRows]:
        """The rows of the whole group, one ItemRows per CSR."""
        self.advance()
        assert self._ids is not None
        items_PE = self._ids.wait()
        values_PE = None if self._ratings is None else self._ratings.wait()
        gathered = []
        for k in range(self._lengths_PKB.shape[1]):
            starts = [ends[k - 1] if k else 0 for ends in self._ends_PK]
            ids = self._of_rows(items_PE, k, starts).long()
            values = None if values_PE is None else self._of_rows(values_PE, k, starts)
            lengths_G = self._lengths_PKB[:, k].reshape(-1)
            indptr = torch.cat([lengths_G.new_zeros(1), lengths_G.clamp(min=0).cumsum(0)])
            gathered.append(ItemRows(indptr, ids, self.n_items, lengths_G >= 0, values))
        return gathered

    def _of_rows(self, numbers_PE: Tensor, k: int, starts: list[int]) -> Tensor:
        """The numbers of the k-th CSR, of all ranks one after another."""
        ends = [of_rank[k] for of_rank in self._ends_PK]
        return torch.cat([numbers_PE[p, starts[p] : ends[p]] for p in range(self.group.size)])


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; the host does not wait for a GPU to take it."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


def gather_rows(
    rows: list[Rows], n_real: int, n_padded: int, n_items: int, group: Group, device: torch.device
) -> list[ItemRows]:
    """`RowExchange` from start to end."""
    return RowExchange(rows, n_real, n_padded, n_items, group, device).finish()
