"""Closed-form EASE, partitioned by item (Steck 2019, arXiv 1905.03375, equations 7 and 8).

    G = X^T X,  P = (G + lambda I)^-1,  B = I - P diagMat(1 / diag P),  diag(B) = 0,  score = x B

Each rank owns the columns J of the one I x I matrix, in blocks (I, C). G, then -P, then B take each
other's place in it. In addition there are two panels (I, C) and a block of users.

The inverse is a blocked symmetric sweep. For every block K of columns, with the panel A_IK on all
ranks:

    A_KK = L L^T  (Cholesky),  V = A_IK L^-T,  V_K = -L^-T,  A_IK = 0,  A_KI = 0,  A <- A - V V^T

After the last block A is -P. Why this, and not Cholesky, inverse of the factor and product: A stays
symmetric, so of every two mirrored blocks only one is kept up to date; that is I^3 operations like
the three steps together, in one loop of matrix products whose work is even over the columns, and
one panel on the wire. An inverse by Gauss and Jordan without the symmetry takes 2 I^3. Its error in
float32 is that of LAPACK's Cholesky and LU, up to a factor of 1.4 either way, at conditions of 1e2
to 1e8 (docs/experiments.md, EASE).

Shapes: U users of a block, I items, J this rank's items, C columns of a block, K the pivot block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dist_vasp.kernels.interface import PLAIN
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.parallel.partition import ItemPartition

# smaller: more passes over the matrix; larger: more work on the diagonal blocks, which are computed
# whole
SWEEP_COLUMNS = 512
GPU_SWEEP_COLUMNS = 1024
_MOST_HOST_COLUMNS = 4096  # of a matrix on the host that a GPU computes: a block moves all of it
_GATHER_COLUMNS = 256  # a block of dense users stays in a CPU core's cache (docs/experiments.md)
DENSE_BYTES = 1 << 30  # of dense users at once on a GPU

Range = tuple[int, int]


def sweep_columns(device: torch.device) -> int:
    """The columns of a block of the sweep."""
    return SWEEP_COLUMNS if device.type == "cpu" else GPU_SWEEP_COLUMNS


@dataclass(frozen=True)
class Gpu:
    """A GPU that computes a matrix which lies on the host."""

    device: torch.device
    memory: int  # bytes

    def sweep_columns(self, n_items: int) -> int:
        """As many as three panels of float64 and a copy take a quarter of the memory."""
        fit = self.memory // 4 // (4 * 8 * n_items)
        return max(128, min(_MOST_HOST_COLUMNS, fit // 128 * 128))

    @property
    def dense_bytes(self) -> int:
        """Of dense users at once; weighted users are as many again."""
        return self.memory // 8


class SymmetricColumns:
    """This rank's column blocks of a symmetric I x I matrix.

    Of two mirrored blocks of the matrix, only one is kept up to date. Column block c keeps the row
    blocks c, c + 1, ... up to half of all blocks, cyclically, so that the work is equal for every
    column and rank.
    `columns`: (I, C) each, the blocks `partition.blocks(width)` of this rank, written in place.
    gpu: what computes where the matrix is on the host: products and factors are then made of copies
    of its parts.
    """

    def __init__(
        self,
        columns: list[Tensor],
        n_items: int,
        ranks: Ranks,
        width: int,
        gpu: Gpu | None = None,
    ) -> None:
        P, mine = ranks.layout.partitions, ranks.partition_of_items(n_items).index
        blocks = [ItemPartition(n_items, P, p).blocks(width) for p in range(P)]
        self.columns, self.ranks, self.n_items = columns, ranks, n_items
        self.gpu, self.device = gpu, gpu.device if gpu else ranks.device
        self.blocks: list[Range] = [block for of_rank in blocks for block in of_rank]
        self.first = sum(len(of_rank) for of_rank in blocks[:mine])  # of this rank's blocks
        assert [c.shape[1] for c in columns] == [hi - lo for lo, hi in blocks[mine]], (
            "columns do not match the partition"
        )

    def kept_rows(self, block: int) -> list[Range]:
        """The rows of column block `block` that are kept up to date: one range, or two where it
        goes over the end."""
        n = len(self.blocks)
        last = block + (n - 1) // 2 + (n % 2 == 0 and block < n // 2)
        if last < n:
            return [(self.blocks[block][0], self.blocks[last][1])]
        return [(self.blocks[block][0], self.n_items), (0, self.blocks[last - n][1])]

    def own(self) -> list[tuple[int, Tensor]]:
        """(index over all ranks, block (I, C)) of this rank's columns."""
        return list(enumerate(self.columns, self.first))

    @contextmanager
    def part(self, column: Tensor, rows: Range) -> Iterator[Tensor]:
        """Rows of a column block where they are computed; what is written to them is kept."""
        here = column[slice(*rows)]
        if self.gpu is None:
            yield here
            return
        there = here.to(self.device, copy=True)
        yield there
        here.copy_(there)

    def panel(self, block: int) -> Tensor:
        """The columns of `block`, (I, C), on every rank: its kept rows, and the others from the
        columns that keep their mirror."""
        lo, hi = self.blocks[block]
        panel_IC = self.columns[0].new_zeros((self.n_items, hi - lo))
        for c, column in self.own():
            if c == block:
                for first, last in self.kept_rows(c):
                    panel_IC[first:last] = column[first:last]
            elif any(first <= lo < last for first, last in self.kept_rows(c)):
                panel_IC[slice(*self.blocks[c])] = column[lo:hi].T
        return all_reduce(
            panel_IC, self.ranks.partition_group
        )  # a sum: every row comes from one rank

    def subtract_outer(self, V_IC: Tensor) -> None:
        """A <- A - V V^T on what is kept."""
        for c, column in self.own():
            right_T = V_IC[slice(*self.blocks[c])].T
            for rows in self.kept_rows(c):
                with self.part(column, rows) as part:
                    part.addmm_(V_IC[slice(*rows)], right_T, alpha=-1)

    def fill(self) -> None:
        """Bring the stale half up to date: now every column is whole."""
        for block in range(len(self.blocks)):
            panel_IC = self.panel(block)
            for c, column in self.own():
                if c == block:
                    column.copy_(panel_IC)


def add_gram(G: SymmetricColumns, x: ItemRows, weight_U: Tensor | None = None) -> None:
    """G += x^T diag(weight) x on what is kept, for the users x (U rows): their dense rows exist for
    one block of columns at a time.

    Row i of the sum is the sum of the rows of those users that have item i, times their values of
    it, where x has values; without weights and values a float32 G is exact up to 2^24 users of a
    pair.
    """
    if G.gpu or x.items.device.type != "cpu":
        add_dense_gram(G, x, weight_U)
        return
    if x.values is not None and weight_U is None:
        weight_U = torch.ones(x.n_rows, dtype=G.columns[0].dtype)
    dtype = torch.float32 if weight_U is None else weight_U.dtype
    for c, column in G.own():
        lo, hi = G.blocks[c]
        for first in range(lo, hi, _GATHER_COLUMNS):
            last = min(first + _GATHER_COLUMNS, hi)
            x_UC = torch.zeros((x.n_rows, last - first), device=column.device, dtype=dtype)
            users, items = x.positions(first, last)
            x_UC[users, items] = 1.0 if weight_U is None else weight_U[users]
            if x.values is not None:
                x_UC[users, items] *= x.values_by_item(first, last)
            for top, bottom in G.kept_rows(c):
                column[top:bottom, first - lo : last - lo] += _sums_over_users(x_UC, x, top, bottom)


def _sums_over_users(x_UC: Tensor, x: ItemRows, lo: int, hi: int) -> Tensor:
    """For each of the items [lo, hi) the sum of the rows of its users, times their values of it."""
    ids, indptr = x.rows_by_item(lo, hi)
    if x.values is None or len(ids) == 0:
        return PLAIN.sum_rows(x_UC, ids, indptr)
    values = x.values_by_item(lo, hi).to(x_UC.dtype)
    return embedding_bag(
        ids, x_UC, indptr, mode="sum", include_last_offset=True, per_sample_weights=values
    )


def add_dense_gram(G: SymmetricColumns, x: ItemRows, weight_U: Tensor | None = None) -> None:
    """As `add_gram`, by dense products of some users at a time, which suits a GPU. x is where the
    products are computed."""
    dtype = G.columns[0].dtype
    at_once = G.gpu.dense_bytes if G.gpu else DENSE_BYTES
    together = max(1, at_once // (dtype.itemsize * x.n_items))
    for first in range(0, x.n_rows, together):
        last = min(first + together, x.n_rows)
        start, stop = x.indptr[[first, last]].tolist()
        x_UI = torch.zeros((last - first, x.n_items), device=x.items.device, dtype=dtype)
        values = 1.0 if x.values is None else x.values[start:stop].to(dtype)
        x_UI[x.row_of[start:stop] - first, x.items[start:stop]] = values
        weighted_UI = x_UI if weight_U is None else x_UI * weight_U[first:last, None].to(dtype)
        for c, column in G.own():
            weighted_UC = weighted_UI[:, slice(*G.blocks[c])]
            for rows in G.kept_rows(c):
                with G.part(column, rows) as part:
                    part.addmm_(x_UI[:, slice(*rows)].T, weighted_UC)


def invert(A: SymmetricColumns, tick: Callable[[int], None] = lambda done: None) -> None:
    """A <- -A^-1, whole columns, in place; `tick(blocks done)` after each block of columns.

    Raises AgreedError on every rank where a pivot is not positive: A is not positive definite in
    its precision.
    """
    for block, (lo, hi) in enumerate(A.blocks):
        V_IC = A.panel(block).to(A.device)
        with agreed(A.ranks):
            L_CC = _cholesky(V_IC[lo:hi], lo)
        inverse_CC = torch.linalg.solve_triangular(
            L_CC, torch.eye(hi - lo, dtype=L_CC.dtype, device=L_CC.device), upper=False
        )
        V_IC = V_IC @ inverse_CC.T
        V_IC[lo:hi] = -inverse_CC.T
        for c, column in A.own():
            if c == block:
                column.zero_()
            else:
                column[lo:hi] = 0
        A.subtract_outer(V_IC)
        tick(block + 1)
    A.fill()


def _cholesky(pivot_CC: Tensor, first: int) -> Tensor:
    L_CC, info = torch.linalg.cholesky_ex(pivot_CC)
    if info.item():
        raise ValueError(
            "the Gram matrix plus model.ease_lambda has a pivot that is not positive at item row "
            f"{first + int(info.item()) - 1}: it "
            f"is singular in {str(pivot_CC.dtype).removeprefix('torch.')}; raise "
            "model.ease_lambda or set model.ease_dtype to fp64"
        )
    return L_CC


def to_weights(
    negative_P: SymmetricColumns, ridge: list[Tensor] | None = None, xi: float = 0.0
) -> None:
    """-P -> B, whole columns, in place: B_ij = -P_ij max(ridge_j, (1 - xi) / P_jj), zero on the
    diagonal; without `ridge` B_ij = -P_ij / P_jj.

    ridge: (C,) of each of this rank's blocks, what was added to the diagonal of its columns. See
    model/closed_form.py. AgreedError where P_jj is not positive.
    """
    with agreed(negative_P.ranks):
        for k, (c, column) in enumerate(negative_P.own()):
            lo, hi = negative_P.blocks[c]
            diagonal_C = torch.diagonal(column[lo:hi])
            if not ((diagonal_C < 0) & torch.isfinite(diagonal_C)).all():
                raise ValueError(
                    f"the inverse has a diagonal that is not positive within the item rows {lo} "
                    f"to {hi - 1}: too ill-conditioned for "
                    f"{str(column.dtype).removeprefix('torch.')}; raise model.ease_lambda or set "
                    "model.ease_dtype to fp64"
                )
            if ridge is None:
                column.div_(-diagonal_C.clone())
            else:
                column.mul_(torch.maximum(ridge[k], (1 - xi) / -diagonal_C))
            diagonal_C.zero_()


def add_to_diagonal(A: SymmetricColumns, value: float | Tensor) -> None:
    """A_jj += value, one for all items or (I,) one for each."""
    for c, column in A.own():
        own = slice(*A.blocks[c])
        if isinstance(value, Tensor):
            torch.diagonal(column[own]).add_(value[own].to(column.dtype))
        else:
            torch.diagonal(column[own]).add_(value)


def scale_diagonal(A: SymmetricColumns, factor: float) -> None:
    for c, column in A.own():
        torch.diagonal(column[slice(*A.blocks[c])]).mul_(factor)
