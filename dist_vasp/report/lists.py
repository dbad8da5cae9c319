"""What a model recommends to test users: by popularity of the items, and in full for a few users.

Shapes: U users, I items, K length of a list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse

from dist_vasp.data.held_out import EvalBlock, evaluation_blocks
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows
from dist_vasp.data.users import read_users
from dist_vasp.recommender import Explanation, Id, Recommender
from dist_vasp.report.measured import Measured, Measuring

DECILES = 10
SLOTS = 20  # of each list that count as seen by a user
COVERAGE_K = 100
_USERS_PER_BLOCK = 512


@dataclass(frozen=True)
class Popularity:
    """By decile of the catalogue, the most popular tenth of the items first: shares that add up to
    1."""

    recommended: list[float]  # of the first SLOTS places of all lists
    trained: list[float]  # of the training interactions
    held_out: list[float]  # of the held-out items, what the users took in fact
    coverage: dict[int, float]  # by list length, the share of the catalogue in anybody's list
    n_users: int


@dataclass(frozen=True)
class Pick:
    """One place of a list."""

    label: str
    held_out: bool
    why: Explanation | None
    score: float


@dataclass(frozen=True)
class Sample:
    """One test user: the history, popular items first, and the list.

    With `by_time` the latest items of the history come first.
    """

    user: str
    past: list[Id]
    history: list[str]  # labels of `past`
    n_held_out: int
    picks: list[Pick] = field(default_factory=list)
    by_time: bool = False

    @property
    def has_deep(self) -> bool:
        """Whether the deep paths have a say in a score of the list."""
        return any(pick.why and pick.why.p_flvae is not None for pick in self.picks)

    @property
    def has_shallow(self) -> bool:
        """Whether the shallow path has a say in a score of the list."""
        return any(pick.why and pick.why.p_nease is not None for pick in self.picks)


@dataclass(frozen=True)
class Lists:
    """What the model of one run recommends; without it `why_not` says why."""

    popularity: Popularity | None = None
    measured: Measured | None = None
    samples: list[Sample] = field(default_factory=list)
    why_not: str = ""


@dataclass(frozen=True)
class Wanted:
    """Which lists a report makes: those of `n_users` test users are counted, `n_samples` of them
    are shown with `k` items each."""

    n_users: int = 2000
    n_samples: int = 3
    k: int = 10


def make_lists(
    recommender: Recommender,
    shards: str,
    wanted: Wanted,
    progress: Callable[[int, int], None],
    name: str = "model",
    recall_denominator: str = "min",
) -> Lists:
    """Return the lists of the first test users: by popularity, their metrics, and some in full.

    Validation users where there are no test users. ValueError where the shards belong to another
    catalogue, or hold no such user.
    """
    manifest = Manifest.load(shards)
    if manifest.vocabulary_sha256 != recommender.vocabulary_sha256:
        raise ValueError(
            f"{shards} is not the data that the model was trained on; pass --shards with the "
            "folder that is"
        )
    split = "test" if manifest.splits["test"].users else "validation"
    total = min(wanted.n_users, manifest.splits[split].users)
    if not total:
        raise ValueError(f"{shards} has neither test nor validation users")
    decile = decile_of(recommender.n_items)
    popularity = recommender.items.popularity
    recommended, held_out = np.zeros(DECILES), np.zeros(DECILES)
    listed = {
        SLOTS: np.zeros(recommender.n_items, bool),
        COVERAGE_K: np.zeros(recommender.n_items, bool),
    }
    measuring = Measuring(popularity, SLOTS, recall_denominator)
    kept: list[EvalBlock] = []
    done = 0
    for block in evaluation_blocks(shards, split, _USERS_PER_BLOCK, stop=total):
        kept.append(block)
        rows = recommender.recommend(_matrix(block.fold_in, recommender.n_items), COVERAGE_K).rows
        for length, seen in listed.items():
            seen[rows[:, :length][rows[:, :length] >= 0]] = True
        first = rows[:, :SLOTS]
        measuring.add(block, rows)
        recommended += np.bincount(decile[first[first >= 0]], minlength=DECILES)
        held_out += np.bincount(decile[block.held_out.items], minlength=DECILES)
        done += block.fold_in.n_rows
        progress(done, total)
    trained = np.bincount(decile, weights=popularity, minlength=DECILES)
    deciles = Popularity(
        _shares(recommended),
        _shares(trained),
        _shares(held_out),
        {n: float(seen.mean()) for n, seen in listed.items()},
        done,
    )
    keys, ids = read_users(shards, split, manifest)
    id_of = dict(zip(keys.tolist(), ids.to_pylist(), strict=True))
    samples = _samples(recommender, kept, id_of, wanted.n_samples, wanted.k)
    measured = measuring.result(name, shards, split, manifest.splits[split].users)
    return Lists(deciles, measured, samples)


def decile_of(n_items: int) -> np.ndarray:
    """Return the tenth of the catalogue that each item row is in, (I,)."""
    return np.arange(n_items) * DECILES // max(n_items, 1)


def _shares(counts: np.ndarray) -> list[float]:
    total = counts.sum()
    return [float(c / total) if total else 0.0 for c in counts]


def _matrix(rows: Rows, n_items: int) -> scipy.sparse.csr_matrix:
    return scipy.sparse.csr_matrix(
        (np.ones(len(rows.items), np.int8), rows.items, rows.indptr), shape=(rows.n_rows, n_items)
    )


def _samples(
    recommender: Recommender, blocks: list[EvalBlock], ids: dict[int, Id], n: int, k: int
) -> list[Sample]:
    """Return users with a short, a middling and a long history: quantiles of its length.

    They are chosen among those who have held-out items.
    """
    users = [
        (int(block.fold_in.lengths[u]), int(block.user_keys[u]), b, u)
        for b, block in enumerate(blocks)
        for u in range(block.fold_in.n_rows)
        if block.fold_in.lengths[u] and block.held_out.lengths[u]
    ]
    users.sort()
    chosen = {users[int((2 * i + 1) * len(users) / (2 * n))] for i in range(n)} if users else set()
    return [
        _sample(recommender, blocks[b], u, str(ids.get(key, key)), k)
        for _, key, b, u in sorted(chosen)
    ]


def _sample(recommender: Recommender, block: EvalBlock, u: int, user: str, k: int) -> Sample:
    history, target = (
        rows.items[rows.indptr[u] : rows.indptr[u + 1]] for rows in (block.fold_in, block.held_out)
    )
    past = [recommender.items.ids[int(row)].as_py() for row in history]
    found = recommender.recommend([past], k)
    picks = []
    for row, item, score in zip(found.rows[0], found.ids[0], found.scores[0], strict=True):
        if row >= 0:
            own = item.item() if isinstance(item, np.generic) else item
            why = recommender.explain(past, own, 3)
            picks.append(
                Pick(label(recommender, own), bool(np.isin(row, target)), why, float(score))
            )
    labels = [label(recommender, item) for item in past]
    return Sample(user, past, labels, len(target), picks)


def label(recommender: Recommender, item: Id) -> str:
    """Return an item's title, else its id."""
    return recommender.title(item) or f"item {item}"
