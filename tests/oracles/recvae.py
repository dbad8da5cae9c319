"""The oracle: RecVAE in plain dense torch, as in the paper (Shenbin et al. 2020, section 3).

It shares no code with the partitioned model but the names of parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal


@dataclass
class DenseRecVae:
    """`parameters`: `input.weight` (I, H), `output.decoder.*` whole, `trunk.*`.

    old: `input.weight` and `trunk.*` of the encoder before the present phase.
    """

    parameters: dict[str, Tensor]
    layers: int
    dropout: float = 0.0
    old: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = {
            name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()
        }
        if not self.old:
            self.copy_encoder()

    def encoder_names(self) -> list[str]:
        return [name for name in self.parameters if not name.startswith("output.")]

    def copy_encoder(self) -> None:
        self.old = {name: self.parameters[name].detach().clone() for name in self.encoder_names()}

    def encode(self, p: dict[str, Tensor], x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent code (rows, L)."""
        unit = x / (x.sum(1, keepdim=True).clamp(min=1) * (1 - dropout)).sqrt()
        outputs: list[Tensor] = []
        for k in range(self.layers):
            if k == 0:
                a = unit @ p["input.weight"] + p["trunk.input_bias"]
            else:
                layer = f"trunk.encoder.layers.{k - 1}"
                a = outputs[-1] @ p[f"{layer}.weight"].T + p[f"{layer}.bias"] + sum(outputs)
            swish = a * torch.sigmoid(a)
            centred = swish - swish.mean(-1, keepdim=True)
            variance = (centred * centred).mean(-1, keepdim=True)
            norm = f"trunk.encoder.norms.{k}"
            scaled = centred / torch.sqrt(variance + 0.1)
            outputs.append(scaled * p[f"{norm}.weight"] + p[f"{norm}.bias"])
        heads = [
            outputs[-1] @ p[f"trunk.{name}.weight"].T + p[f"trunk.{name}.bias"]
            for name in ("mu", "logvar")
        ]
        return heads[0], heads[1]

    def log_p(self, x: Tensor) -> Tensor:
        """What the model ranks by, (rows, I)."""
        return torch.log_softmax(self.decode(self.encode(self.parameters, x, 0.0)[0]), dim=1)

    def decode(self, z: Tensor) -> Tensor:
        p = self.parameters
        return z @ p["output.decoder.weight"].T + p["output.decoder.bias"]

    def loss(self, x: Tensor, y: Tensor, noise: Tensor, encoder: bool) -> tuple[Tensor, Tensor]:
        """(reconstruction, KL times the interactions of a row), both averaged over rows."""
        dropout = self.dropout if encoder else 0.0
        mu, logvar = self.encode(self.parameters, x, dropout)
        z = mu + torch.exp(logvar / 2) * noise
        nothing = (x.sum(1) == 0) | (y.sum(1) == 0)
        of_row = -(y * torch.log_softmax(self.decode(z), dim=1)).sum(1)
        reconstruction = torch.where(nothing, 0.0, of_row).mean()
        old_mu, old_logvar = self.encode(self.old, y, 0.0)
        log_q = -0.5 * (noise**2 + logvar + math.log(2 * math.pi))
        densities = [
            weight * torch.exp(-((z - m) ** 2) / (2 * torch.exp(v)) - v / 2) / (2 * torch.pi) ** 0.5
            for weight, m, v in (
                (0.15, 0 * mu, 0 * mu),
                (0.75, old_mu, old_logvar),
                (0.10, 0 * mu, 0 * mu + 10),
            )
        ]
        of_code = (log_q - torch.log(sum(densities))).sum(1)
        kl = (y.sum(1) * of_code).mean() if encoder else torch.zeros((), dtype=z.dtype)
        return reconstruction, kl

    def step(
        self, x: Tensor, y: Tensor, noise: Tensor, encoder: bool, gamma: float
    ) -> tuple[float, float]:
        """Loss and gradients (kept in `.grad`) of what the phase trains."""
        names = self.encoder_names()
        for name, p in self.parameters.items():
            p.grad = None
            p.requires_grad_((name in names) == encoder)
        reconstruction, kl = self.loss(x, y, noise, encoder)
        (reconstruction + gamma * kl).backward()
        return float(reconstruction.detach()), float(kl.detach())


def mixture_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log of the composite prior by torch.distributions, for the prior's own test."""
    means = torch.stack([0 * mu, mu, 0 * mu], dim=-1)
    deviations = torch.stack([0 * mu, logvar, 0 * mu + 10], dim=-1).div(2).exp()
    weights = torch.tensor([0.15, 0.75, 0.10], dtype=mu.dtype).expand_as(means)
    return MixtureSameFamily(Categorical(probs=weights), Normal(means, deviations)).log_prob(z)
