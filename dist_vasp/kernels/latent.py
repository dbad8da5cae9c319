"""The latent code of a variational autoencoder and its divergence from N(0, 1), in plain torch
(Kingma and Welling 2014, arXiv 1312.6114, section 2.4 and appendix B).

Shapes: B rows, L latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(mu_BL: Tensor, logvar_BL: Tensor, noise_BL: Tensor | None) -> Tensor:
    """mu + exp(logvar / 2) * noise, or mu without noise: (B, L)."""
    if noise_BL is None:
        return mu_BL
    return mu_BL + torch.exp(logvar_BL / 2) * noise_BL.to(mu_BL.dtype)


def kl_divergence(mu_BL: Tensor, logvar_BL: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each row, averaged over the latent dimensions: (B,)."""
    return -0.5 * (1 + logvar_BL - mu_BL**2 - torch.exp(logvar_BL)).mean(dim=1)
