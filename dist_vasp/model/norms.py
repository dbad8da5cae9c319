"""Norms of gradients that are never formed (DESIGN.md, section 9).

With g (G, C) the gradient of a block's outputs, the gradient of the weights is S^T g for what they
were multiplied by: S = x (G, I) for a sum of rows, S = d (G, K) for a dense head. So

    |column j|^2 = g_j^T (S S^T) g_j        |all|^2 = sum of (S S^T) * (g g^T), entry by entry

Both need only S S^T (G, G). What the diagonal of an items x items matrix would have, x_j . g_j, is
taken off.

Shapes: G rows of the step, C columns of a block, I items, E interactions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_vasp.kernels.interface import PLAIN
from dist_vasp.model.sinks import SumOfRows


class SharedItems:
    """x x^T (G, G) of the rows of a step, computed once for each range of items."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int], Tensor] = {}

    def begin(self) -> None:
        """Forget the rows of the step before."""
        self._found.clear()

    def of(self, gradient: SumOfRows, dtype: torch.dtype) -> Tensor:
        """How many items each two rows of a sum of rows share."""
        key = (id(gradient.x), *gradient.items)
        if key not in self._found:
            self._found[key] = shared_items(gradient, dtype)
        return self._found[key]


def shared_items(gradient: SumOfRows, dtype: torch.dtype) -> Tensor:
    """How many items each two rows of a sum of rows share, or x x^T of ratings: (G, G).

    x is dense for as many items at once as the gradient has columns; where a rank has all it needs
    of x to itself, on a GPU, for all of them.
    """
    x, (lo, hi), kernels = gradient.x, gradient.items, gradient.kernels
    at_once = gradient.grad_GC.shape[1]
    if kernels.updates_alone and gradient.diagonal is None:
        at_once = hi - lo
    counts_GG = torch.zeros((x.n_rows, x.n_rows), dtype=dtype, device=x.items.device)
    for first in range(lo, hi, at_once):
        last = min(first + at_once, hi)
        positions, shape = x.positions(first, last), (x.n_rows, last - first)
        if x.values is None:
            counts_GG += kernels.gram(kernels.ones(positions, shape, dtype))
        else:
            dense_GC = PLAIN.ones(positions, shape, dtype)
            dense_GC[positions] = x.values_by_item(first, last).to(dtype)
            counts_GG += dense_GC @ dense_GC.T
    return counts_GG


def diagonal_gradients(gradient: SumOfRows) -> Tensor:
    """What the entries of the diagonal would have as their gradient: (n,) of the block's items."""
    assert gradient.diagonal is not None
    x = gradient.x
    lo = gradient.items[0] + gradient.diagonal
    hi = min(lo + gradient.grad_GC.shape[1], gradient.items[1])
    rows_E, columns_E = x.positions(lo, hi)
    inside_E = columns_E.clamp(max=gradient.grad_GC.shape[1] - 1) if x.has_room else columns_E
    entries_E1 = gradient.grad_GC[rows_E, inside_E][:, None]
    bounds = torch.searchsorted(columns_E, torch.arange(hi - lo + 1, device=columns_E.device))
    order = torch.arange(len(columns_E), device=columns_E.device)
    return gradient.kernels.sum_rows(entries_E1, order, bounds).squeeze(1)


def column_norms(gradient: SumOfRows, shared_GG: Tensor) -> Tensor:
    """The squared norm of each column of a sum of rows: (C,)."""
    grad_GC = gradient.grad_GC
    products_GC = grad_GC * (shared_GG.to(grad_GC.dtype) @ grad_GC)
    squares_C = products_GC.sum(dim=0, dtype=shared_GG.dtype)
    if gradient.diagonal is not None:
        taken_off = diagonal_gradients(gradient).to(squares_C.dtype) ** 2
        squares_C[: len(taken_off)] -= taken_off
    return squares_C.clamp_(min=0)
