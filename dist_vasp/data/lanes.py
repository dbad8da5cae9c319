"""The order in which the training users of an epoch are read (DESIGN.md, section 4).

The users of an epoch form one sequence: shards permuted by (seed, epoch), users within each by
(seed, epoch, shard). The sequence is cut into `lanes` equal parts, which are read side by side.
What a step reads is a function of its number.

Shapes: U users, S steps of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from dist_vasp.data.hashing import permutation
from dist_vasp.data.rows import indptr_of


class LaneOrder:
    """Which users each lane gives at each step."""

    def __init__(
        self, users_per_shard: Sequence[int], batch_size: int, lanes: int, seed: int
    ) -> None:
        self.lanes = lanes
        self._users_per_shard = users_per_shard
        self._seed = seed
        n_users = sum(users_per_shard)
        self.steps_per_epoch = -(-n_users // batch_size)
        bounds = np.arange(lanes + 1) * n_users // lanes
        self._starts = bounds[:-1]
        self._sizes = np.diff(bounds)
        self._phases = np.arange(lanes) * self.steps_per_epoch // lanes
        # the last epoch asked for, its shards in order, and where each starts
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def users_per_lane(self, step: int) -> np.ndarray:
        """Return the number of users of each lane at step `step` of an epoch, (lanes,)."""
        return self._users_before(step + 1) - self._users_before(step)

    def parts(self, epoch: int, step: int, lane: int) -> Iterator[tuple[int, int, int]]:
        """Yield the users of a lane at a step as (shard, start, stop) in permuted shards."""
        first = int(self._starts[lane] + self._users_before(step)[lane])
        end = first + int(self.users_per_lane(step)[lane])
        order, starts = self._shard_order(epoch)
        while first < end:
            slot = int(np.searchsorted(starts, first, side="right")) - 1
            stop = min(end, int(starts[slot + 1]))
            yield int(order[slot]), first - int(starts[slot]), stop - int(starts[slot])
            first = stop

    def users_of_shard(self, epoch: int, shard: int) -> np.ndarray:
        """Return the order of the users within a shard, (users,) int64."""
        return permutation(self._users_per_shard[shard], self._seed, epoch, shard)

    def _users_before(self, step: int) -> np.ndarray:
        """Return c(s) = (s * n_l + (l * S) // lanes) // S for each lane l of n_l users, (lanes,).

        These are the users that a lane has given before step s of an epoch.
        """
        return (step * self._sizes + self._phases) // self.steps_per_epoch

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's shards in order, (n,), and where each starts, (n+1,)."""
        if self._epoch[0] != epoch:
            order = permutation(len(self._users_per_shard), self._seed, epoch)
            users = np.array([self._users_per_shard[shard] for shard in order], np.int64)
            self._epoch = (epoch, order, indptr_of(users))
        return self._epoch[1:]
