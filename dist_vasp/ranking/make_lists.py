"""Make top-k lists of the histories that a Python caller passed, on one process.

Shapes: U users, K length of a list, I items.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from dist_vasp.data.items import ItemTable
from dist_vasp.model.sparse import ItemRows
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from dist_vasp.ranking.evaluate import Scorer, popularity_scorer, top_items
from dist_vasp.ranking.given import Given
from dist_vasp.ranking.listable import Listable
from dist_vasp.ranking.scoring import Model
from dist_vasp.ranking.topk import NO_ITEM

USERS_PER_PASS = 4096  # users that go through the blocks of W together (docs/experiments.md)


def one_rank() -> Ranks:
    """Return the only rank of a process that no launcher started, on the CPU."""
    return form_groups(0, Layout(1, 1, 1), torch.device("cpu"))


def make_lists(
    model: Model,
    items: ItemTable,
    given: Given,
    listable: Listable,
    k: int,
    mask_input: bool = True,
    popular: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores float32, item rows int64), (U, K) each, padded with NaN and -1.

    Users without a like get no list, except those of `popular`, (U,) bool: their list is of the
    most popular items, and a score is the number of training interactions of its item.
    """
    n_users = given.rows.n_rows
    rows = np.full((n_users, k), NO_ITEM, np.int64)
    scores = np.full((n_users, k), np.nan, np.float32)
    by_model: Scorer = partial(model.scores, allowed_I=listable.everyone)
    for block in _passes(given.rows.lengths > 0):
        found, rows[block] = _top(by_model, model.n_items, given, listable, k, mask_input, block)
        scores[block] = np.exp(found) if model.is_probability else found
    if popular is not None:
        counts = popularity_scorer(items, one_rank())
        for block in _passes(popular):
            found, rows[block] = _top(counts, model.n_items, given, listable, k, mask_input, block)
            scores[block] = found
    scores[rows == NO_ITEM] = np.nan
    return scores, rows


def _passes(chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the chosen users, (U,) bool, in passes."""
    users = np.flatnonzero(chosen)
    for start in range(0, len(users), USERS_PER_PASS):
        yield users[start : start + USERS_PER_PASS]


def _top(
    scorer: Scorer,
    n_items: int,
    given: Given,
    listable: Listable,
    k: int,
    mask_input: bool,
    users: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (scores, item rows) of these users' lists, (U, K) each."""
    likes = given.rows.take(users)
    seen = likes if given.seen is given.rows else given.seen.take(users)

    def masked(x: ItemRows) -> Iterator[tuple[int, torch.Tensor]]:
        return listable.masked(scorer(x), users, n_items)

    return top_items(masked, likes, k, n_items, one_rank(), mask_input, seen)
