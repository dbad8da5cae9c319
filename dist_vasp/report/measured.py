"""How good the lists of a report are: metrics of each user for the model and for popularity, in
total and by popularity of the items.

Shapes: U users, I items, K length of a list.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dist_vasp.compare.statistics import Estimate, Scores
from dist_vasp.config.metric_names import parse_metrics
from dist_vasp.data.held_out import EvalBlock
from dist_vasp.data.rows import Rows
from dist_vasp.ranking.per_user import THIRDS, keep_items, popularity_thirds
from dist_vasp.ranking.user_metrics import UserMetrics, hits

QUALITY = {"ndcg@100": "NDCG@100", "recall@20": "Recall@20"}
POPULARITY = "popularity"


@dataclass(frozen=True)
class Third:
    """A third of the training interactions: head, middle or tail of the catalogue."""

    name: str
    n_items: int
    held_out: float  # fraction of the held-out items
    recommended: float  # fraction of the first places of all lists
    quality: dict[str, Estimate]  # by metric, of the held-out items in this third
    of_popularity: dict[str, Estimate]


@dataclass(frozen=True)
class Measured:
    """The metrics of the users whose lists were counted: `split` has `n_split` users in all.

    shards: the data folder that they were read from.
    """

    model: Scores
    popularity: Scores
    thirds: list[Third]
    shards: str
    split: str
    n_split: int


class Measuring:
    """Collects the metrics of users, block by block.

    popularity (I,): training interactions of each item. slots: places of a list that count as
    recommended. recall_denominator: `min` or `held_out`.
    """

    def __init__(self, popularity: np.ndarray, slots: int, recall_denominator: str) -> None:
        self._of_users = UserMetrics(parse_metrics(",".join(QUALITY), ""), recall_denominator)
        self._third_of = popularity_thirds(popularity)
        self._by_popularity = np.argsort(-popularity, kind="stable")
        self._slots = slots
        self._keys: list[np.ndarray] = []
        self._of_model: list[dict[str, np.ndarray]] = []
        self._of_popularity: list[dict[str, np.ndarray]] = []
        self._recommended, self._held_out = np.zeros(len(THIRDS)), np.zeros(len(THIRDS))

    def add(self, block: EvalBlock, rows_UK: np.ndarray) -> None:
        """Add the users of a block with the model's lists. Users without a history are not
        scored: no list can be made for them."""
        target = block.held_out.where((block.fold_in.lengths > 0)[block.held_out.row_of])
        self._keys.append(block.user_keys)
        self._of_model.append(self._scores(rows_UK, target))
        popular_UK = popular_items(self._by_popularity, block.fold_in, rows_UK.shape[1])
        self._of_popularity.append(self._scores(popular_UK, target))
        first = rows_UK[:, : self._slots]
        n = len(THIRDS)
        self._recommended += np.bincount(self._third_of[first[first >= 0]], minlength=n)
        self._held_out += np.bincount(self._third_of[target.items], minlength=n)

    def _scores(self, rows_UK: np.ndarray, target: Rows) -> dict[str, np.ndarray]:
        found = self._of_users.of_target(rows_UK, target)
        for number, third in enumerate(THIRDS):
            part = keep_items(target, self._third_of == number)
            of_third = self._of_users.of_target(rows_UK, part)
            found |= {f"{name}_{third}": values for name, values in of_third.items()}
        return found

    def result(self, name: str, shards: str, split: str, n_split: int) -> Measured:
        """Return the metrics of all users that were added, under the model's name."""
        model = self._stacked(name, self._of_model)
        popularity = self._stacked(POPULARITY, self._of_popularity)
        thirds = [
            Third(
                third,
                int((self._third_of == number).sum()),
                float(self._held_out[number] / max(self._held_out.sum(), 1)),
                float(self._recommended[number] / max(self._recommended.sum(), 1)),
                {key: model.estimate(f"{key}_{third}") for key in QUALITY},
                {key: popularity.estimate(f"{key}_{third}") for key in QUALITY},
            )
            for number, third in enumerate(THIRDS)
        ]
        return Measured(model, popularity, thirds, shards, split, n_split)

    def _stacked(self, name: str, blocks: list[dict[str, np.ndarray]]) -> Scores:
        columns = {key: np.concatenate([one[key] for one in blocks])[None] for key in blocks[0]}
        return Scores(name, (0,), np.concatenate(self._keys), columns)


def popular_items(by_popularity: np.ndarray, history: Rows, k: int) -> np.ndarray:
    """Return the k most popular items that each user does not know, (U, K), padded with -1.

    by_popularity (I,): item rows, the most popular first. history of U rows.
    """
    n_candidates = min(len(by_popularity), k + int(history.lengths.max(initial=0)))
    candidates = np.tile(by_popularity[:n_candidates], (history.n_rows, 1))
    known = hits(candidates, history)
    order = np.argsort(known, axis=1, kind="stable")[:, :k]
    listed = np.take_along_axis(candidates, order, axis=1)
    listed[np.take_along_axis(known, order, axis=1)] = -1
    missing = k - listed.shape[1]
    return np.pad(listed, ((0, 0), (0, max(missing, 0))), constant_values=-1)
