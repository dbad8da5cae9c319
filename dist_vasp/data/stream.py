"""Read the training users of a data folder as batches, in the order of lanes.py.

Rank r reads its part of the lanes. What a step holds is a function of its number, so the number of
ranks and workers changes nothing, and a resume needs only the number of the step.

Shapes: U users of the split, B rows of this rank's batch, E interactions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_vasp.data.augment import keep_inputs, split_halves
from dist_vasp.data.items import load_items
from dist_vasp.data.lanes import LaneOrder
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, concatenate_rows, indptr_of
from dist_vasp.data.shard import check_ratings, read_shard
from dist_vasp.data.workers import ReadAhead
from dist_vasp.turns import in_turn

_SPARE_SHARDS = 4  # decoded shards kept beyond one per lane


@dataclass(frozen=True)
class StreamOptions:
    """What determines the batches of all ranks together.

    batch_size: users per step over all ranks, on average; a step has at most 2 more. lanes: parts
    of the data that are read side by side. ratings: rows carry the ratings of the shards; not with
    halves. dropout_turns: (number of epochs, whether their inputs have dropout), repeated without
    end: an epoch that trains no encoder reads whole inputs.
    """

    batch_size: int
    lanes: int = 48
    seed: int = 0
    halves: bool = True
    input_dropout: float = 0.0
    ratings: bool = False
    dropout_turns: tuple[tuple[int, bool], ...] = ((1, True),)

    def check(self, world_size: int) -> None:
        """Raise ValueError where `world_size` ranks cannot read these batches."""
        assert 0 <= self.input_dropout < 1, self.input_dropout
        assert not (self.ratings and self.halves), "halves have no ratings"
        if self.batch_size < 1:
            raise ValueError(
                f"data.batch_size is {self.batch_size}, expected at least 1 user per step"
            )
        if self.lanes < 1:
            raise ValueError(
                f"parallel.lanes is {self.lanes}, expected at least 1; choose a multiple of the "
                "number of ranks"
            )
        if self.lanes % world_size:
            raise ValueError(
                f"parallel.lanes is {self.lanes} but {world_size} ranks do not divide it; "
                f"choose a multiple of {world_size} or another number of ranks"
            )
        if self.lanes > self.batch_size:
            raise ValueError(
                f"parallel.lanes is {self.lanes} but data.batch_size is {self.batch_size}, "
                "expected at least one user per lane; lower parallel.lanes or raise "
                "data.batch_size"
            )


@dataclass(frozen=True)
class Batch:
    """What one rank trains on in one step.

    With halves a user gives two consecutive rows, (A -> B) then (B -> A); otherwise one row x -> x.
    Input dropout removes items from the inputs, never from the targets. Rows are not padded.
    """

    epoch: int
    step: int  # steps before this one, over the whole run
    inputs: Rows  # B rows
    targets: Rows  # B rows
    user_keys: np.ndarray  # (B,) uint64, the user of each row
    lane_rows: tuple[tuple[int, int], ...]  # (lane, its rows), in the order of the rows
    n_users: int  # on this rank
    global_users: int  # over all ranks
    global_rows: int  # N: over all ranks
    padded_rows: int  # the largest B over all ranks


class TrainStream:
    """The training users of a data folder as batches, for one rank.

    ValueError where the folder, or the options with this number of ranks, cannot be trained on.
    """

    def __init__(
        self, folder: str | Path, options: StreamOptions, rank: int = 0, world_size: int = 1
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        options.check(world_size)
        self.folder = Path(folder)
        self.options = options
        self.world_size = world_size
        self.manifest = Manifest.load(folder)
        self.n_users = self.manifest.splits["train"].users
        self.n_items = self.manifest.n_items
        if self.n_users < 1:
            raise ValueError(
                f"{folder} has no training users; prepare the data with fewer val_users and "
                "test_users"
            )
        if options.ratings:
            check_ratings(folder, self.manifest)
        self._item_keys = load_items(folder, self.manifest).keys
        self._shards = self.manifest.splits["train"].shards
        users_per_shard = [shard.users for shard in self._shards]
        self._order = LaneOrder(users_per_shard, options.batch_size, options.lanes, options.seed)
        per_rank = options.lanes // world_size
        self._my_lanes = range(rank * per_rank, (rank + 1) * per_rank)
        self._cache: OrderedDict[tuple[int, int], tuple[np.ndarray, Rows]] = OrderedDict()

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def batch(self, step: int) -> Batch:
        """Return this rank's batch of global step `step` (from 0).

        ValueError where a shard is damaged.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        user_keys, rows = self._read_users(epoch, step_of_epoch)
        inputs = targets = rows
        per_user = 1
        if self.options.halves:
            per_user = 2
            item_keys = self._item_keys[rows.items]
            in_a = split_halves(user_keys, rows.indptr, item_keys, self.options.seed, epoch)
            inputs, targets = _both_ways(rows, in_a)
        user_keys = np.repeat(user_keys, per_user)
        if self.options.input_dropout and in_turn(self.options.dropout_turns, epoch):
            inputs = self._drop_inputs(user_keys, inputs, epoch)
        users = self._order.users_per_lane(step_of_epoch)
        return Batch(
            epoch=epoch,
            step=step,
            inputs=inputs,
            targets=targets,
            user_keys=user_keys,
            lane_rows=tuple(
                (lane, per_user * int(users[lane])) for lane in self._my_lanes if users[lane]
            ),
            n_users=rows.n_rows,
            global_users=int(users.sum()),
            global_rows=per_user * int(users.sum()),
            padded_rows=per_user * int(users.reshape(self.world_size, -1).sum(axis=1).max()),
        )

    def batches(
        self, start: int, stop: int, workers: int
    ) -> Generator[Batch, None, None] | ReadAhead[Batch]:
        """Return the batches of the global steps start to stop, read ahead by `workers` processes.

        With 0 workers this process reads them. Workers start at once and live as long as the
        iterator, so call this once for a whole run. Closing the iterator ends the workers. An error
        of a worker is raised here as the same error.
        """
        if workers == 0:
            return (self.batch(step) for step in range(start, stop))
        return ReadAhead(self.batch, start, stop, workers)

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is sent: all but the decoded shards."""
        return self.__dict__ | {"_cache": OrderedDict()}

    def _read_users(self, epoch: int, step_of_epoch: int) -> tuple[np.ndarray, Rows]:
        """Return the keys and rows of this rank's users at a step."""
        keys, rows, shards = [np.empty(0, np.uint64)], [], set()
        for lane in self._my_lanes:
            for shard, start, stop in self._order.parts(epoch, step_of_epoch, lane):
                shard_keys, shard_rows = self._shard(epoch, shard)
                keys.append(shard_keys[start:stop])
                rows.append(shard_rows.slice(start, stop))
                shards.add(shard)
        self._evict(len(shards))
        return np.concatenate(keys), concatenate_rows(rows)

    def _drop_inputs(self, user_keys: np.ndarray, inputs: Rows, epoch: int) -> Rows:
        options, item_keys = self.options, self._item_keys[inputs.items]
        kept = keep_inputs(
            user_keys, inputs.indptr, item_keys, options.input_dropout, options.seed, epoch
        )
        return inputs.where(kept)

    def _shard(self, epoch: int, shard: int) -> tuple[np.ndarray, Rows]:
        """Return the user keys and rows of one shard in the order of `epoch`, from the cache."""
        key = (epoch, shard)
        if key not in self._cache:
            entry, ratings = self._shards[shard], self.options.ratings
            block = read_shard(self.folder, "train", entry, self.n_items, ratings)
            order = self._order.users_of_shard(epoch, shard)
            self._cache[key] = (block.user_keys[order], block.rows.take(order))
        self._cache.move_to_end(key)
        return self._cache[key]

    def _evict(self, n_used: int) -> None:
        """Drop the least recently used shards, but not the `n_used` ones of this step.

        The next step continues to read those.
        """
        while len(self._cache) > max(n_used, len(self._my_lanes) + _SPARE_SHARDS):
            self._cache.popitem(last=False)


def _both_ways(rows: Rows, in_a: np.ndarray) -> tuple[Rows, Rows]:
    """Return inputs A, B, A, B, ... and targets B, A, B, A, ... of the users in `rows`.

    in_a (E,) bool: whether an interaction is in half A. Items stay ascending.
    """
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(in_a)])
    n_a = np.diff(before[rows.indptr])
    n_b = rows.lengths - n_a
    a = rows.items[np.flatnonzero(in_a)]  # faster than indexing by a mask
    b = rows.items[np.flatnonzero(~in_a)]
    return _interleave(n_a, a, n_b, b), _interleave(n_b, b, n_a, a)


def _interleave(
    n_first: np.ndarray, first: np.ndarray, n_second: np.ndarray, second: np.ndarray
) -> Rows:
    """Return rows that alternate between those of `first` (lengths n_first) and of `second`."""
    lengths = np.stack([n_first, n_second], axis=1).reshape(-1)
    from_first = np.repeat(np.tile([True, False], len(n_first)), lengths)
    items = np.empty(len(from_first), np.int32)
    items[np.flatnonzero(from_first)] = first
    items[np.flatnonzero(~from_first)] = second
    return Rows(indptr_of(lengths), items)
