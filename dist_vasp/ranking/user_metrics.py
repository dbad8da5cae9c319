"""Metrics of each user's list (docs/metrics.md).

Shapes: U users, K length of a list, I items of the vocabulary. A list holds item rows, best first,
and is padded with -1 where fewer unseen items exist. `hit_UK` says which of them are in the user's
target (`hits`). A user with an empty target is not scored (NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dist_vasp.config.metric_names import DEFAULT_METRICS, Metric
from dist_vasp.data.rows import Rows


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


def recall_at_k(hit_UK: np.ndarray, held_out: Rows, k: int, denominator: str = "min") -> np.ndarray:
    """Return the hits among the first k divided by min(k, held-out items), (U,) float64.

    denominator `held_out` divides by the held-out items (He et al. 2020, LightGCN). NaN where the
    target is empty.
    """
    n_hits = hit_UK[:, :k].sum(axis=1)
    return _divide(
        n_hits, held_out.lengths if denominator == "held_out" else np.minimum(k, held_out.lengths)
    )


def ndcg_at_k(hit_UK: np.ndarray, held_out: Rows, k: int) -> np.ndarray:
    """Return DCG / ideal DCG, (U,) float64, NaN where the target is empty.

    DCG is the sum of 1 / log2(rank + 2) over the hits, with ranks from 0 and below k. The ideal DCG
    has min(k, held-out items) hits at the top (Järvelin and Kekäläinen 2002).
    """
    discounts = 1 / np.log2(np.arange(k) + 2)
    hit = hit_UK[:, :k]
    dcg = (hit * discounts[: hit.shape[1]]).sum(axis=1)
    ideal = np.concatenate([[0.0], np.cumsum(discounts)])[np.minimum(k, held_out.lengths)]
    return _divide(dcg, ideal)


def precision_at_k(hit_UK: np.ndarray, held_out: Rows, k: int) -> np.ndarray:
    """Return the hits among the first k divided by k, (U,) float64, NaN where the target is
    empty."""
    n_hits: np.ndarray = hit_UK[:, :k].sum(axis=1)
    return _scored(np.divide(n_hits, k), held_out)


def hit_rate_at_k(hit_UK: np.ndarray, held_out: Rows, k: int) -> np.ndarray:
    """Return 1 where there is a hit among the first k, else 0, (U,) float64, NaN where the target
    is empty."""
    n_hits: np.ndarray = hit_UK[:, :k].sum(axis=1)
    return _scored((n_hits > 0).astype(np.float64), held_out)


def reciprocal_rank_at_k(hit_UK: np.ndarray, held_out: Rows, k: int) -> np.ndarray:
    """Return 1 / rank of the first hit, ranks from 1 to k, or 0 without one, (U,) float64.

    NaN where the target is empty (Voorhees 1999).
    """
    hit = hit_UK[:, :k]
    reciprocal = hit / (np.arange(hit.shape[1]) + 1)
    return _scored(reciprocal.max(axis=1, initial=0.0), held_out)


def average_precision_at_k(hit_UK: np.ndarray, held_out: Rows, k: int) -> np.ndarray:
    """Return the sum over the hits among the first k of the precision at the hit, divided by the
    held-out items, (U,) float64.

    NaN where the target is empty. As `map_cut` of trec_eval.
    """
    hit = hit_UK[:, :k]
    precision = np.cumsum(hit, axis=1) / (np.arange(hit.shape[1]) + 1)
    return _divide((hit * precision).sum(axis=1), held_out.lengths)


def novelty_at_k(topk_ids: np.ndarray, self_information: np.ndarray, k: int) -> np.ndarray:
    """Return the mean self-information of the first k items in bits, (U,) float64.

    self_information (I,), see `self_information_of`. NaN where the list is empty (Zhou et al. 2010,
    "novelty").
    """
    first = topk_ids[:, :k]
    listed = first >= 0
    bits = np.where(listed, self_information[np.maximum(first, 0)], 0.0)
    return _divide(bits.sum(axis=1), listed.sum(axis=1))


def self_information_of(popularity: np.ndarray, n_users: int) -> np.ndarray:
    """Return -log2 of the fraction of training users that have each item, (I,) float64 in bits.

    popularity (I,): training users of each item. An item without one counts as having one.
    """
    return np.log2(max(n_users, 1)) - np.log2(np.maximum(popularity, 1))


def _divide(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.divide(values, by, out=np.full(len(values), np.nan), where=by > 0)


def _scored(values: np.ndarray, held_out: Rows) -> np.ndarray:
    return np.where(held_out.lengths > 0, values, np.nan)


_OF_TARGET: dict[str, Callable[[np.ndarray, Rows, int], np.ndarray]] = {
    "ndcg": ndcg_at_k,
    "precision": precision_at_k,
    "hr": hit_rate_at_k,
    "mrr": reciprocal_rank_at_k,
    "map": average_precision_at_k,
}


@dataclass(frozen=True)
class UserMetrics:
    """Computes the metrics of each user; those of all lists together are passed over.

    recall_denominator: min or held_out, see `recall_at_k`. self_information: (I,), needed by
    novelty alone.
    """

    metrics: Sequence[Metric] = DEFAULT_METRICS
    recall_denominator: str = "min"
    self_information: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        return [str(metric) for metric in self.metrics if not metric.of_all_lists]

    def of_target(self, topk_ids: np.ndarray, held_out: Rows) -> dict[str, np.ndarray]:
        """Return each metric that has a target, (U,) float64, NaN where the target is empty.

        topk_ids (U, K); held_out of U rows.
        """
        hit_UK = self._hits(topk_ids, held_out)
        return {
            str(metric): self._one(metric, topk_ids, hit_UK, held_out)
            for metric in self.metrics
            if metric.of_target
        }

    def of_user(self, topk_ids: np.ndarray, held_out: Rows) -> dict[str, np.ndarray]:
        """Return each metric of each user, (U,) float64, in the order of `names`."""
        hit_UK = self._hits(topk_ids, held_out)
        return {
            str(metric): self._one(metric, topk_ids, hit_UK, held_out)
            for metric in self.metrics
            if not metric.of_all_lists
        }

    def _hits(self, topk_ids: np.ndarray, held_out: Rows) -> np.ndarray:
        """The hits among as many items as some metric needs: found once for all of them."""
        longest = max((metric.k for metric in self.metrics if metric.of_target), default=0)
        return hits(topk_ids[:, :longest], held_out)

    def _one(
        self, metric: Metric, topk_ids: np.ndarray, hit_UK: np.ndarray, held_out: Rows
    ) -> np.ndarray:
        if metric.name == "recall":
            return recall_at_k(hit_UK, held_out, metric.k, self.recall_denominator)
        if metric.name == "novelty":
            assert self.self_information is not None
            return novelty_at_k(topk_ids, self.self_information, metric.k)
        return _OF_TARGET[metric.name](hit_UK, held_out, metric.k)
