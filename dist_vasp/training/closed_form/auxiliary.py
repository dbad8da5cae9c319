"""Weaker interactions of the training users (`data.auxiliary`): views beside purchases, or all
ratings beside the high ones.

    X_ui = 1 where data.shards holds the pair, model.ease_auxiliary where only data.auxiliary does

They lie in a second data folder, split in any way. Of all its splits those interactions count whose
user is a training user of `data.shards` and whose item is in its vocabulary; users and items are
the same where their ids are. Nothing of a held-out user is used.

A weight for each kind of feedback is the confidence of Hu, Koren and Volinsky (2008, section 4).
Theirs multiplies an error; here the value stands in X, so a pair of weak interactions counts its
square in G = X^T X.

Shapes: U training users, B users of a block, A items of the second folder, E interactions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dist_vasp.config.schema import Config
from dist_vasp.data.block import Block
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import SPLITS, Manifest
from dist_vasp.data.rows import Rows
from dist_vasp.data.shard import read_shard
from dist_vasp.data.users import read_users
from dist_vasp.progress import Progress


class Overlap:
    """Which users and items of `data.auxiliary` are training users and items of `data.shards`.

    ValueError where there are none of either, or where a held-out user of `data.shards` is a
    training user, too: what is held out of that user could lie in the second folder.
    """

    def __init__(self, config: Config, manifest: Manifest) -> None:
        shards, self.folder = config.data.shards, Path(config.data.auxiliary)
        with _named():
            self.manifest = Manifest.load(self.folder)
            theirs = load_items(self.folder, self.manifest)
            users = [read_users(self.folder, split, self.manifest) for split in SPLITS]
        self.n_items = manifest.n_items
        if self.manifest.data_sha256 == manifest.data_sha256:
            raise ValueError(
                f"data.auxiliary {self.folder} has the same interactions as data.shards {shards}; "
                "name a folder with more of them, or leave it out"
            )
        keys, user_ids = read_users(shards, "train", manifest)
        self.keys_U = np.sort(keys)
        for split in SPLITS[1:]:
            if (places(self.keys_U, read_users(shards, split, manifest)[0]) >= 0).any():
                raise ValueError(
                    f"data.auxiliary is {self.folder}, but training users of {shards} are "
                    f"{split} users, too, and what is held out of them could be in it; expected "
                    "shards of --protocol liang or hashed, or no data.auxiliary"
                )
        items = load_items(shards, manifest)
        order = np.argsort(items.keys)
        found_A = places(items.keys[order], theirs.keys)
        self.item_A = np.where(found_A >= 0, order[found_A], -1)
        theirs_too = np.isin(self.keys_U, np.concatenate([keys for keys, _ in users]))
        self.n_users = int(theirs_too.sum())
        if not self.n_users or (found_A < 0).all():
            what, ours, other = "item", items.ids, theirs.ids
            if not self.n_users:
                what, ours = "training user", user_ids
                other = max((ids for _, ids in users), key=len)
            known = f"ids such as {other[0].as_py()!r:.40}" if len(other) else "none"
            raise ValueError(
                f"data.auxiliary: no {what} of {shards}, such as {ours[0].as_py()!r:.40}, is in "
                f"{self.folder}, which has {known}; shard both from files that spell ids alike"
            )


class Auxiliary:
    """The interactions of the second folder that may count, by user, in memory: 4 bytes each.

    ValueError where a file of the folder is damaged.
    """

    def __init__(self, overlap: Overlap, show: bool = False) -> None:
        self._overlap = overlap
        folder, of = overlap.folder, overlap.manifest
        shards = [(split, entry) for split in SPLITS for entry in of.splits[split].shards]
        n_items, pairs = overlap.n_items, [np.empty(0, np.int64)]  # user * n_items + item
        title = "auxiliary interactions"
        with Progress(title, len(shards), "shard", show=show, brief=True) as progress:
            for split, entry in shards:
                block = read_shard(folder, split, entry, of.n_items)
                user_B = places(overlap.keys_U, block.user_keys)
                for rows in (block.rows, block.held_out):
                    if rows is not None:
                        user_E, item_E = user_B[rows.row_of], overlap.item_A[rows.items]
                        kept_E = (user_E >= 0) & (item_E >= 0)
                        pairs.append(user_E[kept_E] * n_items + item_E[kept_E])
                progress.add(1)
        pairs_E = np.concatenate(pairs)
        pairs.clear()
        pairs_E.sort()
        # protocol given writes the same history into each split of a user
        pairs_E = pairs_E[np.diff(pairs_E, prepend=-1) > 0]
        self._rows = _rows_of(pairs_E, len(overlap.keys_U), n_items)

    def told(self) -> str:
        """What of the folder counts, in a line for the user."""
        of = self._overlap
        return (
            f"data.auxiliary: {len(self._rows.items):,} pairs in {of.folder} are of training users "
            f"({of.n_users:,} of {len(of.keys_U):,}) and items of data.shards; those that "
            "data.shards does not hold count model.ease_auxiliary each"
        )

    def joined(self, block: Block, value: float) -> Rows:
        """The rows of training users, and what else they have here: 1 and `value`."""
        own, n_items = block.rows, self._overlap.n_items
        more = self._rows.take(places(self._overlap.keys_U, block.user_keys))
        own_E = own.row_of * n_items + own.items
        more_E = more.row_of * n_items + more.items
        more_E = more_E[places(own_E, more_E) < 0]
        values = np.ones(len(own_E) + len(more_E), np.float32)
        values[len(own_E) :] = value
        pairs_E = np.concatenate([own_E, more_E])
        order = np.argsort(pairs_E)
        return _rows_of(pairs_E[order], own.n_rows, n_items, values[order])


def _rows_of(
    pairs_E: np.ndarray, n_rows: int, n_items: int, values: np.ndarray | None = None
) -> Rows:
    """The rows of ascending pairs, each row * n_items + item; overwrites the pairs."""
    indptr = np.searchsorted(pairs_E, np.arange(n_rows + 1) * n_items)
    pairs_E %= n_items
    return Rows(indptr, pairs_E.astype(np.int32), values)


@contextmanager
def _named() -> Iterator[None]:
    """Errors name the key."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"data.auxiliary: {error}") from None


def places(ascending: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted value stands in an ascending array, int64; -1 where it does not."""
    if not len(ascending):
        return np.full(len(wanted), -1)
    found = np.searchsorted(ascending, wanted).clip(max=len(ascending) - 1)
    return np.where(ascending[found] == wanted, found, -1)
