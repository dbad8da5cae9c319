"""Mult-VAE: a shallow variational autoencoder with multinomial loss (arXiv 1802.05814).

    h = tanh(W1 x / |x| + b1)       mu = Wm h + bm,  logvar = Wv h + bv,  z = mu + exp(logvar/2) eps
    d = tanh(V z + c)               p = softmax(R d + r)                        I-600-200-600-I
    loss = -sum_i x_i log p_i  +  beta * KL(z),  KL summed over the latent dimensions

Liang et al. 2018, sections 2.2 and 4.3. They drop half of the input (`data.input_dropout: 0.5`) and
raise beta linearly from 0 (`loss.kl_weight`, `loss.kl_anneal_steps`). Their notebook divides the
number of updates by 200,000 and stops at 0.2: kl_weight 0.2, kl_anneal_steps 40000.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.input_side import InputSide, UnitLength
from dist_vasp.model.kind import Kind
from dist_vasp.model.kinds.nease import refuse_start
from dist_vasp.model.links import Softmax
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import DenseHead
from dist_vasp.model.slices import Storage
from dist_vasp.model.trunk import Linear, Trunk

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig


class MultVaeTrunk(Trunk):
    """Source d (B, H). The penalty is the KL divergence, summed over the L latent dimensions."""

    def __init__(self, hidden: int, latent: int, arithmetic: Arithmetic) -> None:
        super().__init__()
        dtype = arithmetic.dtype
        self.precision, self.kernels = arithmetic.precision, arithmetic.kernels
        self.input_bias = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.mu = Linear(hidden, latent, dtype=dtype)
        self.logvar = Linear(hidden, latent, dtype=dtype)
        self.from_latent = Linear(latent, hidden, dtype=dtype)
        self.noise_width = latent
        self.activations = 4 * hidden + 8 * latent

    def forward(
        self, pre_BH: Tensor, noise_BL: Tensor | None = None
    ) -> tuple[tuple[Tensor], Tensor]:
        h_BH = torch.tanh(self.precision.cast(pre_BH + self.input_bias))
        mu_BL, logvar_BL = self.mu(h_BH), self.logvar(h_BH)
        z_BL, kl_B = self.kernels.latent_code(mu_BL, logvar_BL, noise_BL, pre_BH.dtype)
        d_BH = torch.tanh(self.from_latent(z_BL))
        return (d_BH,), kl_B * self.noise_width


class MultVae(Kind):
    name = "multvae"
    losses = ("multinomial",)
    halves = False
    size_keys = ("hidden", "latent")

    def check(self, config: Config) -> None:
        refuse_start(config, self.name)

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> Trunk:
        return MultVaeTrunk(model.hidden, model.latent, arithmetic)

    def parts(self, config: Config, storage: Storage) -> Parts:
        hidden = config.model.hidden
        x = InputSide(storage, hidden, UnitLength(config.data.input_dropout))
        return Parts(storage, x, (DenseHead("decoder", 0, hidden, storage),), Softmax())
