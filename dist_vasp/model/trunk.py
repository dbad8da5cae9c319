"""What every trunk has, and the residual trunk of FLVAE: every layer of width H and L, no item axis
(VASP paper, section 3.1, and the authors' code).

    encoder   e1 = LN(swish(h + b1)),  h = W1 x
              ek = LN(swish(Wk e(k-1) + bk + e1 + ... + e(k-1)))
    heads     mu = Wm e + bm,  logvar = Wv e + bv
              z = mu + exp(logvar / 2) * noise   (z = mu without noise)
    decoder   the same pattern, from z: d1 = LN(swish(V1 z + c1)), ...

Shapes: B rows, H hidden width, L latent width. W1 x comes from the partitioned input side.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dist_vasp.kernels.interface import EXACT, Arithmetic, Kernels, Norm
from dist_vasp.kernels.random import Uniform, fill, row_keys

LN_EPS = 1e-3


class Linear(nn.Linear):
    """A dense layer whose product has the dtype of its input; its weights keep their own.

    They are zero until `Trunk.initialise` fills them: torch would draw numbers for nothing.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, with_bias: bool = True) -> Tensor:
        bias = self.bias.to(input.dtype) if with_bias else None
        return linear(input, self.weight.to(input.dtype), bias)


class ResidualNorm(nn.Module):
    """What follows the product of a residual layer: `Kernels.residual`."""

    def __init__(self, hidden: int, arithmetic: Arithmetic, eps: float) -> None:
        super().__init__()
        self.kernels, self.eps = arithmetic.kernels, eps
        self.weight = nn.Parameter(torch.ones(hidden, dtype=arithmetic.dtype))
        self.bias = nn.Parameter(torch.zeros(hidden, dtype=arithmetic.dtype))

    def forward(
        self, h_BH: Tensor, bias_H: Tensor | None, sum_BH: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        norm = Norm(self.weight, self.bias, self.eps)
        return self.kernels.residual(h_BH, bias_H, sum_BH, norm)


class ResidualStack(nn.Module):
    """Densely residual layers of width H: the sum of all earlier outputs enters the next layer
    inside swish. eps: added to the variance in the layer normalisation."""

    def __init__(
        self, n_layers: int, hidden: int, arithmetic: Arithmetic, eps: float = LN_EPS
    ) -> None:
        super().__init__()
        self.kernels = arithmetic.kernels
        self.norms = nn.ModuleList(ResidualNorm(hidden, arithmetic, eps) for _ in range(n_layers))
        self.layers = nn.ModuleList(
            Linear(hidden, hidden, dtype=arithmetic.dtype) for _ in range(n_layers - 1)
        )

    def forward(self, first_BH: Tensor, bias_H: Tensor | None = None) -> Tensor:
        """First pre-activation (B, H), and a bias to add to it -> last output (B, H)."""
        out_BH, sum_BH = self.norms[0](first_BH, bias_H, None)
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            assert isinstance(layer, Linear)
            out_BH, sum_BH = norm(*pre_activation(layer, out_BH, self.kernels), sum_BH)
        return out_BH


def pre_activation(layer: Linear, input: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor | None]:
    """The output of a layer, and the bias that `Kernels.residual` has yet to add to it."""
    if kernels.adds_bias:
        return layer(input, with_bias=False), layer.bias
    return layer(input), None


class Trunk(nn.Module):
    """W1 x (B, H), noise (B, L) or None -> sources (B, K) each and a penalty (B,).

    The sources have the dtype of the products. Noise is given in training alone. input_bias: (H,),
    added to W1 x. noise_width: L, 0 for a trunk without noise. activations: numbers that are kept
    for a row until the backward pass.
    """

    input_bias: nn.Parameter
    noise_width: int
    activations: int

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill with Glorot uniform weights and zero biases.

        They are made in float32, so that every dtype starts from the same numbers.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                bound = (6 / (module.in_features + module.out_features)) ** 0.5
                keys = row_keys(seed, f"trunk.{name}", np.arange(module.out_features))
                fill(module.weight, keys, Uniform(-bound, bound))
                module.bias.zero_()


class ResidualTrunk(Trunk):
    """Sources d (B, H) and z (B, L). The penalty is the KL divergence, averaged over L."""

    def __init__(
        self,
        hidden: int,
        latent: int,
        encoder_layers: int = 7,
        decoder_layers: int = 5,
        arithmetic: Arithmetic = EXACT,
    ) -> None:
        super().__init__()
        dtype = arithmetic.dtype
        self.precision, self.kernels = arithmetic.precision, arithmetic.kernels
        self.input_bias = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.encoder = ResidualStack(encoder_layers, hidden, arithmetic)
        self.mu = Linear(hidden, latent, dtype=dtype)
        self.logvar = Linear(hidden, latent, dtype=dtype)
        self.from_latent = Linear(latent, hidden, dtype=dtype)
        self.decoder = ResidualStack(decoder_layers, hidden, arithmetic)
        layers = encoder_layers + decoder_layers
        self.noise_width = latent
        self.activations = hidden * (3 * layers + 3) + 8 * latent

    def forward(
        self, pre_BH: Tensor, noise_BL: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        if self.kernels.adds_bias:
            e_BH = self.encoder(self.precision.cast(pre_BH), self.input_bias)
        else:
            e_BH = self.encoder(self.precision.cast(pre_BH + self.input_bias))
        mu_BL, logvar_BL = self.mu(e_BH), self.logvar(e_BH)
        z_BL, kl_B = self.kernels.latent_code(mu_BL, logvar_BL, noise_BL, pre_BH.dtype)
        d_BH = self.decoder(*pre_activation(self.from_latent, z_BL, self.kernels))
        return (d_BH, z_BL), kl_B
