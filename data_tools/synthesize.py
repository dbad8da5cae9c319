"""Generate synthetic implicit feedback of any size, with long tails and latent tastes.

    python -m data_tools.synthesize OUT.parquet --users N --items N --interactions N [--seed S]

It stands in for data that may not be shared. A user draws items without replacement from

    p(i) = sum over k of m_k t_k(i)

where m is a sparse mixture over N_TASTES tastes and, with weight POPULAR, the popularity of all
items. Every item belongs to one taste and, with less weight, to a second. Weights within a taste
have a long tail. Users are drawn in blocks, each from its own generator, so that a seed gives the
same file on every machine.

Shapes: U users of a block, K tastes, I items, E draws.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools import cli
from dist_vasp import command_line
from dist_vasp.files import new_file
from dist_vasp.progress import Progress

USERS_PER_BLOCK = 2048
N_TASTES = 24
TASTES_PER_USER = 3
POPULAR = 0.05  # fraction of a user's draws that follow popularity alone
# log-normal: a mean of 123 items has a median of 89 and a maximum of about 4,000 in 463,435 users
ACTIVITY_SIGMA = 0.8
POPULARITY_SIGMA = 1.6
SECOND_TASTE = 0.1  # weight of an item in its second taste
DRAW_ROUNDS = 6
_WRITTEN_BY = {b"written_by": b"data_tools.synthesize"}  # --overwrite replaces no other file
SCHEMA = pa.schema([("user", pa.int64()), ("item", pa.int64())], _WRITTEN_BY)


def activity(users: int, items: int, interactions: int, rng: np.random.Generator) -> np.ndarray:
    """Return the number of items of each user, (users,) int64, which sum to `interactions`.

    The distribution has a long tail, from min(5, the mean) to `items`.
    """
    low = min(5, interactions // users)
    shape = np.exp(ACTIVITY_SIGMA * rng.standard_normal(users))
    small, large = 0.0, 1.0
    while np.clip(shape * large, low, items).sum() < interactions and large < 1e18:
        large *= 2
    for _ in range(100):
        middle = (small + large) / 2
        small, large = (
            (middle, large)
            if np.clip(shape * middle, low, items).sum() < interactions
            else (small, middle)
        )
    counts = np.clip(shape * large, low, items).astype(np.int64)
    order = rng.permutation(users)
    while (missing := interactions - int(counts.sum())) != 0:
        room = order[counts[order] < items] if missing > 0 else order[counts[order] > low]
        counts[room[: abs(missing)]] += np.sign(missing)
    return counts


@dataclass(frozen=True)
class Tastes:
    """The distributions of items in each taste; the last taste is popularity.

    `cumulative` holds one distribution function after another, that of taste k in [k, k+1).
    """

    cumulative: np.ndarray  # ((K+1)*I,) float64, ascending
    probability: np.ndarray  # (K+1, I) float32
    first: np.ndarray  # (I,) int64: the taste that each item belongs to most

    @staticmethod
    def draw(items: int, rng: np.random.Generator) -> Tastes:
        weight = np.exp(POPULARITY_SIGMA * rng.standard_normal(items))
        size = rng.dirichlet(np.full(N_TASTES, 5.0))
        first, second = rng.choice(N_TASTES, items, p=size), rng.integers(0, N_TASTES, items)
        probability = np.full((N_TASTES + 1, items), 1e-9)
        np.add.at(probability, (second, np.arange(items)), SECOND_TASTE * weight)
        np.add.at(probability, (first, np.arange(items)), weight)
        probability[N_TASTES] = weight
        probability /= probability.sum(1, keepdims=True)
        cumulative = np.cumsum(probability, 1)
        cumulative /= cumulative[:, -1:]
        return Tastes(
            (cumulative + np.arange(N_TASTES + 1)[:, None]).ravel(),
            probability.astype(np.float32),
            first,
        )

    def sample(self, taste: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return one item for every entry of `taste`, (E,) int64."""
        position = np.searchsorted(self.cumulative, taste + rng.random(len(taste)), side="right")
        items = self.probability.shape[1]
        return np.minimum(position - taste * items, items - 1)


def mixtures(users: int, rng: np.random.Generator) -> np.ndarray:
    """Return the weight of each taste for each user, (U, K+1): TASTES_PER_USER tastes and
    popularity are above zero."""
    mixture = np.zeros((users, N_TASTES + 1))
    chosen = rng.random((users, N_TASTES)).argpartition(TASTES_PER_USER, 1)[:, :TASTES_PER_USER]
    weights = rng.dirichlet(np.ones(TASTES_PER_USER), users) * (1 - POPULAR)
    np.put_along_axis(mixture, chosen, weights, 1)
    mixture[:, N_TASTES] = POPULAR
    return mixture


def draw_block(
    counts: np.ndarray, tastes: Tastes, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `counts[u]` distinct items for each user u; return users (ascending) and items, each
    (E,) int64.

    Items are drawn with replacement; repeated ones are dropped and drawn again, which gives the
    same distribution as drawing without replacement. Users who need so much of the catalogue that
    this takes too many rounds get the rest by Gumbel top-k.
    """
    items = tastes.probability.shape[1]
    mixture = mixtures(len(counts), rng)
    cumulative = (np.cumsum(mixture, 1) + np.arange(len(counts))[:, None]).ravel()
    pairs = np.empty(0, np.int64)  # user * items + item, ascending
    for _ in range(DRAW_ROUNDS):
        missing = counts - np.bincount(pairs // items, minlength=len(counts))
        if not missing.any():
            break
        user = np.repeat(np.arange(len(counts)), missing + (missing > 0))
        taste = np.searchsorted(cumulative, user + rng.random(len(user)), side="right") - user * (
            N_TASTES + 1
        )
        fresh = user * items + tastes.sample(np.minimum(taste, N_TASTES), rng)
        _, first = np.unique(fresh, return_index=True)
        fresh = fresh[np.sort(first)]
        if len(pairs):
            nearest = np.minimum(np.searchsorted(pairs, fresh), len(pairs) - 1)
            fresh = fresh[pairs[nearest] != fresh]
        user = fresh // items  # still ascending: draws were made user by user
        rank = np.arange(len(user)) - np.searchsorted(user, user)
        pairs = np.sort(np.concatenate([pairs, fresh[rank < missing[user]]]))
    missing = counts - np.bincount(pairs // items, minlength=len(counts))
    rest = [pairs]
    for u in np.flatnonzero(missing):
        first, last = np.searchsorted(pairs, (u * items, (u + 1) * items))
        chosen = pairs[first:last] - u * items
        gumbel = np.log(mixture[u] @ tastes.probability) + rng.gumbel(size=items)
        gumbel[chosen] = -np.inf
        rest.append(u * items + np.argpartition(-gumbel, missing[u] - 1)[: missing[u]])
    pairs = np.sort(np.concatenate(rest))
    return pairs // items, pairs % items


@dataclass(frozen=True)
class Catalogue:
    """What is drawn before the interactions."""

    counts: np.ndarray  # (users,) int64: interactions of each user
    tastes: Tastes
    user_ids: np.ndarray  # (users,) int64, from 1
    item_ids: np.ndarray  # (I,) int64, from 1

    @staticmethod
    def draw(users: int, items: int, interactions: int, seed: int) -> Catalogue:
        rng = np.random.default_rng([seed, 0])
        counts = activity(users, items, interactions, rng)
        tastes = Tastes.draw(items, rng)
        return Catalogue(counts, tastes, rng.permutation(users) + 1, rng.permutation(items) + 1)


def blocks(users: int, items: int, interactions: int, seed: int) -> Iterator[pa.RecordBatch]:
    """Yield the data set in blocks of users: columns `user` and `item`, ids from 1."""
    drawn = Catalogue.draw(users, items, interactions, seed)
    counts, tastes, user_ids, item_ids = drawn.counts, drawn.tastes, drawn.user_ids, drawn.item_ids
    for block, start in enumerate(range(0, users, USERS_PER_BLOCK)):
        user, item = draw_block(
            counts[start : start + USERS_PER_BLOCK], tastes, np.random.default_rng([seed, 1, block])
        )
        yield pa.record_batch(
            [pa.array(user_ids[start + user]), pa.array(item_ids[item])], schema=SCHEMA
        )


def synthesize(
    path: Path, users: int, items: int, interactions: int, seed: int, overwrite: bool = False
) -> None:
    """Write the Parquet file; ValueError for too many or too few interactions."""
    if interactions > users * items:
        raise ValueError(
            f"--interactions {interactions} is more than the {users * items} pairs of {users} "
            f"users and {items} items; "
            f"pass at most {users * items}"
        )
    if interactions < users:
        raise ValueError(
            f"--interactions {interactions} leaves some of the {users} users without any; pass at "
            f"least {users}"
        )
    progress = Progress("drawing", interactions, "interaction", brief=True)
    opened = new_file(path, "", overwrite, _ours, make_parents=True)
    with opened as file, progress, pq.ParquetWriter(file, SCHEMA) as writer:
        for batch in blocks(users, items, interactions, seed):
            writer.write_batch(batch)
            progress.add(len(batch))


def _ours(path: Path) -> bool:
    return _WRITTEN_BY.items() <= (pq.read_schema(path).metadata or {}).items()


def parser() -> command_line.Parser:
    parser = command_line.Parser(
        prog=command_line.program("synthesize", "python -m data_tools.{}"),
        description="Write synthetic implicit feedback.",
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT.parquet",
        help="file to write: columns user, item; also as --output OUT.parquet",
    )
    parser.add_argument(
        "--users",
        type=command_line.at_least(1),
        required=True,
        help="number of users; each has an interaction",
    )
    parser.add_argument(
        "--items",
        type=command_line.at_least(1),
        required=True,
        help="size of the catalogue; rare items may stay unused",
    )
    parser.add_argument(
        "--interactions",
        type=command_line.at_least(1),
        required=True,
        help="exact number of distinct pairs",
    )
    parser.add_argument("--seed", type=command_line.seed, default=0, help="default 0")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.parquet if it exists")
    return parser


def _command(args: argparse.Namespace) -> int:
    start = time.monotonic()
    synthesize(args.output, args.users, args.items, args.interactions, args.seed, args.overwrite)
    seconds = time.monotonic() - start
    print(
        f"{args.output}: {args.interactions:,} interactions of {args.users:,} users with "
        f"{args.items:,} items, {seconds:.1f} s"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(parser(), _command, argv, last_word="--output")


if __name__ == "__main__":
    sys.exit(main())
