"""The residual layer of a trunk on a GPU, after its product: forward and backward, in Triton.

    x = h + bias + sum,  a = silu(x),  y = (a - mean a) / sqrt(var a + eps)      of each row
    out = weight y + shift,  new sum = sum + out

A program takes tiles of ROWS whole rows and computes in float32. The backward pass makes x, a and y
anew from h, sum, mean and 1 / sqrt(var + eps). Gradients of weight, shift and bias are sums over
all rows: each program writes its part of them, and one more kernel adds the parts in a fixed order.

Shapes: B rows, H columns, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_vasp.kernels.interface import Norm

WIDEST = 8192  # columns; the numbers of a row stay in registers
PROGRAMS = 128  # of the backward pass: one on each multiprocessor of an H100, which has 132
_TILE = 2048  # numbers of a tile: of several rows, or of one with as many or more
_PER_THREAD, _PER_BACKWARD_THREAD = 16, 4  # numbers
_STAGES = 2  # the backward pass reads its next rows while it computes
PARTS_BLOCK = 32


@triton.jit
def places(r, c, n_rows, n_columns, is_there):
    """Which places of some rows and columns hold a number; none where is_there is 0."""
    return (r < n_rows)[:, None] & (c < n_columns * is_there)[None, :]


@triton.jit
def vector(V, c, n_columns):
    """Numbers of a vector as one row: Triton reads them in the order of a tile of one row."""
    return tl.load(V + c[None, :], (c < n_columns)[None, :], 0.0).to(tl.float32)


@triton.jit
def activation(H, Bias, Sum, at, c, here, summed, n_columns, has_bias):
    """x = h + bias + sum, sigmoid(x), and the sum. Beyond the columns x is 0."""
    bias = vector(Bias, c, n_columns * has_bias)
    total = tl.load(Sum + at, summed, 0.0).to(tl.float32)
    x = tl.load(H + at, here, 0.0).to(tl.float32) + bias + total
    return x, 1 / (1 + tl.exp(-x)), total


@triton.jit(do_not_specialize=["n_rows", "has_bias", "has_sum"])
def residual_forward(
    H, Bias, Sum, Weight, Shift, Out, NewSum, Mean, Scale,
    n_rows, n_columns, eps, has_bias, has_sum,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows. Mean and Scale (B,) take the mean and 1 / sqrt(var + eps) of each."""
    r, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    here = places(r, c, n_rows, n_columns, 1)
    summed = places(r, c, n_rows, n_columns, has_sum)
    at = r.to(tl.int64)[:, None] * n_columns + c[None, :]
    x, sigmoid, total = activation(H, Bias, Sum, at, c, here, summed, n_columns, has_bias)
    a = x * sigmoid
    mean = tl.sum(a, 1) / n_columns
    centred = tl.where(here, a - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / n_columns + eps)
    weight = vector(Weight, c, n_columns)
    shift = vector(Shift, c, n_columns)
    out = centred * scale[:, None] * weight + shift
    tl.store(Out + at, out.to(Out.dtype.element_ty), here)
    tl.store(NewSum + at, (total + out).to(NewSum.dtype.element_ty), summed)
    tl.store(Mean + r, mean, r < n_rows)
    tl.store(Scale + r, scale, r < n_rows)


@triton.jit(do_not_specialize=["n_rows", "n_tiles", "has_bias", "has_sum", "has_next"])
def residual_backward(
    H, Bias, Sum, Weight, Mean, Scale, GradOut, GradNext, GradH, GradSum, Parts,
    n_rows, n_columns, n_tiles, has_bias, has_sum, has_next,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """n_tiles tiles of ROWS rows. GradNext: the gradient of the new sum.

    Parts (3, P, H) takes what the rows add to the gradients of weight, shift and bias.
    """
    k, c = tl.program_id(0), tl.arange(0, BLOCK)
    inside = c < n_columns
    weight = vector(Weight, c, n_columns)
    of_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    of_shift = tl.zeros((ROWS, BLOCK), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(k * n_tiles, (k + 1) * n_tiles, num_stages=STAGES):
        r = tile * ROWS + tl.arange(0, ROWS)
        here = places(r, c, n_rows, n_columns, 1)
        summed = places(r, c, n_rows, n_columns, has_sum)
        continued = places(r, c, n_rows, n_columns, has_next)
        at = r.to(tl.int64)[:, None] * n_columns + c[None, :]
        x, sigmoid, _ = activation(H, Bias, Sum, at, c, here, summed, n_columns, has_bias)
        scale = tl.load(Scale + r, r < n_rows, 0.0)[:, None]
        y = (x * sigmoid - tl.load(Mean + r, r < n_rows, 0.0)[:, None]) * scale
        from_next = tl.load(GradNext + at, continued, 0.0).to(tl.float32)
        grad = tl.load(GradOut + at, here, 0.0).to(tl.float32) + from_next
        of_weight += grad * y
        of_shift += grad
        grad = grad * weight
        mean = tl.sum(grad, 1) / n_columns
        slope = tl.sum(grad * y, 1) / n_columns
        grad = (grad - mean[:, None] - y * slope[:, None]) * scale
        grad = tl.where(here, grad * sigmoid * (1 + x * (1 - sigmoid)), 0.0)
        of_bias += grad
        tl.store(GradH + at, grad.to(GradH.dtype.element_ty), here)
        of_sum = (grad + from_next).to(GradSum.dtype.element_ty)
        tl.store(GradSum + at, of_sum, summed & continued)
    part = Parts + k * n_columns + c
    size = tl.num_programs(0) * n_columns
    tl.store(part, tl.sum(of_weight, 0), inside)
    tl.store(part + size, tl.sum(of_shift, 0), inside)
    tl.store(part + 2 * size, tl.sum(of_bias, 0), inside)


@triton.jit(do_not_specialize=["n_parts", "has_bias"])
def add_parts(
    Parts, GradWeight, GradShift, GradBias, n_parts, n_columns, has_bias,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some columns of the gradients of weight, shift and bias: the sums of n_parts parts."""
    p, c = tl.arange(0, PARTS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = (p < n_parts)[:, None] & (c < n_columns)[None, :]
    part, size = Parts + p[:, None] * n_columns + c[None, :], n_parts * n_columns
    of_weight = tl.sum(tl.load(part, here, 0.0), 0)
    of_shift = tl.sum(tl.load(part + size, here, 0.0), 0)
    of_bias = tl.sum(tl.load(part + 2 * size, here, 0.0), 0)
    tl.store(GradWeight + c, of_weight.to(GradWeight.dtype.element_ty), c < n_columns)
    tl.store(GradShift + c, of_shift.to(GradShift.dtype.element_ty), c < n_columns)
    tl.store(GradBias + c, of_bias.to(GradBias.dtype.element_ty), c < n_columns * has_bias)


def fits(h_BH: Tensor) -> bool:
    """Whether the kernels take rows of this type and width."""
    known = h_BH.dtype in (torch.float32, torch.bfloat16)
    return known and h_BH.numel() > 0 and h_BH.shape[1] <= WIDEST


def residual(
    h_BH: Tensor, bias_H: Tensor | None, sum_BH: Tensor | None, norm: Norm
) -> tuple[Tensor, Tensor]:
    """`Kernels.residual` of what `fits`."""
    return _Residual.apply(h_BH, bias_H, sum_BH, *norm)


class _Residual(torch.autograd.Function):
    """Without a sum the new one is out, and both share their memory."""

    @staticmethod
    def forward(
        ctx: Any, h_BH: Tensor, bias_H: Tensor | None, sum_BH: Tensor | None,
        weight_H: Tensor, shift_H: Tensor, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        h_BH = h_BH.contiguous()
        sum_BH = None if sum_BH is None else sum_BH.contiguous()
        n_rows, n_columns = h_BH.shape
        options = forward_options(n_columns)
        out_BH = torch.empty_like(h_BH)
        new_sum_BH = out_BH.detach() if sum_BH is None else torch.empty_like(sum_BH)
        # Apart, so that their addresses are multiples of 16 whatever n_rows is.
        mean_B = h_BH.new_empty(n_rows, dtype=torch.float32)
        scale_B = torch.empty_like(mean_B)
        residual_forward[(triton.cdiv(n_rows, options["ROWS"]),)](
            h_BH, weight_H if bias_H is None else bias_H, h_BH if sum_BH is None else sum_BH,
            weight_H, shift_H, out_BH, new_sum_BH, mean_B, scale_B,
            n_rows, n_columns, eps, int(bias_H is not None), int(sum_BH is not None), **options,
        )  # fmt: skip
        ctx.save_for_backward(h_BH, bias_H, sum_BH, weight_H, shift_H, mean_B, scale_B)
        return out_BH, new_sum_BH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BH: Tensor | None, next_BH: Tensor | None) -> tuple:
        h_BH, bias_H, sum_BH, weight_H, shift_H, mean_B, scale_B = ctx.saved_tensors
        grad_BH = torch.zeros_like(h_BH) if grad_BH is None else grad_BH.contiguous()
        next_BH = None if next_BH is None else next_BH.contiguous()
        n_rows, n_columns = h_BH.shape
        options = backward_options(n_columns)
        n_tiles = triton.cdiv(n_rows, options["ROWS"] * PROGRAMS)
        n_parts = triton.cdiv(n_rows, options["ROWS"] * n_tiles)
        grad_h_BH = torch.empty_like(h_BH)
        differ = sum_BH is not None and next_BH is not None
        grad_sum_BH = torch.empty_like(h_BH) if differ else grad_h_BH
        parts = h_BH.new_empty((3, n_parts, n_columns), dtype=torch.float32)
        residual_backward[(n_parts,)](
            h_BH, weight_H if bias_H is None else bias_H, h_BH if sum_BH is None else sum_BH,
            weight_H, mean_B, scale_B, grad_BH, grad_BH if next_BH is None else next_BH,
            grad_h_BH, grad_sum_BH, parts,
            n_rows, n_columns, n_tiles, int(bias_H is not None), int(sum_BH is not None),
            int(next_BH is not None), **options,
        )  # fmt: skip
        grad_weight_H, grad_shift_H = torch.empty_like(weight_H), torch.empty_like(shift_H)
        grad_bias_H = None if bias_H is None else torch.empty_like(bias_H)
        add_parts[(triton.cdiv(n_columns, PARTS_BLOCK),)](
            parts, grad_weight_H, grad_shift_H, grad_weight_H if bias_H is None else grad_bias_H,
            n_parts, n_columns, int(bias_H is not None), PARTS=PROGRAMS, BLOCK=PARTS_BLOCK,
        )  # fmt: skip
        of_sum = None if sum_BH is None else grad_sum_BH
        return grad_h_BH, grad_bias_H, of_sum, grad_weight_H, grad_shift_H, None


def forward_options(n_columns: int) -> dict[str, int]:
    """Tile and warps of the forward kernel for rows of so many columns."""
    tile = _tile(n_columns)
    return tile | {"num_warps": _warps(tile, _PER_THREAD)}


def backward_options(n_columns: int) -> dict[str, int]:
    """Tile, stages and warps of the backward kernel."""
    tile = _tile(n_columns)
    return tile | {"STAGES": _STAGES, "num_warps": _warps(tile, _PER_BACKWARD_THREAD)}


def _tile(n_columns: int) -> dict[str, int]:
    block = triton.next_power_of_2(n_columns)
    return {"ROWS": max(1, _TILE // block), "BLOCK": block}


def _warps(tile: dict[str, int], per_thread: int) -> int:
    """Warps for a tile with so many numbers per thread; at most 16, for a thread's registers."""
    return min(16, tile["ROWS"] * tile["BLOCK"] // (32 * per_thread))
