"""The oracle of the closed form: each column of B as a small problem of its own, in dense numpy.

It shares no formula with dist_vasp/model/closed_form.py: a column whose ridge regression has too
large a diagonal is solved again with the diagonal fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Problem:
    """minimise |W (X - X B)|^2 + |R B|^2 subject to B_jj <= xi."""

    G: np.ndarray
    ridge_I: np.ndarray
    xi: float

    def solution(self) -> np.ndarray:
        """B with its diagonal."""
        A = self.G + np.diag(self.ridge_I)
        return np.stack([self._column(A, j) for j in range(len(A))], axis=1)

    def _column(self, A: np.ndarray, j: int) -> np.ndarray:
        free = np.linalg.solve(A, self.G[:, j])
        if free[j] <= self.xi:
            return free
        others = np.arange(len(A)) != j
        b = np.empty(len(A))
        b[j] = self.xi
        right = self.G[others, j] - A[others, j] * self.xi
        b[others] = np.linalg.solve(A[np.ix_(others, others)], right)
        return b


def problem(x: np.ndarray, keys: dict[str, float]) -> Problem:
    """The problem of 0/1 users x (U, I), for keys without their prefix `ease_`."""
    lengths, popularity = x.sum(axis=1), x.sum(axis=0)
    weights = (lengths / lengths.mean()) ** keys.get("user_exponent", 0.0)
    G = x.T @ (weights[:, None] * x)
    share = keys.get("dropout", 0.0)
    relative = np.maximum(popularity, 1) / popularity.mean()
    ridge_I = keys["lambda"] * relative ** keys.get("lambda_exponent", 0.0)
    return Problem(G, ridge_I + np.diag(G) * share / (1 - share), keys.get("xi", 0.0))


def weights(x: np.ndarray, keys: dict[str, float]) -> np.ndarray:
    """B as it is stored: for raw histories, with a zero diagonal."""
    B = problem(x, keys).solution()
    scale = (np.maximum(x.sum(axis=0), 1) / x.sum(axis=0).mean()) ** keys.get("item_exponent", 0.0)
    B = np.diag(1 / scale) @ B @ np.diag(scale)
    np.fill_diagonal(B, 0)
    return B
