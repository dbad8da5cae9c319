"""Metrics of all users' lists together, from how often each item is listed (docs/metrics.md).

Shapes: U users, K length of a list, I items of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_vasp.config.metric_names import Metric


def coverage(counts: np.ndarray) -> float:
    """Return the fraction of items that are in any list; counts (I,): lists that hold each item."""
    return float((counts > 0).mean())


def gini(counts: np.ndarray) -> float:
    """Return the Gini index of how often the items are listed; counts (I,).

    0 where all items are listed equally often, 1 where one item is listed alone: sum over the items
    by ascending count of (2 j - I - 1) counts_j / ((I - 1) sum of counts), j from 1 (Shani and
    Gunawardana 2011, section 3.3.1). 0 where nothing is listed, or I is 1.
    """
    n_items, total = len(counts), int(counts.sum())
    if total == 0 or n_items < 2:
        return 0.0
    weights = 2 * np.arange(1, n_items + 1) - n_items - 1
    return int((weights * np.sort(counts)).sum()) / ((n_items - 1) * total)


def diversity(counts: np.ndarray, n_lists: int) -> float | None:
    """Return 1 less the mean overlap of two users' lists; counts (I,), of `n_lists` lists.

    The overlap is the number of common items, divided by the mean length of the lists. With lists
    of equal length it is the personalization of Zhou et al. 2010. c lists that hold an item form
    c (c - 1) / 2 pairs that share it, so no pair of users is visited. None for fewer than two
    lists.
    """
    total = int(counts.sum())
    if n_lists < 2 or total == 0:
        return None
    shared = int((counts * (counts - 1)).sum())
    return 1 - shared / ((n_lists - 1) * total)


class ListCounts:
    """Counts in how many lists each item is, block by block; one number per item and length."""

    def __init__(self, n_items: int, metrics: Sequence[Metric]) -> None:
        self._metrics = [metric for metric in metrics if metric.of_all_lists]
        self._n_lists = 0
        self._counts = {metric.k: np.zeros(n_items, np.int64) for metric in self._metrics}

    def update(self, topk_ids: np.ndarray) -> None:
        """Add the lists of a block of users, (U, K) item rows, padded with -1."""
        self._n_lists += int((topk_ids >= 0).any(axis=1).sum())
        for k, counts in self._counts.items():
            first = topk_ids[:, :k]
            counts += np.bincount(first[first >= 0], minlength=len(counts))

    def result(self) -> dict[str, float | None]:
        """Return each metric of all lists."""
        return {str(metric): self._one(metric) for metric in self._metrics}

    def _one(self, metric: Metric) -> float | None:
        counts = self._counts[metric.k]
        if metric.name == "coverage":
            return coverage(counts)
        if metric.name == "gini":
            return gini(counts)
        return diversity(counts, self._n_lists)
