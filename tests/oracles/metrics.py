"""Every ranking metric as straight-line Python over lists of item rows, from docs/metrics.md.

A list is best first and may be shorter than k; a target is a set. None: not defined.
"""

from __future__ import annotations

import itertools
import math


def ndcg(listed: list[int], target: set[int], k: int) -> float | None:
    if not target:
        return None
    gain = sum(1 / math.log2(rank + 2) for rank, item in enumerate(listed[:k]) if item in target)
    return gain / sum(1 / math.log2(rank + 2) for rank in range(min(k, len(target))))


def recall(listed: list[int], target: set[int], k: int, denominator: str = "min") -> float | None:
    if not target:
        return None
    n = len(target) if denominator == "held_out" else min(k, len(target))
    return len(set(listed[:k]) & target) / n


def precision(listed: list[int], target: set[int], k: int) -> float | None:
    return len(set(listed[:k]) & target) / k if target else None


def hr(listed: list[int], target: set[int], k: int) -> float | None:
    if not target:
        return None
    return 1.0 if any(item in target for item in listed[:k]) else 0.0


def mrr(listed: list[int], target: set[int], k: int) -> float | None:
    if not target:
        return None
    for rank, item in enumerate(listed[:k], start=1):
        if item in target:
            return 1 / rank
    return 0.0


def average_precision(listed: list[int], target: set[int], k: int) -> float | None:
    if not target:
        return None
    total = 0.0
    for rank in range(1, min(k, len(listed)) + 1):
        if listed[rank - 1] in target:
            total += len(set(listed[:rank]) & target) / rank
    return total / len(target)


def novelty(listed: list[int], popularity: list[int], n_users: int, k: int) -> float | None:
    first = listed[:k]
    if not first:
        return None
    return sum(-math.log2(max(popularity[item], 1) / n_users) for item in first) / len(first)


def coverage(lists: list[list[int]], n_items: int, k: int) -> float:
    return len({item for listed in lists for item in listed[:k]}) / n_items


def gini(lists: list[list[int]], n_items: int, k: int) -> float:
    """Half the mean absolute difference of two items' shares, over all ordered pairs, scaled so
    that one item alone gives 1."""
    counts = [sum(item in listed[:k] for listed in lists) for item in range(n_items)]
    total = sum(counts)
    if total == 0 or n_items < 2:
        return 0.0
    differences = sum(abs(a - b) for a in counts for b in counts)
    return differences / (2 * (n_items - 1) * total)


def diversity(lists: list[list[int]], k: int) -> float | None:
    """1 less the mean number of common items of two lists over the mean length, pair by pair."""
    cut = [set(listed[:k]) for listed in lists if listed]
    pairs = list(itertools.combinations(cut, 2))
    if not pairs:
        return None
    common = sum(len(a & b) for a, b in pairs) / len(pairs)
    return 1 - common / (sum(len(one) for one in cut) / len(cut))
