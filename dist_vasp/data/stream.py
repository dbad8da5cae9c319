"""Shards -> batches in the fixed order of DESIGN.md, section 4 ("Reading for training").

The users of an epoch form one sequence: shards permuted by (seed, epoch), users within each by
(seed, epoch, shard). The sequence is cut into `lanes` equal pieces that are read side by side; rank
r reads its share of the lanes. What a step holds is a pure function of its number, so ranks and
workers change nothing and a resume needs only the number.

Shapes: U users of the split, S steps of an epoch, B rows of this rank's batch, E interactions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_vasp.data.augment import keep_inputs, split_halves
from dist_vasp.data.hashing import permutation
from dist_vasp.data.items import load_items
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, concatenate_rows, indptr_of
from dist_vasp.data.shard import read_shard
from dist_vasp.data.workers import ReadAhead

_SPARE_SHARDS = 4  # decoded shards kept beyond one per lane


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step.

    With halves a user gives two consecutive rows, (A -> B) then (B -> A); without, one row x -> x.
    Input dropout leaves items out of the inputs, never out of the targets. Rows are not padded.
    """

    epoch: int
    step: int  # steps before this one, over the whole run
    inputs: Rows  # B rows
    targets: Rows  # B rows
    user_keys: np.ndarray  # (B,) uint64, the user of each row
    lane_rows: tuple[
        tuple[int, int], ...
    ]  # (lane, rows) in the order the rows lie; lanes without rows are left out
    n_users: int  # on this rank
    global_users: int  # over all ranks
    global_rows: int  # N: over all ranks
    padded_rows: int  # the largest B over all ranks


class TrainStream:
    """The training users of a data folder as batches, for one rank.

    batch_size: users per step over all ranks (an even share: a step has fewer than 3 users more or
    less than U/S, so at most batch_size + 2). lanes: pieces that are read side by side. Raises
    ValueError where the folder, or the combination of batch_size, lanes and world_size, cannot be
    trained on.
    """

    def __init__(
        self,
        folder: str | Path,
        batch_size: int,
        lanes: int = 48,
        seed: int = 0,
        halves: bool = True,
        rank: int = 0,
        world_size: int = 1,
        input_dropout: float = 0.0,
    ) -> None:
        assert 0 <= input_dropout < 1, input_dropout
        assert 0 <= rank < world_size, (rank, world_size)
        if batch_size < 1:
            raise ValueError(f"data.batch_size is {batch_size}, expected at least 1 user per step")
        if lanes < 1:
            raise ValueError(
                f"parallel.lanes is {lanes}, expected at least 1; choose a multiple of the number "
                "of ranks"
            )
        if lanes % world_size:
            raise ValueError(
                f"parallel.lanes is {lanes} but {world_size} ranks do not divide it; "
                f"choose a multiple of {world_size} or another number of ranks"
            )
        if lanes > batch_size:
            raise ValueError(
                f"parallel.lanes is {lanes} but data.batch_size is {batch_size}, expected at "
                "least one user per lane; "
                f"lower parallel.lanes or raise data.batch_size"
            )
        self.folder, self.seed, self.halves, self.input_dropout = (
            Path(folder),
            seed,
            halves,
            input_dropout,
        )
        self.rank, self.world_size, self.lanes = rank, world_size, lanes
        self.manifest = Manifest.load(folder)
        self.n_users = self.manifest.splits["train"].users
        self.n_items = self.manifest.n_items
        if self.n_users < 1:
            raise ValueError(
                f"{folder} has no training users; prepare the data with fewer val_users and "
                "test_users"
            )
        self.steps_per_epoch = -(-self.n_users // batch_size)
        self._item_keys = load_items(folder, self.manifest).keys
        self._shards = self.manifest.splits["train"].shards

        bounds = np.arange(lanes + 1) * self.n_users // lanes
        self._lane_starts, self._lane_users = bounds[:-1], np.diff(bounds)
        self._phases = np.arange(lanes) * self.steps_per_epoch // lanes
        per_rank = lanes // world_size
        self._my_lanes = range(rank * per_rank, (rank + 1) * per_rank)
        self._epoch_order: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        self._cache: OrderedDict[tuple[int, int], tuple[np.ndarray, Rows]] = OrderedDict()

    # --- order ------------------------------------------------------------------------------------

    def _given(self, s: int) -> np.ndarray:
        """c(s) = (s * n_l + (l * S) // lanes) // S: users that each lane has given before step s of
        an epoch. (lanes,)"""
        return (s * self._lane_users + self._phases) // self.steps_per_epoch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards in order, (n,), and the position at which each starts, (n+1,)."""
        if self._epoch_order[0] != epoch:
            order = permutation(len(self._shards), self.seed, epoch)
            users = np.array([self._shards[shard].users for shard in order], np.int64)
            self._epoch_order = (epoch, order, indptr_of(users))
        return self._epoch_order[1:]

    def _pieces(self, epoch: int, first: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Positions first to stop of the epoch's sequence as (shard, from, to) within the permuted
        shards."""
        order, starts = self._order(epoch)
        while first < stop:
            slot = int(np.searchsorted(starts, first, side="right")) - 1
            end = min(stop, int(starts[slot + 1]))
            yield int(order[slot]), first - int(starts[slot]), end - int(starts[slot])
            first = end

    # --- shards -----------------------------------------------------------------------------------

    def _shard(self, epoch: int, shard: int) -> tuple[np.ndarray, Rows]:
        """User keys and rows of one shard in the order of `epoch`; kept until no lane reads it."""
        key = (epoch, shard)
        if key not in self._cache:
            block = read_shard(self.folder, "train", self._shards[shard], self.n_items)
            order = permutation(block.n_users, self.seed, epoch, shard)
            self._cache[key] = (block.user_keys[order], block.rows.take(order))
        self._cache.move_to_end(key)
        return self._cache[key]

    def _evict(self, used: int) -> None:
        """Forget the shards used longest ago, but none of the `used` ones of this step: the next
        step reads them on."""
        while len(self._cache) > max(used, len(self._my_lanes) + _SPARE_SHARDS):
            self._cache.popitem(last=False)

    # --- batches ----------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """This rank's batch of global step `step` (steps before it, from 0).

        ValueError where a shard is damaged.
        """
        epoch, s = divmod(step, self.steps_per_epoch)
        before, users = self._given(s), self._given(s + 1) - self._given(s)  # (lanes,)
        pieces = []
        for lane in self._my_lanes:
            first = int(self._lane_starts[lane] + before[lane])
            pieces += list(self._pieces(epoch, first, first + int(users[lane])))

        keys, parts = [np.empty(0, np.uint64)], []
        for shard, start, stop in pieces:
            shard_keys, shard_rows = self._shard(epoch, shard)
            keys.append(shard_keys[start:stop])
            parts.append(shard_rows.slice(start, stop))
        self._evict(len({shard for shard, _, _ in pieces}))
        user_keys, rows = np.concatenate(keys), concatenate_rows(parts)

        per_user = 2 if self.halves else 1
        if self.halves:
            in_a = split_halves(
                user_keys, rows.indptr, self._item_keys[rows.items], self.seed, epoch
            )
            inputs, targets = _both_ways(rows, in_a)
        else:
            inputs = targets = rows
        user_keys = np.repeat(user_keys, per_user)
        if self.input_dropout:
            keys_E = self._item_keys[inputs.items]
            inputs = inputs.where(
                keep_inputs(user_keys, inputs.indptr, keys_E, self.input_dropout, self.seed, epoch)
            )
        return Batch(
            epoch=epoch,
            step=step,
            inputs=inputs,
            targets=targets,
            user_keys=user_keys,
            lane_rows=tuple(
                (lane, per_user * int(users[lane])) for lane in self._my_lanes if users[lane]
            ),
            n_users=len(rows.lengths),
            global_users=int(users.sum()),
            global_rows=per_user * int(users.sum()),
            padded_rows=per_user * int(users.reshape(self.world_size, -1).sum(axis=1).max()),
        )

    def batches(
        self, start: int, stop: int, workers: int
    ) -> Generator[Batch, None, None] | ReadAhead[Batch]:
        """The batches of the global steps start to stop, in order, read ahead by `workers`
        processes (0: none).

        Workers start now, with nothing decoded, and live as long as the iterator: ask once for a
        whole run, not per epoch, and before the model exists. A worker is a fork, and keeps the
        pages of what was there until somebody writes to them: of weights that the parent goes on to
        update it would hold an old copy. Closing the iterator ends them. An error of a worker is
        raised here as the same error.
        """
        if workers == 0:
            return (self.batch(step) for step in range(start, stop))
        return ReadAhead(self.batch, start, stop, workers)


def _both_ways(rows: Rows, in_a: np.ndarray) -> tuple[Rows, Rows]:
    """Inputs A, B, A, B, ...

    and targets B, A, B, A, ... of users given as rows; `in_a` (E,) bool. Items stay ascending.
    """
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(in_a)])
    n_a = np.diff(before[rows.indptr])
    n_b = rows.lengths - n_a
    a, b = (
        rows.items[np.flatnonzero(in_a)],
        rows.items[np.flatnonzero(~in_a)],
    )  # faster than boolean indexing
    return _interleave(n_a, a, n_b, b), _interleave(n_b, b, n_a, a)


def _interleave(
    n_first: np.ndarray, first: np.ndarray, n_second: np.ndarray, second: np.ndarray
) -> Rows:
    """Rows that alternate between those of `first` (lengths n_first) and those of `second`."""
    lengths = np.stack([n_first, n_second], axis=1).reshape(-1)
    from_first = np.repeat(np.tile([True, False], len(n_first)), lengths)
    items = np.empty(len(from_first), np.int32)
    items[np.flatnonzero(from_first)] = first
    items[np.flatnonzero(~from_first)] = second
    return Rows(indptr_of(lengths), items)
