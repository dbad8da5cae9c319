"""U-AutoRec: an autoencoder of users with one hidden layer (Sedhain et al. 2015, WWW companion).

    score(x) = R g(W1 x + m) + r          g sigmoid or identity (`model.autorec_encoder`)
    loss     = mean over rows of (sum over items of (score - y)^2)  +  l2/2 (|R|^2 + |W1|^2)

With `data.ratings`, as in the paper, x holds the ratings of a user, and the sum is over the items
that he has rated. Without, x and y are 1 for his items and 0 for all others, and the sum is over
all items. The paper's loss is a sum over U users with lambda / 2 of the norms, so its lambda is U
times `optimizer.l2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.input_side import InputSide
from dist_vasp.model.kind import Kind
from dist_vasp.model.kinds.nease import refuse_start
from dist_vasp.model.links import Identity
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import DenseHead
from dist_vasp.model.slices import Storage
from dist_vasp.model.trunk import Trunk

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig


@dataclass(frozen=True)
class AutoRecKeys:
    """The hidden layer."""

    autorec_encoder: Literal["sigmoid", "identity"] = "sigmoid"
    """Function of autorec's hidden layer."""

    def check(self) -> None:
        """Every value of its type can be used."""


class AutoRecTrunk(Trunk):
    """Source g(W1 x + m) (B, H), without noise or penalty."""

    noise_width = 0

    def __init__(self, hidden: int, linear: bool, arithmetic: Arithmetic) -> None:
        super().__init__()
        self.precision, self.linear = arithmetic.precision, linear
        self.input_bias = nn.Parameter(torch.zeros(hidden, dtype=arithmetic.dtype))
        self.activations = 2 * hidden

    def forward(
        self, pre_BH: Tensor, noise_BL: Tensor | None = None
    ) -> tuple[tuple[Tensor], Tensor]:
        h_BH = self.precision.cast(pre_BH + self.input_bias)
        return (h_BH if self.linear else torch.sigmoid(h_BH),), pre_BH.new_zeros(pre_BH.shape[:1])


class AutoRec(Kind):
    name = "autorec"
    losses = ("squared",)
    halves = False
    reads_ratings = True
    size_keys = ("hidden",)

    def check(self, config: Config) -> None:
        refuse_start(config, self.name)

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> Trunk:
        return AutoRecTrunk(model.hidden, model.autorec_encoder == "identity", arithmetic)

    def parts(self, config: Config, storage: Storage) -> Parts:
        hidden = config.model.hidden
        head = DenseHead("decoder", 0, hidden, storage)
        return Parts(storage, InputSide(storage, hidden), (head,), Identity())
