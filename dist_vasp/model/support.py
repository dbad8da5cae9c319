"""The support of a sparse item-to-item matrix: the K input items that each output item keeps.

    support of j = the K items i != j with the largest cosine n_ij / sqrt(n_i n_j)

n_ij users have both items, and n_i have item i. Equal cosines go to the lower item row: among items
that no user has together with j, to the most popular ones. So every support has min(K, I - 1)
items, and that of K = I - 1 is the whole column.

For one j the order is that of n_ij^2 / n_i, one division of whole numbers: equal cosines are equal
in float64, and every layout finds the same support.

Shapes: I items, J items of a range, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dist_vasp.model.co_occurrence import CoOccurrence

STRETCHES = 64  # of a rank's items; ranks agree between two of them whether to go on


def support_width(neighbours: int, n_items: int) -> int:
    """The input items that each output item keeps: K, or all others where there are fewer."""
    return max(1, min(neighbours, n_items - 1))


def choose_support(
    counts: CoOccurrence,
    start: int,
    stop: int,
    width: int,
    tick: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """The support of the items [start, stop): (J, K) int32 item rows, ascending.

    counts: of unweighted users. `tick(items done)` is called STRETCHES times, on every rank as
    often.
    """
    ids_JK = np.empty((stop - start, width), np.int32)
    for stretch in range(STRETCHES):
        lo = start + stretch * (stop - start) // STRETCHES
        hi = start + (stretch + 1) * (stop - start) // STRETCHES
        for first, rows in counts.groups(lo, hi):
            for k in range(rows.shape[0]):
                of_row = slice(rows.indptr[k], rows.indptr[k + 1])
                ids_JK[first - start + k] = _nearest(
                    first + k, rows.indices[of_row], rows.data[of_row], counts, width
                )
        tick(hi - start)
    return ids_JK


def _nearest(
    item: int, others: np.ndarray, n: np.ndarray, counts: CoOccurrence, width: int
) -> np.ndarray:
    """The support of one item (K,), from the items that users have together with it, and how many
    users do."""
    apart = others != item
    others, n = others[apart], n[apart].astype(np.float64)
    if len(others) > width:
        closeness = n * n / counts.popularity_I[others]
        least = np.partition(closeness, -width)[-width]
        above, equal = others[closeness > least], others[closeness == least]
        equal.sort()
        others = np.concatenate([above, equal[: width - len(above)]])
    elif len(others) < width:
        most_popular = np.arange(width + 1, dtype=others.dtype)
        free = np.setdiff1d(most_popular, np.append(others, item), assume_unique=True)
        others = np.concatenate([others, free[: width - len(others)]])
    return np.sort(others)
