"""VASP in plain torch, as a user would write it: dense x, autograd, torch.optim.NAdam.

The yardstick of benchmarks/step.py. Published structure and loss (arXiv 2102.05774), nothing
partitioned; W's diagonal is set to zero after each step.

Shapes: B rows, I items, H hidden, L latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from dist_vasp.config.schema import Config
from dist_vasp.data.rows import Rows
from dist_vasp.data.stream import Batch

LN_EPS = 1e-3


class Stack(nn.Module):
    """Densely residual layers: the sum of all earlier outputs enters the next one."""

    def __init__(self, n_layers: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, eps=LN_EPS) for _ in range(n_layers))
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(n_layers - 1))

    def forward(self, first_BH: Tensor) -> Tensor:
        out_BH = self.norms[0](silu(first_BH))
        sum_BH = out_BH
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            out_BH = norm(silu(layer(out_BH) + sum_BH))
            sum_BH = sum_BH + out_BH
        return out_BH


class PlainVASP(nn.Module):
    """x (B, I), noise (B, L) -> three logits (B, I) each, and the KL divergence of each row."""

    def __init__(self, config: Config, n_items: int) -> None:
        super().__init__()
        m = config.model
        self.input = nn.Linear(n_items, m.hidden)
        self.encoder = Stack(m.encoder_layers, m.hidden)
        self.mu, self.logvar = nn.Linear(m.hidden, m.latent), nn.Linear(m.hidden, m.latent)
        self.from_latent = nn.Linear(m.latent, m.hidden)
        self.decoder = Stack(m.decoder_layers, m.hidden)
        self.of_decoder = nn.Linear(m.hidden, n_items)
        self.of_latent = nn.Linear(m.latent, n_items)
        self.nease = nn.Linear(n_items, n_items, bias=False)

    def forward(self, x_BI: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        e_BH = self.encoder(self.input(x_BI))
        mu_BL, logvar_BL = self.mu(e_BH), self.logvar(e_BH)
        z_BL = mu_BL + torch.exp(logvar_BL / 2) * noise_BL
        d_BH = self.decoder(self.from_latent(z_BL))
        mu_BL, logvar_BL = mu_BL.float(), logvar_BL.float()
        kl_B = -0.5 * (1 + logvar_BL - mu_BL**2 - logvar_BL.exp()).mean(dim=1)
        return self.of_decoder(d_BH), self.of_latent(z_BL), self.nease(x_BI), kl_B


def focal_loss(
    model: PlainVASP, x_BI: Tensor, y_BI: Tensor, noise_BL: Tensor, alpha: float, gamma: float
) -> Tensor:
    """Forward and loss, a scalar."""
    *logits, kl_B = model(x_BI, noise_BL)
    log_p = sum(logsigmoid(logit.float()) for logit in logits)
    p = log_p.exp()
    q = (1 - p).clamp(min=1e-7)
    entries = torch.where(
        y_BI > 0, -alpha * q**gamma * log_p, (alpha - 1) * p**gamma * torch.log(q)
    )
    return entries.sum(dim=1).mean() + kl_B.mean()


class PlainTrainer:
    """Steps of a PlainVASP on one device, in one precision of `kernels/precision.py`."""

    def __init__(
        self, config: Config, n_items: int, device: torch.device, precision: str, compiled: bool
    ) -> None:
        torch.manual_seed(config.run.seed)
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        self.config, self.n_items, self.device = config, n_items, device
        self.half = precision == "bf16"
        with device:  # 617M weights take a minute of one core
            self.model = PlainVASP(config, n_items)
        self._clear_diagonal()
        o = config.optimizer
        self.optimizer = torch.optim.NAdam(
            self.model.parameters(), config.lr(0), (o.beta1, o.beta2), o.eps, foreach=True
        )
        self.loss = torch.compile(focal_loss) if compiled else focal_loss

    def step(self, batch: Batch) -> float:
        """One update; returns the loss."""
        x_BI, y_BI = self._dense(batch.inputs), self._dense(batch.targets)
        noise_BL = torch.randn(len(x_BI), self.config.model.latent, device=self.device)
        of = self.config.loss
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            loss = self.loss(self.model, x_BI, y_BI, noise_BL, of.alpha, of.gamma)
        loss.backward()
        self.optimizer.step()
        self._clear_diagonal()
        return float(loss.detach())

    @torch.no_grad()
    def _clear_diagonal(self) -> None:
        self.model.nease.weight.fill_diagonal_(0)

    def _dense(self, rows: Rows) -> Tensor:
        dense_BI = torch.zeros(rows.n_rows, self.n_items, device=self.device)
        row_of = torch.repeat_interleave(
            torch.arange(rows.n_rows, device=self.device),
            torch.from_numpy(rows.lengths).to(self.device),
            output_size=len(rows.items),
        )
        dense_BI[row_of, torch.from_numpy(rows.items).long().to(self.device)] = 1
        return dense_BI
