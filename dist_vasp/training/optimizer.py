"""Nadam, Adam and AdamW, updated in place: one rule for the trunk (inside DeepSpeed) and the item matrices (outside it).

Every parameter is walked in chunks that stay in cache, so an update reads and writes parameter, gradient and moments once
and needs no temporary of the parameter's size (torch.optim.NAdam needs 32 to 37 bytes a parameter at its peak).

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2          denom = sqrt(v / (1 - b2^t)) + eps
    Adam   p -= lr / (1 - b1^t) * m / denom                          AdamW first shrinks p by 1 - lr * weight_decay
    Nadam  p -= lr * ((1 - mu_t) / (1 - prod mu_1..t) * g  +  mu_(t+1) / (1 - prod mu_1..t+1) * m) / denom
           mu_t = b1 * (1 - 0.5 * 0.96^(t * momentum_decay))

Sources: Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW), Dozat 2016 (Nadam); the same numbers as torch.optim's
Adam, AdamW and NAdam.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dist_vasp.config import OptimizerConfig

CPU_CHUNK = 1 << 16  # elements; parameter, gradient, two moments and two temporaries of it fit a core's cache

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALARS = ("step", "mu_product")


class InPlaceAdam(torch.optim.Optimizer):
    """Adam, AdamW or Nadam by `config.name`. `grad_scale` multiplies every gradient before it is used (joint clipping).

    State per parameter: `exp_avg`, `exp_avg_sq` of its shape, and the scalars `step` and `mu_product`.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict], config: OptimizerConfig, lr: float = 0.0) -> None:
        super().__init__(params, {"lr": lr})
        self.config = config
        self.grad_scale = 1.0

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.ensure_state(p)
                    state["step"] += 1
                    self._update(p, group["lr"], state)

    def ensure_state(self, p: Tensor) -> dict:
        """The state of `p`, created empty if there is none."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["mu_product"] = torch.ones((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return state

    def forget(self) -> None:
        """Start the moments anew, as the authors' code does where the learning rate changes."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()
            state["mu_product"].fill_(1.0)

    def _update(self, p: Tensor, lr: float, state: dict) -> None:
        c, t = self.config, float(state["step"])
        grad_factor, momentum_factor = 0.0, lr / (1 - c.beta1**t)
        if c.name == "nadam":
            mu, mu_next = (c.beta1 * (1 - 0.5 * 0.96 ** (s * c.momentum_decay)) for s in (t, t + 1))
            state["mu_product"] *= mu
            product = float(state["mu_product"])
            grad_factor, momentum_factor = lr * (1 - mu) / (1 - product), lr * mu_next / (1 - product * mu_next)
        root_correction = (1 - c.beta2**t) ** 0.5
        shrink = 1 - lr * c.weight_decay

        flat = [x.view(-1) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"])]
        chunk = CPU_CHUNK if p.device.type == "cpu" else p.numel()
        for p_n, g_n, m_n, v_n in zip(*(x.split(max(1, chunk)) for x in flat), strict=True):
            if self.grad_scale != 1.0:
                g_n = g_n * self.grad_scale
            m_n.lerp_(g_n, 1 - c.beta1)
            v_n.mul_(c.beta2).addcmul_(g_n, g_n, value=1 - c.beta2)
            denom_n = v_n.sqrt().div_(root_correction).add_(c.eps)
            if shrink != 1.0:
                p_n.mul_(shrink)
            if grad_factor:
                p_n.addcdiv_(g_n, denom_n, value=-grad_factor)
            p_n.addcdiv_(m_n, denom_n, value=-momentum_factor)
