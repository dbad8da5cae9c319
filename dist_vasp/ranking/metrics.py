"""The metrics of an evaluation: means over users with standard errors, and those of all lists.

Shapes: U users, K length of a list, I items of the vocabulary (DESIGN.md, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_vasp.config.metric_names import Metric, shown_metrics
from dist_vasp.data.rows import Rows
from dist_vasp.ranking.list_metrics import ListCounts
from dist_vasp.ranking.user_metrics import UserMetrics


class RankingMetrics:
    """Collects metrics block by block; holds a few numbers per user and per item."""

    def __init__(self, n_items: int, of_users: UserMetrics | None = None) -> None:
        self._of_users = of_users or UserMetrics()
        self._lists = ListCounts(n_items, self._of_users.metrics)
        self._values: dict[str, list[np.ndarray]] = {name: [] for name in self._of_users.names}
        self._n_users = self._n_scored = 0
        self._ratings: tuple[float, int] | None = None

    def update(self, topk_ids: np.ndarray, held_out: Rows) -> None:
        """Add a block of users; topk_ids (U, K), K at least the longest list that a metric needs or
        I; held_out of U rows."""
        topk_ids = np.asarray(topk_ids)
        self._n_users += held_out.n_rows
        self._n_scored += int((held_out.lengths > 0).sum())
        self._lists.update(topk_ids)
        for name, values in self._of_users.of_user(topk_ids, held_out).items():
            self._values[name].append(values)

    def add_ratings(self, squared_error: float, n: float) -> None:
        """Add n held-out ratings, and the sum of the squared errors of their scores."""
        self._ratings = squared_error, int(n)

    def per_user(self) -> dict[str, np.ndarray]:
        """Return each metric of each user, (n,) float64, in the order in which they were added."""
        return {name: np.concatenate([np.empty(0), *parts]) for name, parts in self._values.items()}

    def result(self) -> dict[str, float | int | None]:
        """Return the means over users, their standard errors, the metrics of all lists, and counts.

        A standard error (`_se`) is the sample standard deviation / sqrt(n), None for fewer than two
        users. Without scored users every metric is None.
        """
        out: dict[str, float | int | None] = {}
        for name, values in self.per_user().items():
            known = values[~np.isnan(values)] if self._n_scored else values[:0]
            n = len(known)
            out[name] = float(known.mean()) if n else None
            out[f"{name}_se"] = float(known.std(ddof=1)) / math.sqrt(n) if n > 1 else None
        for name, value in self._lists.result().items():
            out[name] = value if self._n_scored else None
        if self._ratings is not None:
            squared_error, n = self._ratings
            out["rmse"] = math.sqrt(squared_error / n) if n else None
            out["n_ratings"] = n
        out["n_users"] = self._n_scored
        out["n_users_unscored"] = self._n_users - self._n_scored
        return out


def summary(metrics: dict[str, Any], asked: Sequence[Metric] = ()) -> str:
    """Return `NDCG@100 0.4081 +- 0.0056, Recall@20 0.3490, ...` of a result, for people.

    The standard error is that of the first metric.
    """
    if not metrics["n_users"]:
        return "no user has a target"
    told = [_told(metric, metrics) for metric in shown_metrics(tuple(asked))]
    error = metrics.get(f"{shown_metrics(tuple(asked))[0]}_se")
    if error is not None:
        told[0] += f" +- {error:.4f}"
    if metrics.get("rmse") is not None:
        told.append(f"RMSE {metrics['rmse']:.4f}")
    return f"{', '.join(told)} ({metrics['n_users']} users)"


def _told(metric: Metric, metrics: dict[str, Any]) -> str:
    value = metrics[str(metric)]
    if value is None:
        return f"{metric.title} -"
    return f"{metric.title} {value:.{3 if metric.of_all_lists else 4}f}"
