"""RecVAE: a variational autoencoder with a composite prior (Shenbin et al. 2020, WSDM; 1912.11160).

    e = encoder(W1 x / |x|)      five densely connected layers with swish (section 3.2, figure 2)
    mu = Wm e + bm,  logvar = Wv e + bv,  z = mu + exp(logvar/2) eps      p = softmax(R z + r)
    loss = -sum_i x_i log p_i  +  gamma n (log q(z|x) - log prior(z|x)),  n interactions of x
    prior = 3/20 N(0, 1) + 3/4 q_old(z|x) + 1/10 N(0, e^10),  in each latent dimension

q_old is the encoder before the present phase (section 3.3). gamma is `loss.kl_weight` (3.4). The
encoder trains for three epochs with `data.input_dropout`, without the decoder. Then the decoder
trains for one epoch without dropout and KL (3.5). The weights of the prior and the 0.1 of the layer
normalisation are those of the authors' code, and so is the input of q_old: x without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.earlier import OLD, EarlierEncoder
from dist_vasp.model.input_side import InputSide, UnitLength
from dist_vasp.model.kind import Kind
from dist_vasp.model.kinds.nease import refuse_start
from dist_vasp.model.links import Softmax
from dist_vasp.model.partitioned import Parts
from dist_vasp.model.paths import DenseHead
from dist_vasp.model.slices import Storage
from dist_vasp.model.step import Phase, Prior
from dist_vasp.model.trunk import Linear, ResidualStack, Trunk
from dist_vasp.require import require

if TYPE_CHECKING:
    from dist_vasp.config.schema import Config, ModelConfig

PRIOR_WEIGHTS = (3 / 20, 3 / 4, 1 / 10)
WIDE_LOGVAR = 10.0
LN_EPS = 0.1


@dataclass(frozen=True)
class RecVaeKeys:
    """The alternation of encoder and decoder."""

    recvae_encoder_epochs: int = 3
    """Epochs in which recvae trains its encoder alone, before it trains its decoder."""
    recvae_decoder_epochs: int = 1
    """Epochs in which recvae trains its decoder alone, before it trains its encoder again."""

    def check(self) -> None:
        """Raise ValueError where one of the two is never trained."""
        for key in ("recvae_encoder_epochs", "recvae_decoder_epochs"):
            value = getattr(self, key)
            require(value >= 1, f"model.{key}", value, "at least 1", "raise it")


class RecVaeTrunk(Trunk):
    """Sources z, mu and logvar (B, L), without noise z = mu alone. It has no penalty of its own."""

    def __init__(self, hidden: int, latent: int, layers: int, arithmetic: Arithmetic) -> None:
        super().__init__()
        dtype = arithmetic.dtype
        self.precision, self.kernels = arithmetic.precision, arithmetic.kernels
        self.input_bias = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.encoder = ResidualStack(layers, hidden, arithmetic, LN_EPS)
        self.mu = Linear(hidden, latent, dtype=dtype)
        self.logvar = Linear(hidden, latent, dtype=dtype)
        self.noise_width = latent
        self.activations = hidden * (3 * layers + 2) + 20 * latent

    def posterior(self, pre_BH: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (B, L) of the latent code, given W1 x (B, H)."""
        if self.kernels.adds_bias:
            e_BH = self.encoder(self.precision.cast(pre_BH), self.input_bias)
        else:
            e_BH = self.encoder(self.precision.cast(pre_BH + self.input_bias))
        return self.mu(e_BH).to(pre_BH.dtype), self.logvar(e_BH).to(pre_BH.dtype)

    def forward(
        self, pre_BH: Tensor, noise_BL: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        mu_BL, logvar_BL = self.posterior(pre_BH)
        nothing_B = pre_BH.new_zeros(pre_BH.shape[:1])
        if noise_BL is None:
            return (self.precision.cast(mu_BL),), nothing_B
        z_BL = mu_BL + torch.exp(logvar_BL / 2) * noise_BL
        return (self.precision.cast(z_BL), mu_BL, logvar_BL), nothing_B


@dataclass(frozen=True)
class CompositePrior:
    """The mixture of each row, by the posterior of the old encoder (B, L) and the row's n (B,)."""

    mu_BL: Tensor
    logvar_BL: Tensor
    n_B: Tensor

    def penalty(self, sources: Sequence[Tensor]) -> Tensor:
        """n (log q(z|x) - log prior(z|x)) of each row (B,): the KL divergence by one sample."""
        z_BL, mu_BL, logvar_BL = (source.to(self.mu_BL.dtype) for source in sources)
        nothing = torch.zeros_like(self.mu_BL)
        of_mixture = (
            (nothing, nothing),
            (self.mu_BL, self.logvar_BL),
            (nothing, nothing + WIDE_LOGVAR),
        )
        parts = [
            math.log(weight) + log_normal(z_BL, *moments)
            for weight, moments in zip(PRIOR_WEIGHTS, of_mixture, strict=True)
        ]
        log_prior_BL = torch.logsumexp(torch.stack(parts), dim=0)
        return self.n_B * (log_normal(z_BL, mu_BL, logvar_BL) - log_prior_BL).sum(dim=1)


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The log density of each number of z under a normal distribution."""
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu) ** 2 * torch.exp(-logvar))


class OldEncoder(EarlierEncoder):
    """The encoder before the present phase: a part of the prior."""

    trunk: RecVaeTrunk

    def prior_of(self, pre_BH: Tensor, lengths_B: Tensor) -> Prior:
        return CompositePrior(*self.trunk.posterior(pre_BH), lengths_B.to(pre_BH.dtype))


class RecVae(Kind):
    name = "recvae"
    losses = ("multinomial",)
    halves = False
    size_keys = ("hidden", "latent", "encoder_layers")

    def check(self, config: Config) -> None:
        refuse_start(config, self.name)
        require(
            not config.halves,
            "data.halves",
            config.halves,
            "false with model.kind recvae, whose targets are whole histories",
            "leave it out",
        )

    def phases(self, model: ModelConfig) -> tuple[tuple[int, Phase], ...]:
        return (
            (model.recvae_encoder_epochs, Phase(paths=False)),
            (model.recvae_decoder_epochs, Phase(encoder=False)),
        )

    def trunk(self, model: ModelConfig, arithmetic: Arithmetic) -> RecVaeTrunk:
        return RecVaeTrunk(model.hidden, model.latent, model.encoder_layers, arithmetic)

    def earlier(self, config: Config, storage: Storage) -> OldEncoder:
        old = InputSide(storage, config.model.hidden, UnitLength(), f"input.weight{OLD}")
        return OldEncoder(old, self.trunk(config.model, storage.arithmetic))

    def parts(self, config: Config, storage: Storage) -> Parts:
        x = InputSide(storage, config.model.hidden, UnitLength(config.data.input_dropout))
        return Parts(
            storage, x, (DenseHead("decoder", 0, config.model.latent, storage),), Softmax()
        )
