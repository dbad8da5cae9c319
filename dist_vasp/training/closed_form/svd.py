"""The factors of `puresvd` from the shards (model/kinds/puresvd.py, model/truncated_svd.py)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dist_vasp.config.schema import Config, ModelConfig
from dist_vasp.data.manifest import Manifest
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.model.slices import ItemSlice
from dist_vasp.model.truncated_svd import MORE_COLUMNS, WeightedUsers, right_singular_vectors
from dist_vasp.parallel.agree import agreed
from dist_vasp.parallel.comm import Ranks
from dist_vasp.progress import Progress
from dist_vasp.training.closed_form.support import read_training_users
from dist_vasp.training.stop import Interrupted, tick_of


class SvdFit:
    """The training users in memory, and the factors for this rank's items."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        ranks: Ranks,
        interrupted: Interrupted,
        say: Callable[[str], None],
    ) -> None:
        self._ranks, self._interrupted, self._say = ranks, interrupted, say
        self._n_items = manifest.n_items
        with agreed(ranks):
            self._users = read_training_users(config.data.shards, manifest)

    def solve(self, model: PartitionedModel, keys: ModelConfig) -> None:
        """Write the factors of the keys `model.svd_*` into W1 and R."""
        exponents = (keys.svd_user_exponent, keys.svd_item_exponent)
        width = min(keys.svd_rank + MORE_COLUMNS, self._n_items)
        X = WeightedUsers(self._users, self._n_items, width, exponents, self._ranks)
        title, show = f"{keys.svd_rank} singular vectors", self._ranks.is_main
        with Progress(title, keys.svd_iterations, "iteration", show=show) as progress:
            tick = tick_of(progress, self._interrupted)
            found = right_singular_vectors(X, keys.svd_rank, keys.svd_iterations, tick)
        n_found = int((found.values_k > 0).sum())
        if n_found < keys.svd_rank:
            self._say(
                f"the interactions have {n_found} singular values above rounding, so the other "
                f"{keys.svd_rank - n_found} of model.svd_rank {keys.svd_rank} add nothing"
            )
        (head,) = model.heads
        assert model.input is not None
        write(model.input.slices(), X.scale_J1 * found.V_Jk)
        write(head.weights, found.V_Jk / X.scale_J1)


def write(pieces: list[ItemSlice], rows_Jk: Tensor) -> None:
    """Copy the rows of this rank's items."""
    for piece in pieces:
        first = piece.lo - pieces[0].lo
        piece.tensor.copy_(rows_Jk[first : first + piece.hi - piece.lo])
