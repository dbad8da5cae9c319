"""The support of a sparse item-to-item matrix: the K input items that each output item keeps.

    support of j = the K items i != j with the largest cosine n_ij / sqrt(n_i n_j)

n_ij users have both items, and n_i have item i. Equal cosines go to the lower item row: among items
that no user has together with j, to the most popular ones. So every support has min(K, I - 1)
items, and that of K = I - 1 is the whole column.

For one j the order is that of n_ij^2 / n_i, one division of whole numbers: equal cosines are equal
in float64, and every layout finds the same support.

Shapes: I items, J items of a range, n items of a part, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from dist_vasp.model.co_occurrence import CoOccurrence
from dist_vasp.parallel.comm import Ranks, all_gather


def support_width(neighbours: int, n_items: int) -> int:
    """The input items that each output item keeps: K, or all others where there are fewer."""
    return max(1, min(neighbours, n_items - 1))


def choose_support(
    counts: CoOccurrence, width: int, ranks: Ranks, stretches: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (first item, supports (n, K)) of each of `stretches`; all ranks iterate.

    counts: of unweighted users. stretches: ranges of items, the same on all ranks. Every rank
    chooses for an equal part of the work, not for its own items: the first items are popular, and
    their rows of G are the long ones.
    """
    for lo, hi in stretches:
        bounds = counts.equal_work(lo, hi, ranks.world_size)
        own_nK = supports_of(counts, bounds[ranks.rank], bounds[ranks.rank + 1], width)
        yield lo, _joined(own_nK, bounds, ranks)


def _joined(own_nK: np.ndarray, bounds: list[int], ranks: Ranks) -> np.ndarray:
    """The supports of all ranks' items, in order."""
    sizes = np.diff(bounds)
    padded = torch.zeros((max(1, sizes.max()), own_nK.shape[1]), dtype=torch.int32)
    padded[: len(own_nK)] = torch.from_numpy(own_nK)
    gathered = all_gather(padded[None].to(ranks.device), ranks.world).cpu().numpy()
    return np.concatenate([rows[:n] for rows, n in zip(gathered, sizes, strict=True)])


def supports_of(counts: CoOccurrence, start: int, stop: int, width: int) -> np.ndarray:
    """The support of the items [start, stop): (J, K) int32 item rows, ascending."""
    ids_JK = np.empty((stop - start, width), np.int32)
    for first, rows in counts.groups(start, stop):
        for k in range(rows.shape[0]):
            of_row = slice(rows.indptr[k], rows.indptr[k + 1])
            ids_JK[first - start + k] = _nearest(
                first + k, rows.indices[of_row], rows.data[of_row], counts, width
            )
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
