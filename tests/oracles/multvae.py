"""The oracle: Mult-VAE in plain dense torch, as in the paper (Liang et al. 2018, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.dense import DenseVASP


@dataclass
class DenseMultVae(DenseVASP):
    """I-H-L-H-I with tanh on rows of length 1."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        p = self.parameters
        length = x.norm(dim=1, keepdim=True)
        unit = torch.where(length > 0, x / length.clamp(min=1e-30), 0.0)
        h = torch.tanh(unit @ p["input.weight"] + p["trunk.input_bias"])
        mu = h @ p["trunk.mu.weight"].T + p["trunk.mu.bias"]
        logvar = h @ p["trunk.logvar.weight"].T + p["trunk.logvar.bias"]
        z = mu if noise is None else mu + torch.exp(logvar / 2) * noise
        d = torch.tanh(z @ p["trunk.from_latent.weight"].T + p["trunk.from_latent.bias"])
        logits = d @ p["output.decoder.weight"].T + p["output.decoder.bias"]
        kl = 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(dim=1)
        return [logits], kl
