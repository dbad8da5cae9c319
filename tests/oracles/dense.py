"""The oracle: VASP in plain dense torch on one process, as a reader of the paper would write it
(DESIGN.md, section 2).

Dense x, whole matrices, autograd, torch.optim. It shares no code with the partitioned model but the
names of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

TORCH_OPTIMIZERS = {
    "nadam": lambda params, lr: torch.optim.NAdam(params, lr=lr, eps=1e-7, momentum_decay=4e-3),
    "adam": lambda params, lr: torch.optim.Adam(params, lr=lr, eps=1e-7),
    "adamw": lambda params, lr: torch.optim.AdamW(params, lr=lr, eps=1e-7, weight_decay=0.0),
}


def dense_rows(rows: list[list[int]], n_items: int, dtype: torch.dtype) -> Tensor:
    """Lists of items -> (rows, I) of zeros and ones."""
    x = torch.zeros((len(rows), n_items), dtype=dtype)
    for b, items in enumerate(rows):
        x[b, items] = 1
    return x


@dataclass
class DenseVASP:
    """`parameters`: `input.weight` (I, H), `output.*` whole (`output.nease.weight` as W^T: row i
    feeds column j), `trunk.*`."""

    kind: str
    parameters: dict[str, Tensor]
    encoder_layers: int
    decoder_layers: int
    latent_head: bool = True
    nease_offset: float = 0.0
    apart: bool = False  # the loss is FLVAE's alone
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = {
            name: p.detach().clone().requires_grad_() for name, p in self.parameters.items()
        }

    def _stack(self, name: str, first: Tensor, n_layers: int) -> Tensor:
        p = self.parameters
        outputs: list[Tensor] = []
        for k in range(n_layers):
            if k == 0:
                a = first
            else:
                a = (
                    outputs[-1] @ p[f"trunk.{name}.layers.{k - 1}.weight"].T
                    + p[f"trunk.{name}.layers.{k - 1}.bias"]
                )
                for earlier in outputs:
                    a = a + earlier
            swish = a * torch.sigmoid(a)
            weight, bias = p[f"trunk.{name}.norms.{k}.weight"], p[f"trunk.{name}.norms.{k}.bias"]
            centred = swish - swish.mean(-1, keepdim=True)
            variance = (centred * centred).mean(-1, keepdim=True)
            outputs.append(centred / torch.sqrt(variance + 1e-3) * weight + bias)
        return outputs[-1]

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The logits of each path (rows, I) and the KL divergence of each row."""
        p, paths, kl = self.parameters, [], torch.zeros(len(x), dtype=x.dtype)
        if self.kind != "nease":
            e = self._stack(
                "encoder", x @ p["input.weight"] + p["trunk.input_bias"], self.encoder_layers
            )
            mu = e @ p["trunk.mu.weight"].T + p["trunk.mu.bias"]
            logvar = e @ p["trunk.logvar.weight"].T + p["trunk.logvar.bias"]
            z = mu if noise is None else mu + torch.exp(logvar / 2) * noise
            d = self._stack(
                "decoder",
                z @ p["trunk.from_latent.weight"].T + p["trunk.from_latent.bias"],
                self.decoder_layers,
            )
            paths.append(d @ p["output.decoder.weight"].T + p["output.decoder.bias"])
            if self.latent_head:
                paths.append(z @ p["output.latent.weight"].T + p["output.latent.bias"])
            kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).mean(dim=1)
        if self.kind != "flvae":
            paths.append(x @ p["output.nease.weight"] + self.nease_offset)
        return paths, kl

    def log_p(self, x: Tensor, loss: str = "focal") -> Tensor:
        """What the model ranks by, (rows, I): log p of every item."""
        paths, _ = self.forward(x)
        if loss == "multinomial":
            return torch.log_softmax(sum(paths), dim=1)
        return sum(torch.nn.functional.logsigmoid(path) for path in paths)

    def factors(self, x: Tensor) -> dict[str, Tensor]:
        """p of every item for one row x (1, I), its factors and NEASE's logit, (I,) each."""
        with torch.no_grad():
            paths = [path[0] for path in self.forward(x)[0]]
        p = [torch.sigmoid(path) for path in paths]
        every = {"p": torch.stack(p).prod(0)}
        if self.kind != "flvae":
            every |= {"logit": paths[-1].clone(), "p_nease": p[-1]}
        return every | ({"p_flvae": torch.stack(p[:-1]).prod(0)} if self.kind == "vasp" else {})

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None,
        kind: str,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> tuple[Tensor, Tensor]:
        """(reconstruction, KL), both averaged over rows."""
        paths, kl = self.forward(x, noise)
        if self.apart:
            paths = paths[:-1]
        p = torch.ones_like(y)
        for path in paths:
            p = p * torch.sigmoid(path)
        nothing = (x.sum(1) == 0) | (y.sum(1) == 0)
        if kind == "focal":
            per_item = torch.where(
                y == 1, -alpha * (1 - p) ** gamma * p.log(), -(1 - alpha) * p**gamma * (1 - p).log()
            )
            per_row = per_item.sum(1)
        elif kind == "bce":
            per_row = torch.where(y == 1, -p.log(), -(1 - p).log()).sum(1)
        elif kind == "mse":
            per_row = ((y - p) ** 2).sum(1)
        elif kind == "cosine":
            cosine = (p * y).sum(1) / (p.norm(dim=1) * y.norm(dim=1).clamp(min=1))
            per_row = torch.where(nothing, 0.0, 1 - cosine)
        else:
            per_row = torch.where(nothing, 0.0, -(y * torch.log_softmax(sum(paths), dim=1)).sum(1))
        return per_row.mean(), kl.mean()

    def step(
        self,
        x,
        y,
        noise,
        kind: str,
        optimizer: torch.optim.Optimizer | None,
        kl_weight: float = 1.0,
    ) -> tuple[float, float]:
        """Loss, gradients (kept in `gradients`, W's diagonal zeroed) and, with an optimizer, one
        update."""
        for p in self.parameters.values():
            p.grad = None
        reconstruction, kl = self.loss(x, y, noise, kind)
        (reconstruction + kl_weight * kl).backward()
        W = self.parameters.get("output.nease.weight")
        if W is not None and W.grad is not None:
            W.grad.fill_diagonal_(0)
        self.gradients = {
            name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None
        }
        if optimizer is not None:
            optimizer.step()
        return float(reconstruction.detach()), float(kl.detach())
