"""PureSVD: a truncated singular value decomposition (Cremonesi, Koren, Turrin 2010, RecSys).

    score(x) = x V V^T          V (I, k): the first k right singular vectors of the training users

With weights of users and items, X~ = D X S = U diag(s) V^T, it is EigenRec (Nikolakopoulos et al.
2019, KAIS 58), and the ideal low-pass filter of GF-CF (Shen et al. 2021, CIKM) for
`svd_user_exponent` -1 and `svd_item_exponent` -1/2:

    score_j = p_j^-e sum over the history of p_i^e V_i . V_j       p popularity, e the item exponent

It is a linear AutoRec in closed form: W1 = S V, R = S^-1 V, no biases. Neither loss nor optimizer
is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.input_side import InputSide
from dist_vasp.model.kind import ClosedForm, Kind
from dist_vasp.model.kinds.autorec import AutoRecTrunk
from dist_vasp.model.kinds.nease import refuse_start
from dist_vasp.model.links import Identity
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import DenseHead
from dist_vasp.model.slices import Storage
from dist_vasp.model.trunk import Trunk
from dist_vasp.require import require

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig


MOST_VECTORS = 1 << 14  # eigenvectors of a matrix of this size take minutes


@dataclass(frozen=True)
class PureSvdKeys:
    """The matrix that is decomposed, how many vectors are kept, and how exact they are."""

    svd_rank: int = 256
    """Singular vectors that puresvd keeps."""
    svd_user_exponent: float = 0.0
    """A user of n items weighs (n / mean n)^this in puresvd. -1 is GF-CF."""
    svd_item_exponent: float = 0.0
    """The column of an item is multiplied by (popularity / mean popularity)^this in puresvd, and
    scores are scaled back. -0.5 is GF-CF."""
    svd_iterations: int = 8
    """Products with X^T X in puresvd; more come closer to the exact singular vectors."""

    def check(self) -> None:
        """Raise ValueError for values that no decomposition can use."""
        rank, allowed = self.svd_rank, f"1 to {MOST_VECTORS}"
        good = "1000 did well on Gowalla, 80 on MovieLens 1M"
        require(1 <= rank <= MOST_VECTORS, "model.svd_rank", rank, allowed, good)
        for name, most in (("svd_user_exponent", 4), ("svd_item_exponent", 1)):
            value = getattr(self, name)
            action = "0 gives PureSVD, -1 for users and -0.5 for items the low-pass filter of GF-CF"
            require(-most <= value <= most, f"model.{name}", value, f"-{most} to {most}", action)
        iterations, enough = self.svd_iterations, "8 are usually enough"
        require(1 <= iterations <= 1000, "model.svd_iterations", iterations, "1 to 1000", enough)


class PureSvd(Kind):
    name = "puresvd"
    losses = ()  # none is used
    closed_form = ClosedForm(
        ("svd_rank", "svd_user_exponent", "svd_item_exponent", "svd_iterations"),
        "one setting: all products with X^T X, and the eigenvectors",
    )
    size_keys = ("svd_rank",)

    def check(self, config: Config) -> None:
        refuse_start(config, self.name)

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> Trunk:
        return AutoRecTrunk(model.svd_rank, True, arithmetic)

    def parts(self, config: Config, storage: Storage) -> Parts:
        rank = config.model.svd_rank
        head = DenseHead("decoder", 0, rank, storage)
        return Parts(storage, InputSide(storage, rank), (head,), Identity())
