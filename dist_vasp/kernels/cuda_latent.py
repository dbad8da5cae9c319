"""The latent code and its divergence (latent.py) on a GPU, each in one pass, in Triton.

    z = mu + exp(logvar / 2) noise,  kl = mean over L of (mu^2 + exp(logvar) - 1 - logvar) / 2

Shapes: B rows, L latent width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LATENT = {"BLOCK": 1024, "num_warps": 4}  # 8 numbers per thread


@triton.jit
def latent_forward(Mu, LogVar, Noise, Z, Kl, n_columns, BLOCK: tl.constexpr):
    """One row of z, and its divergence."""
    r = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_columns, BLOCK):
        c = start + tl.arange(0, BLOCK)
        here, at = c < n_columns, r.to(tl.int64) * n_columns + c
        mu = tl.load(Mu + at, here, 0.0).to(tl.float32)
        logvar = tl.load(LogVar + at, here, 0.0).to(tl.float32)
        noise = tl.load(Noise + at, here, 0.0).to(tl.float32)
        z = mu + tl.exp(logvar / 2) * noise
        tl.store(Z + at, z.to(Z.dtype.element_ty), here)
        total += mu * mu + tl.exp(logvar) - 1 - logvar  # 0 beyond the columns
    tl.store(Kl + r, tl.sum(total) / (2 * n_columns))


@triton.jit
def latent_backward(
    Mu, LogVar, Noise, GradZ, GradKl, GradMu, GradLogVar, n_columns, BLOCK: tl.constexpr
):
    """A block of columns of one row."""
    r, c = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here, at = c < n_columns, r.to(tl.int64) * n_columns + c
    mu = tl.load(Mu + at, here, 0.0).to(tl.float32)
    logvar = tl.load(LogVar + at, here, 0.0).to(tl.float32)
    noise = tl.load(Noise + at, here, 0.0).to(tl.float32)
    of_z = tl.load(GradZ + at, here, 0.0).to(tl.float32)
    of_kl = tl.load(GradKl + r) / n_columns
    of_mu = of_z + of_kl * mu
    of_logvar = (of_z * noise * tl.exp(logvar / 2) + of_kl * (tl.exp(logvar) - 1)) / 2
    tl.store(GradMu + at, of_mu.to(GradMu.dtype.element_ty), here)
    tl.store(GradLogVar + at, of_logvar.to(GradLogVar.dtype.element_ty), here)


def fits(mu_BL: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take a mean of this type and give a divergence of this one."""
    known = mu_BL.dtype in (torch.float32, torch.bfloat16) and dtype == torch.float32
    return known and mu_BL.numel() > 0


def latent_code(mu_BL: Tensor, logvar_BL: Tensor, noise_BL: Tensor) -> tuple[Tensor, Tensor]:
    """`Kernels.latent_code` of what `fits`, with noise."""
    return _LatentCode.apply(mu_BL, logvar_BL, noise_BL)


class _LatentCode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mu_BL: Tensor, logvar_BL: Tensor, noise_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        read = [of.contiguous() for of in (mu_BL, logvar_BL, noise_BL)]
        n_rows, n_columns = mu_BL.shape
        z_BL = torch.empty_like(read[0])
        kl_B = mu_BL.new_empty(n_rows, dtype=torch.float32)
        latent_forward[(n_rows,)](*read, z_BL, kl_B, n_columns, **LATENT)
        ctx.save_for_backward(*read)
        return z_BL, kl_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BL: Tensor, grad_B: Tensor) -> tuple:
        mu_BL, logvar_BL, noise_BL = ctx.saved_tensors
        n_rows, n_columns = mu_BL.shape
        grads = torch.empty_like(mu_BL), torch.empty_like(logvar_BL)
        latent_backward[(n_rows, triton.cdiv(n_columns, LATENT["BLOCK"]))](
            mu_BL, logvar_BL, noise_BL, grad_BL.contiguous(), grad_B.contiguous(), *grads,
            n_columns, **LATENT,
        )  # fmt: skip
        return *grads, None
