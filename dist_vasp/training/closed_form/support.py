"""The support of a sparse items x items path from the shards, and the closed form on it.

model/support.py and model/closed_form_on_support.py have the equations. The ranks share the choice
of all supports, and a rank solves the columns of its own items. Each holds the interactions of all
training users.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.data.shard import read_shard
from dist_vasp.model.closed_form_on_support import passes, solve_on_support
from dist_vasp.model.co_occurrence import STRETCHES, CoOccurrence
from dist_vasp.model.kinds.ease import EaseKeys
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.model.slices import ItemSlice
from dist_vasp.model.support import choose_support
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks, all_reduce
from dist_vasp.progress import Progress, say
from dist_vasp.training.closed_form.parts import Parts, clear_leftovers, remove_parts
from dist_vasp.training.stop import Interrupted, tick_of


class SupportFit:
    """The training users in memory, and what is computed from them for this rank's items.

    parts: the folder in which the work is kept as it proceeds (parts.py), and resumed; None:
    it is not kept.
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        ranks: Ranks,
        interrupted: Interrupted = lambda: False,
        parts: Path | None = None,
    ) -> None:
        self._ranks, self._interrupted, self._parts = ranks, interrupted, parts
        self._n_items, self._data = manifest.n_items, manifest.shards_sha256
        with agreed(ranks):
            self._users = read_training_users(config.data.shards, manifest)
        self._counts: CoOccurrence | None = None
        self._exponent = 0.0  # of the users' weights in the counts
        self._has_solved = False
        if parts and ranks.is_main:
            clear_leftovers(parts)

    def choose(self, path: NeighbourMatrix) -> float:
        """Write the supports of this rank's items into `path`.

        Return the seconds that earlier starts took for those that are resumed.
        """
        counts = self._counted(0.0)
        (own,) = path.ids
        parts = self._parts_of("inputs", own, {})
        is_done_J, seconds = self._resumed(parts, own)
        left = self._left(counts, is_done_J, own.lo)
        title, before = f"choosing {path.width} inputs for each item", STRETCHES - len(left)
        with Progress(title, STRETCHES, "part", before, self._ranks.is_main) as progress:
            tick = tick_of(progress, self._interrupted)
            chosen = choose_support(counts, path.width, self._ranks, left)
            for done, (first, ids_nK) in enumerate(chosen, 1):
                lo, hi = max(first, own.lo), min(first + len(ids_nK), own.hi)
                if lo < hi:
                    some = torch.from_numpy(ids_nK[lo - first : hi - first])
                    own.tensor[lo - own.lo : hi - own.lo] = some
                if self._ranks.is_main:
                    parts.add(np.arange(first, first + len(ids_nK)), torch.from_numpy(ids_nK))
                tick(done)
        return seconds

    def _left(
        self, counts: CoOccurrence, is_done_J: np.ndarray, start: int
    ) -> list[tuple[int, int]]:
        """The stretches of which some rank, whose items begin at `start`, lacks an item."""
        stretches = list(counts.stretches())
        own = [slice(max(lo - start, 0), max(hi - start, 0)) for lo, hi in stretches]
        lacking = torch.tensor([float(not is_done_J[some].all()) for some in own])
        lacking = all_reduce(lacking.to(self._ranks.device), self._ranks.world, "max")
        return [stretch for stretch, n in zip(stretches, lacking.tolist(), strict=True) if n]

    def solve(self, path: NeighbourMatrix, model: ModelConfig) -> float:
        """Write the closed form of the keys `model.ease_*` on the supports of `path` into it.

        Return the seconds that earlier starts took for the weights that are resumed.
        """
        ranks = self._ranks
        counts = self._counted(model.ease_user_exponent)
        (ids,), (weight,) = path.ids, path.weights
        if self._parts and self._has_solved and ranks.is_main:
            remove_parts(self._parts, "weights")  # of the setting before
        self._has_solved = True
        keys = {key.name: getattr(model, key.name) for key in fields(EaseKeys)}
        parts = self._parts_of("weights", weight, keys)
        is_done_J, seconds = self._resumed(parts, weight)
        # all replicas solve the same items, also where one of them sees a part that another lacks
        lacking_J = torch.from_numpy(~is_done_J).float().to(ranks.device)
        lacking_J = all_reduce(lacking_J, ranks.replica_group, "max")
        rows_n = lacking_J.cpu().numpy().nonzero()[0]
        ids_JK, solved_JK = ids.tensor.cpu().numpy(), weight.tensor.cpu()

        def keep(rows: np.ndarray) -> None:
            if ranks.layout.replica_of(ranks.rank) == 0:
                parts.add(rows + ids.lo, solved_JK[torch.from_numpy(rows)])

        every, left = (
            STRETCHES * len(passes(n, counts, path.width, model, ranks))
            for n in (len(ids_JK), len(rows_n))
        )
        title = f"lambda {model.ease_lambda:g}, systems"
        with Progress(title, every, "part", every - left, ranks.is_main) as progress:
            tick = tick_of(progress, self._interrupted)
            solve_on_support(counts, ids_JK, solved_JK, ids.lo, model, ranks, tick, rows_n, keep)
        weight.tensor.copy_(solved_JK)
        return seconds

    def _parts_of(self, kind: str, own: ItemSlice, keys: dict[str, Any]) -> Parts:
        """The parts of a computation whose rows depend on the data, K and `keys`."""
        width, dtype = own.tensor.shape[1], own.tensor.dtype
        made_for = {"hash of data.shards": self._data, "neighbours": width, **keys}
        writers = self._ranks.layout.partitions if kind == "weights" else 1
        return Parts(self._parts, kind, made_for, self._n_items, width, dtype, self._say, writers)

    def _resumed(self, parts: Parts, own: ItemSlice) -> tuple[np.ndarray, float]:
        """Read the parts; return which items of this rank have a row, and the seconds of all."""
        is_done_J, seconds = parts.read(own)
        ranks, replicas = self._ranks, self._ranks.layout.replicas
        found = torch.tensor([is_done_J.sum(), seconds, parts.n_ignored], dtype=torch.float64)
        found = all_reduce(found.to(ranks.device), ranks.world)
        n_done = int(found[0]) // replicas
        if int(found[2]) > parts.n_ignored:
            self._say("other ranks ignore parts, too, and compute them again")
        if n_done:
            self._say(f"resumed with the {parts.kind} of {n_done:,} of {self._n_items:,} items")
        return is_done_J, float(found[1]) / replicas

    def _say(self, text: str) -> None:
        if self._ranks.is_main:
            say(text)

    def _counted(self, exponent: float) -> CoOccurrence:
        """The counts of users that weigh (n / mean n)^exponent. The last ones are kept: a search
        asks for the same again and again, and two of them are too large to keep."""
        if self._counts is None or self._exponent != exponent:
            self._counts, weight_U = None, None
            if exponent:
                lengths_U = self._users.lengths.astype(np.float64)
                weight_U = (lengths_U / lengths_U.mean()) ** exponent
            self._counts = CoOccurrence(self._users, self._n_items, weight_U)
            self._exponent = exponent
        return self._counts


def read_training_users(folder: str, manifest: Manifest) -> Rows:
    """All training users, in one piece. ValueError where a shard is damaged."""
    train = manifest.splits["train"]
    items = np.empty(train.interactions, np.int32)
    lengths, filled = [], 0
    for entry in train.shards:
        rows = read_shard(folder, "train", entry, manifest.n_items).rows
        items[filled : filled + len(rows.items)] = rows.items
        filled += len(rows.items)
        lengths.append(rows.lengths)
    indptr = indptr_of(np.concatenate(lengths))
    assert filled == len(items) == indptr[-1]
    return Rows(indptr, items)
