"""Recall@k, NDCG@k and coverage of lists (DESIGN.md, section 7; Liang et al. 2018, section 4.2).

Shapes: U users, K length of a list, I items of the vocabulary. A list holds item rows, best first,
and is padded with -1 where fewer unseen items exist. A user with an empty target is not scored
(NaN).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dist_vasp.data.rows import Rows

_COVERAGE_K = 100


def hits(topk_ids: np.ndarray, held_out: Rows) -> np.ndarray:
    """Return which listed items are in the user's target, (U, K) bool.

    topk_ids (U, K) integer; held_out of U rows.
    """
    n_users = len(topk_ids)
    assert held_out.n_rows == n_users, (held_out.n_rows, n_users)
    stride = max(int(topk_ids.max(initial=0)), int(held_out.items.max(initial=0))) + 1
    targets = held_out.row_of * stride + held_out.items  # ascending
    listed = np.arange(n_users, dtype=np.int64)[:, None] * stride + topk_ids
    if len(targets) == 0:
        return np.zeros(listed.shape, bool)
    nearest = targets[np.minimum(np.searchsorted(targets, listed), len(targets) - 1)]
    return (nearest == listed) & (topk_ids >= 0)


def recall_at_k(
    topk_ids: np.ndarray, held_out: Rows, k: int, denominator: str = "min"
) -> np.ndarray:
    """Return the hits among the first k divided by min(k, held-out items), (U,) float64.

    denominator `held_out` divides by the held-out items (He et al. 2020, LightGCN). NaN where the
    target is empty.
    """
    n_hits = hits(topk_ids[:, :k], held_out).sum(axis=1)
    return _divide(
        n_hits, held_out.lengths if denominator == "held_out" else np.minimum(k, held_out.lengths)
    )


def ndcg_at_k(topk_ids: np.ndarray, held_out: Rows, k: int) -> np.ndarray:
    """Return DCG / ideal DCG, (U,) float64, NaN where the target is empty.

    DCG is the sum of 1 / log2(rank + 2) over the hits, with ranks from 0 and below k. The ideal DCG
    has min(k, held-out items) hits at the top.
    """
    discounts = 1 / np.log2(np.arange(k) + 2)
    hit = hits(topk_ids[:, :k], held_out)
    dcg = (hit * discounts[: hit.shape[1]]).sum(axis=1)
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(k, held_out.lengths)]
    return _divide(dcg, ideal)


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(values, by, out=np.full(len(values), np.nan), where=by > 0)


def coverage(listed: np.ndarray) -> float:
    """Return the fraction of items that are in any list; listed (I,) bool."""
    return float(listed.mean())


# (top-k ids, targets, denominator of recall) -> (U,)
_METRICS: dict[str, Callable[[np.ndarray, Rows, str], np.ndarray]] = {
    "ndcg@100": lambda ids, held_out, _: ndcg_at_k(ids, held_out, 100),
    "ndcg@20": lambda ids, held_out, _: ndcg_at_k(ids, held_out, 20),
    "recall@20": lambda ids, held_out, denominator: recall_at_k(ids, held_out, 20, denominator),
    "recall@50": lambda ids, held_out, denominator: recall_at_k(ids, held_out, 50, denominator),
}


def user_metrics(
    topk_ids: np.ndarray, held_out: Rows, recall_denominator: str = "min"
) -> dict[str, np.ndarray]:
    """Return each metric of each user, (U,) float64, NaN where the target is empty.

    topk_ids (U, K); held_out of U rows.
    """
    return {
        name: metric(topk_ids, held_out, recall_denominator) for name, metric in _METRICS.items()
    }


class RankingMetrics:
    """Collects metrics block by block; holds a few numbers per user and one flag per item.

    `recall_denominator`: min or held_out, see `recall_at_k`.
    """

    def __init__(self, n_items: int, recall_denominator: str = "min") -> None:
        self._denominator = recall_denominator
        self._listed = np.zeros(n_items, bool)
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in _METRICS}

    def update(self, topk_ids: np.ndarray, held_out: Rows) -> None:
        """Add a block of users; topk_ids (U, K), K at least min(100, I); held_out of U rows."""
        topk_ids = np.asarray(topk_ids)
        first = topk_ids[:, :_COVERAGE_K]
        self._listed[first[first >= 0]] = True
        for name, values in user_metrics(topk_ids, held_out, self._denominator).items():
            self._values[name].append(values)

    def per_user(self) -> dict[str, np.ndarray]:
        """Return each metric of each user, (n,) float64, in the order in which they were added."""
        return {name: np.concatenate([np.empty(0), *parts]) for name, parts in self._values.items()}

    def result(self) -> dict[str, float | int | None]:
        """Return the means over scored users, their standard errors, coverage and counts.

        A standard error (`_se`) is the sample standard deviation / sqrt(n), None for fewer than two
        users. Without scored users every metric is None.
        """
        out: dict[str, float | int | None] = {}
        n_scored = n_users = 0
        for name, values in self.per_user().items():
            scored = values[~np.isnan(values)]
            n_scored, n_users = len(scored), len(values)
            out[name] = float(scored.mean()) if n_scored else None
            out[f"{name}_se"] = (
                float(scored.std(ddof=1)) / math.sqrt(n_scored) if n_scored > 1 else None
            )
        out[f"coverage@{_COVERAGE_K}"] = coverage(self._listed) if n_scored else None
        out["n_users"] = n_scored
        out["n_users_unscored"] = n_users - n_scored
        return out


def summary(metrics: dict[str, Any]) -> str:
    """Return `NDCG@100 0.4081 +- 0.0056, Recall@20 0.3490, ...` of a result, for people."""
    if not metrics["n_users"]:
        return "no user has a target"
    error = metrics["ndcg@100_se"]
    return (
        f"NDCG@100 {metrics['ndcg@100']:.4f}{f' +- {error:.4f}' if error is not None else ''}, "
        f"Recall@20 {metrics['recall@20']:.4f}, Recall@50 {metrics['recall@50']:.4f}, "
        f"coverage@100 {metrics['coverage@100']:.3f} ({metrics['n_users']} users)"
    )
