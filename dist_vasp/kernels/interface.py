"""What is computed for items, in plain torch: the meaning of every kernel (DESIGN.md, section 9).

`Kernels` is the interface. `compiled.py` and `cuda.py` compute the same, to rounding.

Shapes: n rows or bags, E ids, C columns of a table, G rows of a step, J items of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, layer_norm, silu

from dist_vasp.kernels.latent import kl_divergence, sample
from dist_vasp.kernels.precision import FP32, Precision

F = TypeVar("F", bound=Callable)

CPU_CHUNK = 1 << 16  # numbers; weight, gradient, two moments and two temporaries stay in cache


Bags = tuple[Tensor, Tensor]  # ids (E,) of rows, index pointer (n + 1,), which may start anywhere


class AdamStep(NamedTuple):
    """The numbers of one step of an Adam rule, as `training/step/optimizer.py` defines them.

    The weights are multiplied by `shrink` and lose (of_momentum m + of_grad g) / denominator. rest1
    and rest2: 1 - beta1 and 1 - beta2, which float32 would round. Kernels read all of them from the
    device, as float32 in this order: so a captured step can be replayed with others.
    """

    beta1: float
    beta2: float
    eps: float
    of_grad: float
    of_momentum: float
    of_root: float
    shrink: float
    rest1: float
    rest2: float
    grad_scale: float


@dataclass(frozen=True)
class Weights:
    """Some weights, their moments, and their copy for products.

    second: second moments, of the shape of the weights, or (n, 1) for `update_rows`. With
    `denominators` (n, 1) or (1, C) there are no second moments to update. copy: in the precision of
    the products, None without one.
    """

    weights: Tensor
    first: Tensor
    second: Tensor | None
    denominators: Tensor | None = None
    copy: Tensor | None = None


class Norm(NamedTuple):
    """Layer normalisation of rows: y times a weight plus a shift, (H,) each."""

    weight_H: Tensor
    shift_H: Tensor
    eps: float


class Kernels:
    """Plain torch.

    align: the item axis of a rank is padded to a multiple of it. chunk: numbers that an update on a
    CPU takes at once. gradient_rows: rows of an items x items gradient that are made at once.
    updates_alone: whether the methods from `update_sum` on exist. adds_bias: whether `residual`
    adds the bias of the product before it; plain torch adds it inside the product.
    seconds_to_compile: what the kernels of a step take once.
    """

    align: ClassVar[int] = 1
    chunk: ClassVar[int] = CPU_CHUNK
    gradient_rows: ClassVar[int] = 1024
    updates_alone: ClassVar[bool] = False
    adds_bias: ClassVar[bool] = False
    seconds_to_compile: ClassVar[float] = 0.0

    def padded(self, n: int) -> int:
        """How many items n items and their padding are."""
        return -(-n // self.align) * self.align

    def fuse(self, function: F) -> F:
        """Return the function, computed in one pass over memory where that is possible."""
        return function

    def sum_rows(
        self, table: Tensor, ids: Tensor, indptr: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Row n of the result is the sum of `table[ids[indptr[n]:indptr[n + 1]]]`: (n, C).

        An empty bag sums to zero. dtype: of the result, that of the table by default.
        """
        if len(ids) == 0:
            return table.new_zeros((len(indptr) - 1, table.shape[1]), dtype=dtype)
        sums = embedding_bag(ids, table, indptr, mode="sum", include_last_offset=True)
        return sums if dtype is None else sums.to(dtype)

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """a @ b with sums and result of a wider dtype than theirs."""
        return a.to(dtype) @ b.to(dtype)

    def ones(
        self, positions: tuple[Tensor, Tensor], shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """A tensor of zeros with ones at (rows, columns), for `gram`."""
        dense = torch.zeros(shape, dtype=dtype, device=positions[0].device)
        dense.index_put_(positions, dense.new_ones(()))  # a Python number would come from the host
        return dense

    def gram(self, ones_GC: Tensor) -> Tensor:
        """The product of a tensor of zeros and ones with its transpose, exact: (G, G)."""
        return ones_GC @ ones_GC.T

    def sum_weighted_rows(
        self, table: Tensor, ids: Tensor, indptr: Tensor, weights: Tensor
    ) -> Tensor:
        """As `sum_rows`, each row times its weight (E,): (n, C). The index pointer starts at 0."""
        if len(ids) == 0:
            return table.new_zeros((len(indptr) - 1, table.shape[1]))
        return embedding_bag(
            ids,
            table,
            indptr,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=weights.to(table.dtype),
        )

    def residual(
        self, h_BH: Tensor, bias_H: Tensor | None, sum_BH: Tensor | None, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """out = LayerNorm(silu(h + bias + sum)) and sum + out, (B, H) each, in the dtype of h.

        Differentiable. None counts as 0. Mean and variance are computed in float32 or more.
        """
        x_BH = h_BH if bias_H is None else h_BH + bias_H.to(h_BH.dtype)
        x_BH = silu(x_BH if sum_BH is None else x_BH + sum_BH)
        weight_H, shift_H = norm.weight_H.to(h_BH.dtype), norm.shift_H.to(h_BH.dtype)
        out_BH = layer_norm(x_BH, x_BH.shape[1:], weight_H, shift_H, norm.eps)
        return out_BH, out_BH if sum_BH is None else sum_BH + out_BH

    def latent_code(
        self, mu_BL: Tensor, logvar_BL: Tensor, noise_BL: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """z (B, L) in the dtype of mu, and its KL divergence (B,), computed in `dtype`
        (latent.py). Differentiable."""
        z_BL = sample(mu_BL, logvar_BL, noise_BL)
        return z_BL, kl_divergence(mu_BL.to(dtype), logvar_BL.to(dtype))

    def end_recording(self) -> None:
        """Complete what a recorded step reads, before its first replay."""

    def update_sum(
        self, grad: Tensor, bags: Bags, diagonal: int | None, of: Weights, by: Tensor
    ) -> Tensor:
        """Update weights (n or more, C) from a gradient whose row i is the sum of the rows of
        `grad` that bag i names, without storing it. Rows beyond the n bags are padding. Returns the
        squared norm of the gradient, a scalar.

        diagonal: entry (i, i - diagonal) has no gradient. by: an AdamStep on the device.
        """
        raise NotImplementedError

    def update_rows(self, grad: Tensor, bags: Bags | None, of: Weights, by: Tensor) -> Tensor:
        """Update rows of weights (n or more, C) that have one second moment each, which moves
        towards the mean of the row's squared gradient. Returns the squared norm of the gradient, a
        scalar.

        bags: row i of the gradient is the sum of the rows of `grad` that bag i names; with None it
        is row i of `grad`. Other arguments as in `update_sum`.
        """
        raise NotImplementedError

    def update_many(self, parts: list[tuple[Tensor, Weights]], by: Tensor) -> Tensor:
        """Update several weights, each from its gradient. Returns the squared norm of all."""
        raise NotImplementedError

    def focal(
        self, logits: list[Tensor], is_one: Tensor, weight_G: Tensor, alpha: float, gamma: float
    ) -> tuple[Tensor, list[Tensor]]:
        """The focal loss of a product of sigmoids (model/losses.py) and its gradients.

        logits (G, J), is_one (G, J or more). Returns the weighted loss, a scalar, and one (G, J
        padded) tensor for each of the logits, zero beyond J.
        """
        raise NotImplementedError


PLAIN = Kernels()


@dataclass(frozen=True)
class Arithmetic:
    """How a model computes: dtype of its weights, precision of its products, kernels."""

    dtype: torch.dtype = torch.float32
    precision: Precision = FP32
    kernels: Kernels = field(default=PLAIN)


EXACT = Arithmetic()  # fp32 products in plain torch
