"""Co-occurrence counts of a large catalogue: rows of the sparse Gram matrix, some at a time.

    G = X^T W X,  X (U, I) users and items,  W users' weights on the diagonal

At a million items G has billions of entries, so it never exists whole. Its rows are sparse products
of a few rows of X^T with X.

Shapes: U users, I items, R rows of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import scipy.sparse

from dist_vasp.data.rows import Rows

STRETCHES = 64  # of the items; ranks agree between two of them whether to go on
_MOST_ENTRIES = 1 << 23  # of the rows of a group, unless it is a single row
_PRODUCTS_OF_A_CALL = 1000  # they take as long as what is done once for each row


class CoOccurrence:
    """The Gram matrix of the training users, read by rows.

    users: their items. weight_U: what each user counts, (U,) float64; None: 1. Holds 16 bytes for
    each interaction.
    """

    def __init__(self, users: Rows, n_items: int, weight_U: np.ndarray | None = None) -> None:
        self.n_items, self.n_interactions = n_items, len(users.items)
        dtype = np.float32 if weight_U is None else np.float64
        ones = np.ones(len(users.items), dtype)
        shape = (users.n_rows, n_items)
        self._x_UI = scipy.sparse.csr_matrix((ones, users.items, users.indptr), shape=shape)
        self._xT_IU = self._x_UI.T.tocsr()
        products_I = self._xT_IU @ users.lengths
        if weight_U is not None:
            self._xT_IU.data = weight_U[self._xT_IU.indices]
        self.popularity_I = np.diff(self._xT_IU.indptr).astype(np.float64)
        """Training users of each item."""
        self.diagonal_I = np.asarray(self._xT_IU.sum(axis=1)).reshape(-1).astype(np.float64)
        """The diagonal of G: the weights of each item's users."""
        self._products_I = products_I
        self._entries_I = np.minimum(products_I, n_items)  # at most

    def equal_work(self, start: int, stop: int, n: int) -> list[int]:
        """n + 1 bounds that cut the items [start, stop) into ranges whose rows cost the same."""
        done = np.cumsum(self._products_I[start:stop] + _PRODUCTS_OF_A_CALL)
        ends = [done[-1] * (k + 1) / n for k in range(n - 1)] if len(done) else [0] * (n - 1)
        return [start, *(start + int(np.searchsorted(done, end)) for end in ends), stop]

    def stretches(self) -> Iterator[tuple[int, int]]:
        """The items in STRETCHES ranges whose rows cost the same."""
        return pairwise(self.equal_work(0, self.n_items, STRETCHES))

    def groups(self, start: int, stop: int) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
        """(first item, rows (R, I) of G) of the items [start, stop), in order; the indices of a row
        are not sorted."""
        ends = np.cumsum(self._entries_I[start:stop])
        first = start
        while first < stop:
            before = ends[first - start - 1] if first > start else 0
            n = int(np.searchsorted(ends, before + _MOST_ENTRIES, side="right"))
            last = max(first + 1, start + n)
            yield first, self._xT_IU[first:last] @ self._x_UI
            first = last
