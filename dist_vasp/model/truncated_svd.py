"""The first right singular vectors of the users x items matrix, partitioned by item.

    X~ = D X S = U diag(s) V^T,   D, S diagonal: weights of users and items

V comes from subspace iteration on X~^T X~, from random numbers, with some more columns than are
asked for (Halko, Martinsson and Tropp 2011, SIAM Review 53, 4.4 and 4.5). Every rank holds the
users' histories and the rows of V of its own items. Users are processed in blocks. Ranks exchange
X~ Q of a block, (B, C), and (C, C) matrices.

Shapes: U users, B users of a block, I items, J this rank's items, C columns, k of them kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vasp.data.rows import Rows
from dist_vasp.kernels.interface import PLAIN
from dist_vasp.kernels.random import Normal, fill, row_keys
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.comm import Ranks, all_reduce

MORE_COLUMNS = 32  # than are kept: the last ones converge slowly
BLOCK_BYTES = 1 << 26  # of the products of a block of users, or those of V where these are more
_ROWS_AT_ONCE = 1 << 14  # of a product of two tall matrices, in float64
_NOISE = 64  # roundings of the largest eigenvalue; a smaller one is taken for 0
_SEED = 0  # start of the iteration; it affects V through the convergence error alone


def users_of_a_block(n_items: int, width: int, partitions: int) -> int:
    """How many users are multiplied at once: a pass over V costs as much for each block."""
    return max(1, BLOCK_BYTES // (4 * width), -(-n_items // partitions))


@dataclass(frozen=True)
class _Block:
    """Some users: their own items, the users that have each own item, and what each user weighs."""

    items: tuple[Tensor, Tensor]  # ids from the first own item, index pointer (B + 1,)
    users: tuple[Tensor, Tensor]  # rows of the block, index pointer (J + 1,)
    weight_B1: Tensor


class WeightedUsers:
    """X~ restricted to this rank's items, by blocks of users.

    user_exponent: a user of n items weighs (n / mean n)^this in X~^T X~. item_exponent: the column
    of an item is multiplied by (popularity / mean popularity)^this. Takes 16 bytes for each
    interaction with an own item.
    """

    def __init__(
        self,
        users: Rows,
        n_items: int,
        width: int,
        exponents: tuple[float, float],
        ranks: Ranks,
    ) -> None:
        part = ranks.partition_of_items(n_items)
        self.ranks, self.n_items, self.own = ranks, n_items, (part.start, part.stop)
        user_exponent, item_exponent = exponents
        popularity_I = np.bincount(users.items, minlength=n_items).astype(np.float64)
        relative_I = np.maximum(popularity_I, 1) / popularity_I.mean()
        own_J = relative_I[part.start : part.stop] ** item_exponent
        self.scale_J1 = torch.from_numpy(own_J).float().to(ranks.device)[:, None]
        self.rank_of_X = min(int((users.lengths > 0).sum()), int((popularity_I > 0).sum()))
        lengths_U = users.lengths.astype(np.float64)
        weight_U = (np.maximum(lengths_U, 1) / lengths_U.mean()) ** user_exponent
        together = users_of_a_block(n_items, width, ranks.layout.partitions)
        self._blocks = [
            self._block(users.slice(lo, min(lo + together, users.n_rows)), weight_U[lo:])
            for lo in range(0, users.n_rows, together)
        ]

    def _block(self, rows: Rows, weight_U: np.ndarray) -> _Block:
        device = self.ranks.device
        x = ItemRows(
            torch.from_numpy(rows.indptr).to(device),
            torch.from_numpy(rows.items.astype(np.int64)).to(device),
            self.n_items,
            torch.ones(rows.n_rows, dtype=torch.bool, device=device),
        )
        users, of_item = x.rows_by_item(*self.own)
        weight_B1 = torch.from_numpy(weight_U[: rows.n_rows]).float().to(device)[:, None]
        # a copy of the own part: else the rows of all items would stay in memory
        return _Block(x.restricted(*self.own), (users.clone(), of_item), weight_B1)

    def gram_times(self, Q_JC: Tensor) -> Tensor:
        """The own rows of X~^T X~ Q."""
        group, Q_JC = self.ranks.partition_group, self.scale_J1 * Q_JC
        Y_JC = torch.zeros_like(Q_JC)
        for block in self._blocks:
            Z_BC = all_reduce(PLAIN.sum_rows(Q_JC, *block.items), group)
            Y_JC += PLAIN.sum_rows(Z_BC.mul_(block.weight_B1), *block.users)
        return Y_JC.mul_(self.scale_J1)


@dataclass(frozen=True)
class Factors:
    """V_Jk: right singular vectors, the own rows. values_k: singular values, descending.

    Where X~ has fewer than k of them the last columns of V and the last values are 0.
    """

    V_Jk: Tensor
    values_k: Tensor


def right_singular_vectors(
    X: WeightedUsers, k: int, iterations: int, tick: Callable[[int], None] = lambda done: None
) -> Factors:
    """The first k right singular vectors; `tick(iterations done)` is called after each, on every
    rank as often."""
    lo, hi = X.own
    width = min(k + MORE_COLUMNS, X.n_items)
    Q_JC = torch.empty((hi - lo, width), device=X.ranks.device)
    fill(Q_JC, row_keys(_SEED, "svd", np.arange(lo, hi, dtype=np.uint64)), Normal())
    Q_JC = _orthonormal(Q_JC, X.ranks)
    for done in range(1, iterations + 1):
        Q_JC = _orthonormal(X.gram_times(Q_JC), X.ranks)
        tick(done)
    Q_JC = _orthonormal(Q_JC, X.ranks)  # again, because the basis was rounded to float32
    squares, U_CC = _eigen(_inner(Q_JC, X.gram_times(Q_JC), X.ranks), X.ranks)
    kept = min(k, width)
    V_Jk = torch.zeros((hi - lo, k), device=Q_JC.device)
    V_Jk[:, :kept] = Q_JC @ U_CC[:, :kept].to(Q_JC)
    values_k = torch.zeros(k, dtype=torch.float64, device=Q_JC.device)
    values_k[:kept] = squares[:kept].clamp(min=0).sqrt()
    is_noise_k = values_k <= values_k[0] * (_NOISE * torch.finfo(torch.float32).eps) ** 0.5
    is_noise_k[X.rank_of_X :] = True
    V_Jk[:, is_noise_k] = 0
    return Factors(V_Jk, values_k.masked_fill(is_noise_k, 0))


def _orthonormal(Y_JC: Tensor, ranks: Ranks) -> Tensor:
    """An orthonormal basis of the columns of Y, by the eigenvectors of Y^T Y; what lies within
    rounding of 0 becomes a column of zeros."""
    squares_C, U_CC = _eigen(_inner(Y_JC, Y_JC, ranks), ranks)
    least = squares_C[0] * len(squares_C) * torch.finfo(torch.float32).eps ** 2
    scale_C = torch.where(squares_C > least, squares_C, torch.inf).rsqrt()
    return Y_JC @ (U_CC * scale_C).to(Y_JC)


def _inner(A_JC: Tensor, B_JC: Tensor, ranks: Ranks) -> Tensor:
    """A^T B over the items of all ranks, (C, C) float64."""
    total_CC = torch.zeros((A_JC.shape[1], B_JC.shape[1]), dtype=torch.float64, device=A_JC.device)
    for first in range(0, len(A_JC), _ROWS_AT_ONCE):
        some = slice(first, first + _ROWS_AT_ONCE)
        total_CC.addmm_(A_JC[some].double().T, B_JC[some].double())
    return all_reduce(total_CC, ranks.partition_group)


def _eigen(A_CC: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of a symmetric matrix: those of the first rank on
    every rank, because signs may differ between processors."""
    found = A_CC.new_zeros((len(A_CC) + 1, len(A_CC)))
    if ranks.is_main:
        values_C, U_CC = torch.linalg.eigh((A_CC + A_CC.T) / 2)
        found = torch.cat([values_C[None], U_CC]).flip(1).contiguous()
    found = all_reduce(found, ranks.world)
    return found[0], found[1:]
