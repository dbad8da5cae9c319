"""The Adam rules in plain torch, for parameters that no kernel updates (`optimizer.py` has them).

An update is one compiled pass over parameter, gradient and moments; uncompiled, it walks them in
chunks that stay in cache. Either way each is read and written once, and no temporary has the
parameter's size (torch.optim.NAdam needs 32 to 37 bytes a parameter at its peak).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels.interface import CPU_CHUNK, Kernels
from dist_vasp.training.step.adam_step import Factors

SMALL = 1 << 14  # numbers, as of a bias: a call costs more than the update of as many

Scale = float | Tensor  # of a gradient: a number, or a scalar of the device


class PlainUpdate:
    """Updates weights and moments in place."""

    def __init__(self, config: OptimizerConfig, kernels: Kernels) -> None:
        self._config, self._kernels = config, kernels
        self._all = kernels.fuse(self._update_all)
        self._weights = kernels.fuse(self._update_weights)

    def apply(
        self, p: Tensor, grad: Tensor, m: Tensor, v: Tensor, by: Factors, scale: Scale
    ) -> Tensor:
        """Update weights and moments; v of the shape of p, or one number for each row or column.

        Returns the squared norm of the scaled gradient, a scalar.
        """
        grad = grad.to(p.dtype)
        squared_norm = grad.new_zeros(())
        if v.shape == p.shape:
            update = self._all if p.numel() > SMALL else self._update_all
            for p_n, g_n, m_n, v_n in zip(
                *(x.view(-1).split(self._chunk(p)) for x in (p, grad, m, v)), strict=True
            ):
                squared_norm += update(p_n, scaled(g_n, scale), m_n, v_n, by)
        else:
            denom = self.lean_denominators(grad, v, by, scale).expand_as(p)
            rows = max(1, self._chunk(p) // p.shape[1])
            for p_n, g_n, m_n, denom_n in zip(
                *(x.split(rows) for x in (p, grad, m, denom)), strict=True
            ):
                squared_norm += self._weights(p_n, scaled(g_n, scale), m_n, denom_n, by)
        return squared_norm

    def apply_together(self, parts: list[list[Tensor]], by: Factors, scale: Scale) -> None:
        """Update several small parameters as if they were one: what a call costs is more than what
        it does. parts: parameters, first moments, second moments, gradients."""
        if not parts[0]:
            return
        flat = [[x.view(-1) for x in part] for part in parts[:3]]
        p_n, m_n, v_n = (torch.cat(part) for part in flat)
        grad_n = torch.cat([grad.reshape(-1) for grad in parts[3]])
        self._update_all(p_n, scaled(grad_n, scale), m_n, v_n, by)
        for part, updated_n in zip(flat, (p_n, m_n, v_n), strict=True):
            torch._foreach_copy_(part, list(updated_n.split([len(x) for x in part])))

    def lean_denominators(self, grad: Tensor, v: Tensor, by: Factors, scale: Scale) -> Tensor:
        """Update the one second moment per row (n, 1) or per column (1, n); the denominator of its
        shape."""
        along = 0 if v.shape[1] == grad.shape[1] else 1
        rows = max(1, CPU_CHUNK // grad.shape[1]) if grad.device.type == "cpu" else len(grad)
        sums = [(g_n * g_n).sum(dim=along, keepdim=True) for g_n in grad.split(rows)]
        squared = torch.cat(sums) if along else torch.stack(sums).sum(dim=0)
        return self.denominators_of_squares(v, squared, grad.shape[along], by, scale)

    def denominators_of_squares(
        self, v: Tensor, squared: Tensor, n: int, by: Factors, scale: Scale
    ) -> Tensor:
        """Move the second moments towards the mean of n squared gradients, given their sums; the
        denominator of their shape."""
        assert squared.shape == v.shape, (squared.shape, v.shape)
        v.lerp_(squared * (scale**2 / n), 1 - self._config.beta2)
        return self._denom(v, by)

    def _chunk(self, p: Tensor) -> int:
        """Numbers to update at once."""
        return max(1, p.numel()) if p.device.type != "cpu" else self._kernels.chunk

    def _denom(self, v: Tensor, by: Factors) -> Tensor:
        return v.sqrt().mul_(by.of_root).add_(self._config.eps)

    def _update_all(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Factors) -> Tensor:
        """Both moments, then the weights, all of one shape; |g|^2."""
        v.mul_(self._config.beta2).addcmul_(g, g, value=1 - self._config.beta2)
        return self._update_weights(p, g, m, self._denom(v, by), by)

    def _update_weights(
        self, p: Tensor, g: Tensor, m: Tensor, denom: Tensor, by: Factors
    ) -> Tensor:
        """The momentum, then the weights; |g|^2."""
        c = self._config
        m.lerp_(g, 1 - c.beta1)
        step = m * by.of_momentum
        if c.name == "nadam":
            step += g * by.of_grad
        if c.weight_decay:
            p.mul_(by.shrink)
        p.addcdiv_(step, denom, value=-1)
        return (g * g).sum()


def scaled(grad: Tensor, scale: Scale) -> Tensor:
    """The gradient times its scale."""
    return grad if isinstance(scale, float) and scale == 1.0 else grad * scale
