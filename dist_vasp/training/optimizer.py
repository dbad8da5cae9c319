"""Nadam, Adam and AdamW, updated in place: one rule for the trunk (inside DeepSpeed) and the item
matrices (outside it).

An update is one compiled pass over parameter, gradient and moments; uncompiled, it walks them in
chunks that stay in cache. Either way each is read and written once, and no temporary has the
parameter's size (torch.optim.NAdam needs 32 to 37 bytes a parameter at its peak).

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    denom = sqrt(v / (1 - b2^t)) + eps
    Adam   p -= lr / (1 - b1^t) * m / denom
    AdamW  first multiplies p by 1 - lr * weight_decay
    Nadam  p -= lr * ((1 - mu_t) / (1 - prod mu_1..t) * g
                      + mu_(t+1) / (1 - prod mu_1..t+1) * m) / denom
           mu_t = b1 * (1 - 0.5 * 0.96^(t * momentum_decay))

Sources: Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW), Dozat 2016 (Nadam); the same
numbers as torch.optim's Adam, AdamW and NAdam.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.parallel.kernels import Fuse, plain

CPU_CHUNK = (
    1 << 16
)  # elements; parameter, gradient, two moments and two temporaries of it fit a core's cache
FUSED_CHUNK = 1 << 22  # what a compiled call costs, some 75 us, is little beside it
SMALL = 1 << 14  # elements, as of a bias: for these it is not

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALARS = ("step", "mu_product")


class Factors(NamedTuple):
    """The scalars of one step's update, as tensors: a compiled update would be compiled anew for
    every other number."""

    of_grad: Tensor
    of_momentum: Tensor
    of_root: Tensor
    shrink: Tensor


class InPlaceAdam(torch.optim.Optimizer):
    """Adam, AdamW or Nadam by `config.name`.

    `grad_scale` multiplies every gradient before it is used (joint clipping). State per parameter:
    `exp_avg` and `exp_avg_sq` of its shape, and the scalars `step` and `mu_product`. A parameter
    group with `lean_dim` keeps one second moment per vector along that dimension of its matrices
    (the mean of the squared gradient), as embedding libraries do: about 8 bytes per weight.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        config: OptimizerConfig,
        lr: float = 0.0,
        fuse: Fuse = plain,
    ) -> None:
        super().__init__(params, {"lr": lr, "lean_dim": None, "rate": 1.0})
        self.config = config
        self.grad_scale = 1.0
        self._factors: dict[Tensor, Factors] = {}
        self._fused = fuse is not plain
        self._all, self._weights = fuse(self._update_all), fuse(self._update_weights)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """Update every parameter from its `.grad`."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                by = self._advance(params, group["lr"])
                self._apply_together([p for p in params if self._is_small(p)], by)
                for p in params:
                    if not self._is_small(p):
                        self._apply(p, p.grad, self.state[p], by)  # type: ignore[arg-type]

    def begin_step(self) -> None:
        """Count a step for every parameter at once; `update` then takes their gradients piece by
        piece."""
        for group in self.param_groups:
            factors = self._advance(group["params"], group["lr"])
            self._factors |= dict.fromkeys(group["params"], factors)

    @torch.no_grad()
    def update(self, parameter: Tensor, first: int, grad: Tensor) -> Tensor:
        """Update the rows of `parameter` from `first` on with their gradient, in the step that
        `begin_step` opened.

        Returns the squared norm of the gradient as it was used, a scalar: it passes through the
        registers anyway. A lean matrix whose vectors are its columns wants all of its rows at once.
        """
        rows, state = slice(first, first + len(grad)), self.state[parameter]
        moments = {
            name: state[name][rows] if len(state[name]) == len(parameter) else state[name]
            for name in MOMENTS
        }
        assert parameter in self._factors, "begin_step comes first"
        return self._apply(parameter[rows], grad, moments, self._factors[parameter])

    def ensure_state(self, p: Tensor) -> dict:
        """The state of `p`, created empty if there is none."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["mu_product"] = torch.ones((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            shape = list(p.shape)
            lean_dim = self._lean_dim(p)
            if lean_dim is not None:
                shape[1 - lean_dim] = 1
            state["exp_avg_sq"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
        return state

    def _lean_dim(self, p: Tensor) -> int | None:
        """The dimension along which each vector of `p` shares a second moment; None where every
        weight has its own."""
        groups = [group for group in self.param_groups if any(p is q for q in group["params"])]
        return groups[0]["lean_dim"] if groups and p.dim() == 2 else None

    def forget(self) -> None:
        """Start the moments anew, as the authors' code does where the learning rate changes."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()
            state["mu_product"].fill_(1.0)

    def _advance(self, params: list[Tensor], lr: float) -> Factors:
        """Count a step in the state of each; what the step, one for all of them, multiplies
        gradient, momentum and weights by."""
        c, states = self.config, [self.ensure_state(p) for p in params]
        t = float(states[0]["step"]) + 1
        of_grad, of_momentum, mu = 0.0, lr / (1 - c.beta1**t), 1.0
        if c.name == "nadam":
            mu, mu_next = (c.beta1 * (1 - 0.5 * 0.96 ** (s * c.momentum_decay)) for s in (t, t + 1))
            product = float(states[0]["mu_product"]) * mu
            of_grad, of_momentum = (
                lr * (1 - mu) / (1 - product),
                lr * mu_next / (1 - product * mu_next),
            )
        for state in states:
            state["step"] += 1
            state["mu_product"] *= mu
        numbers = (of_grad, of_momentum, (1 - c.beta2**t) ** -0.5, 1 - lr * c.weight_decay)
        return Factors(*torch.tensor(numbers, dtype=torch.float64).unbind())

    def _apply(self, p: Tensor, grad: Tensor, state: dict, by: Factors) -> Tensor:
        m, v = (state[name] for name in MOMENTS)
        squared_norm = grad.new_zeros(())
        if v.shape == p.shape:
            update = self._all if p.numel() > SMALL else self._update_all
            for p_n, g_n, m_n, v_n in zip(
                *(x.view(-1).split(self._chunk(p)) for x in (p, grad, m, v)), strict=True
            ):
                squared_norm += update(p_n, self._scaled(g_n), m_n, v_n, by)
        else:
            denom = self._lean_denom(grad, v, by).expand_as(p)
            rows = max(1, self._chunk(p) // p.shape[1])
            for p_n, g_n, m_n, denom_n in zip(
                *(x.split(rows) for x in (p, grad, m, denom)), strict=True
            ):
                squared_norm += self._weights(p_n, self._scaled(g_n), m_n, denom_n, by)
        return squared_norm

    def _is_small(self, p: Tensor) -> bool:
        return p.numel() <= SMALL and self.state[p]["exp_avg_sq"].shape == p.shape

    def _apply_together(self, params: list[Tensor], by: Factors) -> None:
        """Update small parameters, such as biases, as if they were one: what a call costs is more
        than what it does."""
        if not params:
            return
        moments = [[self.state[p][name].view(-1) for p in params] for name in MOMENTS]
        parts = [[p.view(-1) for p in params], *moments]
        p_n, m_n, v_n = (torch.cat(part) for part in parts)
        grad_n = torch.cat([p.grad.reshape(-1) for p in params])  # type: ignore[union-attr]
        self._update_all(p_n, self._scaled(grad_n), m_n, v_n, by)
        for part, updated_n in zip(parts, (p_n, m_n, v_n), strict=True):
            torch._foreach_copy_(part, list(updated_n.split([len(x) for x in part])))

    def _lean_denom(self, grad: Tensor, v: Tensor, by: Factors) -> Tensor:
        """Update the one second moment per row (n, 1) or per column (1, n); the denominator of its
        shape."""
        along = 0 if v.shape[1] == grad.shape[1] else 1
        rows = max(1, CPU_CHUNK // grad.shape[1]) if grad.device.type == "cpu" else len(grad)
        sums = [(g_n * g_n).sum(dim=along, keepdim=True) for g_n in grad.split(rows)]
        squared = (torch.cat(sums) if along else torch.stack(sums).sum(dim=0)).mul_(
            self.grad_scale**2 / grad.shape[along]
        )
        assert squared.shape == v.shape, (squared.shape, v.shape)
        v.lerp_(squared, 1 - self.config.beta2)
        return self._denom(v, by)

    def _scaled(self, grad: Tensor) -> Tensor:
        return grad if self.grad_scale == 1.0 else grad * self.grad_scale

    def _chunk(self, p: Tensor) -> int:
        """Elements to update at once."""
        if p.device.type != "cpu":
            return max(1, p.numel())
        return FUSED_CHUNK if self._fused else CPU_CHUNK

    def _denom(self, v: Tensor, by: Factors) -> Tensor:
        return v.sqrt().mul_(by.of_root).add_(self.config.eps)

    def _update_all(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Factors) -> Tensor:
        """Both moments, then the weights, all of one shape; |g|^2."""
        v.mul_(self.config.beta2).addcmul_(g, g, value=1 - self.config.beta2)
        return self._update_weights(p, g, m, self._denom(v, by), by)

    def _update_weights(
        self, p: Tensor, g: Tensor, m: Tensor, denom: Tensor, by: Factors
    ) -> Tensor:
        """The momentum, then the weights; |g|^2."""
        c = self.config
        m.lerp_(g, 1 - c.beta1)
        step = m * by.of_momentum
        if c.name == "nadam":
            step += g * by.of_grad
        if c.weight_decay:
            p.mul_(by.shrink)
        p.addcdiv_(step, denom, value=-1)
        return (g * g).sum()
