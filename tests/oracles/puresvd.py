"""The oracle of `puresvd`: numpy's singular value decomposition of the dense, weighted matrix."""

from __future__ import annotations

import numpy as np


def weights(
    x: np.ndarray, rank: int, user_exponent: float = 0.0, item_exponent: float = 0.0
) -> np.ndarray:
    """The matrix of items x items that a history is multiplied by, for 0/1 users x (U, I)."""
    lengths, popularity = x.sum(axis=1), x.sum(axis=0)
    of_users = (np.maximum(lengths, 1) / lengths.mean()) ** (user_exponent / 2)
    of_items = (np.maximum(popularity, 1) / popularity.mean()) ** item_exponent
    values, V = np.linalg.svd(of_users[:, None] * x * of_items, full_matrices=False)[1:]
    V = V[:rank][values[:rank] > 1e-9 * values[0]]
    return of_items[:, None] * (V.T @ V) / of_items
