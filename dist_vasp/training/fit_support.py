"""The support of a sparse items x items path from the shards, and the closed form on it.

model/support.py and model/closed_form_on_support.py have the equations. The ranks share the choice
of all supports, and a rank solves the columns of its own items. Each holds the interactions of all
training users.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.data.rows import Rows, indptr_of
from dist_vasp.data.shard import read_shard
from dist_vasp.model.closed_form_on_support import passes, solve_on_support
from dist_vasp.model.co_occurrence import STRETCHES, CoOccurrence
from dist_vasp.model.neighbours import NeighbourMatrix
from dist_vasp.model.support import choose_support
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.progress import Progress
from dist_vasp.training.stop import StoppedError

Interrupted = Callable[[], bool]


class SupportFit:
    """The training users in memory, and what is computed from them for this rank's items."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        ranks: Ranks,
        interrupted: Interrupted = lambda: False,
    ) -> None:
        self._ranks, self._interrupted = ranks, interrupted
        self._n_items = manifest.n_items
        with agreed(ranks):
            self._users = read_training_users(config.data.shards, manifest)
        self._counts: CoOccurrence | None = None
        self._exponent = 0.0  # of the users' weights in the counts

    def choose(self, path: NeighbourMatrix) -> None:
        """Write the supports of this rank's items into `path`."""
        counts = self._counted(0.0)
        title = f"choosing {path.width} inputs for each item"
        with Progress(title, STRETCHES, "part", show=self._ranks.is_main) as progress:
            tick = self._tick(progress)
            chosen = choose_support(counts, path.width, self._ranks)
            for done, (first, ids_nK) in enumerate(chosen, 1):
                for own in path.ids:
                    lo, hi = max(first, own.lo), min(first + len(ids_nK), own.hi)
                    if lo < hi:
                        some = torch.from_numpy(ids_nK[lo - first : hi - first])
                        own.tensor[lo - own.lo : hi - own.lo] = some
                tick(done)

    def solve(self, path: NeighbourMatrix, model: ModelConfig) -> None:
        """Write the closed form of the keys `model.ease_*` on the supports of `path` into it."""
        counts = self._counted(model.ease_user_exponent)
        title = f"lambda {model.ease_lambda:g}, systems"
        for ids, weight in zip(path.ids, path.weights, strict=True):
            ids_JK, solved_JK = ids.tensor.cpu().numpy(), weight.tensor.cpu()
            parts = STRETCHES * len(passes(counts, path.width, model, self._ranks))
            with Progress(title, parts, "part", show=self._ranks.is_main) as progress:
                tick = self._tick(progress)
                solve_on_support(counts, ids_JK, solved_JK, ids.lo, model, self._ranks, tick)
            weight.tensor.copy_(solved_JK)

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

    def _tick(self, progress: Progress) -> Callable[[int], None]:
        def tick(done: int) -> None:
            progress.update(done)
            if self._interrupted():
                raise StoppedError

        return tick


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
