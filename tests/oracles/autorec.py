"""The oracle: U-AutoRec in plain dense torch (Sedhain et al. 2015, equations 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.oracles.dense import DenseVASP


@dataclass
class DenseAutoRec(DenseVASP):
    """h(x) = R sigmoid(V x + mu) + b."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        p = self.parameters
        hidden = torch.sigmoid(x @ p["input.weight"] + p["trunk.input_bias"])
        scores = hidden @ p["output.decoder.weight"].T + p["output.decoder.bias"]
        return [scores], torch.zeros(len(x), dtype=x.dtype)

    def log_p(self, x: Tensor, loss: str = "squared") -> Tensor:
        return self.forward(x)[0][0]

    def loss(self, x: Tensor, y: Tensor, noise: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (scores,), kl = self.forward(x)
        return ((y - scores) ** 2).sum(1).mean(), kl.mean()
