"""The closed form of model/closed_form.py where each output item keeps a support of K input items.

    column j minimises |W (X_j - X_S b)|^2 + |R_S b|^2,   S the support of j
    A = G + R^2,   A_SS b = G_Sj,   1 / P_jj = A_jj - G_jS b
    B_Sj = b max(R^2_j P_jj, 1 - xi)

It is exact for its support, and with S all other items it is the dense closed form: the columns of
P there solve the same system. R^2, xi and the exponents are those of model/closed_form.py.

The K x K systems of some items are gathered from the rows of G as these are computed: row i is
spread out once, and every system that has item i reads its K + 1 numbers. What does not fit
together takes another pass over G.

Shapes: I items, J this rank's items, n items of a pass, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_vasp.model.co_occurrence import CoOccurrence
from dist_vasp.model.kinds.ease import EaseKeys
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_reduce

_LEAST_BYTES = 1 << 30  # of the systems of a pass
_BYTES_PER_INTERACTION = 32  # of the systems of a pass, where that is more
_SOLVED_BYTES = 1 << 25  # of the systems that are solved together


def items_of_a_pass(n_interactions: int, width: int, word: int) -> int:
    """How many items' systems are in memory together."""
    room = max(_LEAST_BYTES, _BYTES_PER_INTERACTION * n_interactions)
    return max(1, room // (word * width * (width + 1)))


def passes(n: int, counts: CoOccurrence, width: int, keys: EaseKeys, ranks: Ranks) -> range:
    """Where each pass over `n` items of this rank begins; as many on every rank. All ranks call
    it together."""
    most = int(all_reduce(torch.tensor(n, device=ranks.device), ranks.world, "max"))
    return range(0, most, items_of_a_pass(counts.n_interactions, width, _dtype(keys).itemsize))


def _dtype(keys: EaseKeys) -> torch.dtype:
    return {"fp32": torch.float32, "fp64": torch.float64}[keys.ease_dtype]


@dataclass(frozen=True)
class Ridge:
    """What the keys of the closed form add to G, and multiply its solution by.

    squares_I: R^2 of each item. factor_I: an item's factor as an output, its inverse as an input.
    """

    squares_I: np.ndarray
    factor_I: np.ndarray

    @staticmethod
    def of(counts: CoOccurrence, keys: EaseKeys) -> Ridge:
        """The ridge of the keys `model.ease_*`."""
        popularity_I, dropout = counts.popularity_I, keys.ease_dropout
        relative_I = np.maximum(popularity_I, 1) / popularity_I.mean()
        squares_I = keys.ease_lambda * relative_I**keys.ease_lambda_exponent
        squares_I += counts.diagonal_I * (dropout / (1 - dropout))
        return Ridge(squares_I, relative_I**keys.ease_item_exponent)


def solve_on_support(
    counts: CoOccurrence,
    ids_JK: np.ndarray,
    weight_JK: Tensor,
    start: int,
    keys: EaseKeys,
    ranks: Ranks,
    tick: Callable[[int], None] = lambda done: None,
    rows_n: np.ndarray | None = None,
    solved: Callable[[np.ndarray], None] = lambda rows: None,
) -> None:
    """Write the B of the supports `ids_JK` of the items from `start` on into `weight_JK`.

    rows_n: the rows of `ids_JK` that are solved, ascending; None: all.

    Raises AgreedError on every rank where a system is singular in its precision. `tick(stretches
    of G done)` is called after each stretch of each pass, on every rank as often, and
    `solved(rows)` after each pass with the rows that it has written.
    """
    ridge, dtype = Ridge.of(counts, keys), _dtype(keys)
    rows_n = np.arange(len(ids_JK)) if rows_n is None else rows_n
    K = ids_JK.shape[1]
    firsts, done = passes(len(rows_n), counts, K, keys, ranks), 0
    room_nKT = torch.empty((min(firsts.step, len(rows_n)), K, K + 1), dtype=dtype)
    for first in firsts:
        of_pass = rows_n[first : first + firsts.step]
        with agreed(ranks):
            room = room_nKT[: len(of_pass)]
            systems = Systems(ids_JK[of_pass], start + of_pass, counts.n_items, room)
        for stretch in counts.stretches():
            with agreed(ranks):
                systems.gather(counts, *stretch)
            tick(done := done + 1)
        with agreed(ranks):
            together = max(1, _SOLVED_BYTES // (dtype.itemsize * K * K))
            for a in range(0, len(of_pass), together):
                some = slice(a, a + together)
                b_nK = _solve(systems, some, counts, ridge, keys.ease_xi)
                weight_JK[torch.from_numpy(of_pass[some])] = b_nK.to(weight_JK)
        solved(of_pass)


class Systems:
    """G_SS and, as the last column, G_Sj of the items `item_n`: (n, K, K + 1) numbers that
    `gather` writes."""

    def __init__(
        self, ids_nK: np.ndarray, item_n: np.ndarray, n_items: int, systems_nKT: Tensor
    ) -> None:
        self.ids_nK, self.item_n, self.systems_nKT = ids_nK, item_n, systems_nKT
        self._of_item_I = np.zeros(n_items, systems_nKT.numpy().dtype)
        self._targets_nT = np.concatenate([ids_nK.astype(np.int64), item_n[:, None]], axis=1)
        # the entries of all supports by their input item, and where those of an item begin
        self._order = np.argsort(ids_nK, axis=None, kind="stable")
        self._bounds = np.searchsorted(ids_nK.reshape(-1)[self._order], np.arange(n_items + 1))

    def gather(self, counts: CoOccurrence, start: int, stop: int) -> None:
        """Write what the rows [start, stop) of G hold."""
        n, K = self.ids_nK.shape
        rows = self.systems_nKT.numpy().reshape(n * K, K + 1)
        of_item_I = self._of_item_I
        for first, block in counts.groups(start, stop):
            for k in range(block.shape[0]):
                entries = self._order[self._bounds[first + k] : self._bounds[first + k + 1]]
                if len(entries):
                    of_row = slice(block.indptr[k], block.indptr[k + 1])
                    of_item_I[block.indices[of_row]] = block.data[of_row]
                    rows[entries] = of_item_I[self._targets_nT[entries // K]]
                    of_item_I[block.indices[of_row]] = 0


def _solve(systems: Systems, some: slice, counts: CoOccurrence, ridge: Ridge, xi: float) -> Tensor:
    """B_Sj of some of the systems: (n, K). ValueError where one is not positive definite."""
    ids_nK, systems_nKT = systems.ids_nK[some], systems.systems_nKT[some]
    own, dtype, K = systems.item_n[some], systems_nKT.dtype, ids_nK.shape[1]
    A_nKK, right_nK = systems_nKT[:, :, :K].clone(), systems_nKT[:, :, K]
    torch.diagonal(A_nKK, dim1=1, dim2=2).add_(torch.from_numpy(ridge.squares_I[ids_nK]).to(dtype))
    L_nKK, info_n = torch.linalg.cholesky_ex(A_nKK)
    if info_n.any():
        item = own[int(info_n.nonzero()[0, 0])]
        raise ValueError(
            "the Gram matrix plus model.ease_lambda is not positive definite on the support of "
            f"item row {item} in {str(dtype).removeprefix('torch.')}; raise model.ease_lambda or "
            "set model.ease_dtype to fp64"
        )
    b_nK = torch.cholesky_solve(right_nK[:, :, None], L_nKK)[:, :, 0]
    if xi:
        squares_n = torch.from_numpy(ridge.squares_I[own])
        left_n = torch.from_numpy(counts.diagonal_I[own]) + squares_n
        left_n -= (right_nK * b_nK).sum(dim=1).double()
        b_nK *= torch.clamp(squares_n / left_n, min=1 - xi).to(dtype)[:, None]
    factor_I = ridge.factor_I
    return b_nK * torch.from_numpy(factor_I[own][:, None] / factor_I[ids_nK]).to(dtype)
