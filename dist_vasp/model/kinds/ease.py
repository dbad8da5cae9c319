"""EASE: the closed form of a linear item-item model (Steck 2019, arXiv 1905.03375).

    score = x B,  diag(B) = 0,  B = I - P diagMat(1 / diag P),  P = (X^T X + lambda I)^-1

The keys generalise it to EDLAE, RLAE, RDLAE and DAN: model/closed_form.py has the equations and
the sources. Neither loss nor optimizer is used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from dist_vasp.model.kind import ClosedForm, Kind
from dist_vasp.model.links import Identity
from dist_vasp.model.neighbours import item_to_item
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import Training
from dist_vasp.model.slices import Storage
from dist_vasp.require import require, require_finite

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config


@dataclass(frozen=True)
class EaseKeys:
    """The closed form, as a model of its own or as the start of NEASE's W."""

    ease_lambda: float = 0.0
    """L2 regularisation of ease; 0: the one of a grid with the best validation NDCG@100."""
    ease_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision in which ease is computed; fp64 takes twice the memory. Its weights are stored in
    fp32."""
    ease_dropout: float = 0.0
    """Share of a user's items that ease is fitted to do without (EDLAE): adds share / (1 - share)
    of its own diagonal to G."""
    ease_user_exponent: float = 0.0
    """A user of n items weighs (n / mean n)^this in G. Negative values give users with long
    histories less weight."""
    ease_item_exponent: float = 0.0
    """B_ij is multiplied by (popularity of j / popularity of i)^this (DAN). Negative values lower
    the scores of popular items."""
    ease_lambda_exponent: float = 0.0
    """The lambda of an item is ease_lambda (popularity / mean popularity)^this. Positive values
    regularise what popular items contribute to scores more."""
    ease_auxiliary: float = 0.0
    """What an interaction of data.auxiliary that data.shards does not hold counts in X, beside 1;
    0 without data.auxiliary."""
    ease_xi: float = 0.0
    """Largest value of B's diagonal while B is computed (RLAE); 0 gives EASE, 1 ridge regression
    without a constraint. The diagonal is stored as 0."""

    def check(self) -> None:
        """Raise ValueError for values that no closed form can use."""
        m = self
        require_finite("model.ease_lambda", m.ease_lambda)
        require(
            0 <= m.ease_dropout < 1,
            "model.ease_dropout",
            m.ease_dropout,
            "0 <= share < 1",
            "0.45 did well on MovieLens 1M",
        )
        require(
            -4 <= m.ease_user_exponent <= 4,
            "model.ease_user_exponent",
            m.ease_user_exponent,
            "-4 to 4",
            "0 weighs all users the same, -0.5 did well on MovieLens 1M",
        )
        for name in ("ease_item_exponent", "ease_lambda_exponent"):
            value = getattr(m, name)
            action = "0 treats popular and rare items the same"
            require(-4 <= value <= 4, f"model.{name}", value, "-4 to 4", action)
        require(
            0 <= m.ease_auxiliary <= 1,
            "model.ease_auxiliary",
            m.ease_auxiliary,
            "0 to 1",
            "0.35 did well for the low ratings of MovieLens 1M",
        )
        require(0 <= m.ease_xi <= 1, "model.ease_xi", m.ease_xi, "0 to 1", "0 gives EASE")


class Ease(Kind):
    name = "ease"
    losses = ()  # none is used
    closed_form = ClosedForm(
        ("neighbours", *(key.name for key in fields(EaseKeys))),
        "the closed form for one lambda: Gram matrix and inverse",
        walked="ease_lambda",
    )

    def parts(self, config: Config, storage: Storage) -> Parts:
        closed_form = Training(trained=False, in_loss=False)
        B = item_to_item(storage, config.model.neighbours, "ease", closed_form)
        return Parts(storage, None, (B,), Identity())
