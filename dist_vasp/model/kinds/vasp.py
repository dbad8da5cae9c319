"""VASP: the Hadamard product of a deep and a shallow model (Vancura and Kordik, 2102.05774).

FLVAE(x) = sigmoid(R d + r) * sigmoid(Q z + q)     kinds/flvae.py, section 3.1
NEASE(x) = sigmoid(W x),  diag(W) = 0              kinds/nease.py, section 3.2
VASP(x)  = FLVAE(x) * NEASE(x)                     section 3.3: both must agree
loss     = mean over rows of (sum over items of focal(VASP(x), y))  +  KL(z)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.input_side import InputSide
from dist_vasp.model.kind import Kind
from dist_vasp.model.kinds.flvae import SIZE_KEYS, flvae_heads, residual_trunk
from dist_vasp.model.kinds.nease import check_start, nease_path
from dist_vasp.model.links import Product
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.slices import Storage
from dist_vasp.model.trunk import Trunk

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig


class Vasp(Kind):
    name = "vasp"
    losses = ("focal",)
    size_keys = SIZE_KEYS

    def check(self, config: Config) -> None:
        check_start(config, may_freeze=True)

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> Trunk:
        return residual_trunk(model, arithmetic)

    def parts(self, config: Config, storage: Storage) -> Parts:
        flvae = flvae_heads(config.model, storage)
        nease = nease_path(config, storage)
        input_side = InputSide(storage, config.model.hidden)
        return Parts(storage, input_side, (*flvae, nease), Product())
