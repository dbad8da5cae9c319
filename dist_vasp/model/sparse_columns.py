"""Products with a matrix whose columns keep K inputs each, and their gradients on these inputs.

    forward   out_gc  = sum over k of weight_ck x[g, ids_ck]
    gradient  dweight_ck = sum of dout_gc over the rows g that hold item ids_ck

Both cost the pairs of a stored weight and a row that holds its input, never rows times items. On a
CPU the product is scipy's of two sparse matrices.

Shapes: G rows, I items, C columns, K neighbours, M pairs.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from dist_vasp.kernels.interface import PLAIN
from dist_vasp.model.sparse import ItemRows

_MOST_PAIRS = 1 << 22  # that exist at once
_MOST_GRADIENT = 1 << 24  # numbers of a whole gradient (I, C), which is then the faster way


def weighted_sums(ids_CK: Tensor, weight_CK: Tensor, x: ItemRows) -> Tensor:
    """x W for C columns of W: (G, C) of the dtype of the weights.

    ids_CK: int32 items, different within a column. IndexError or ValueError for an id that is no
    item.
    """
    if ids_CK.device.type == "cpu":
        return sparse_product(ids_CK, weight_CK, x)
    return sum_of_pairs(ids_CK, weight_CK, x)


def sum_of_pairs(ids_CK: Tensor, weight_CK: Tensor, x: ItemRows) -> Tensor:
    """As `weighted_sums`, in torch alone."""
    C, K = ids_CK.shape
    out_GC = weight_CK.new_zeros((x.n_rows, C))
    for lo, hi in _stretches(ids_CK, x):
        entry_M, row_M = _pairs(ids_CK[lo:hi], x)
        place_M = row_M * C + lo + entry_M // K
        out_GC.view(-1).index_add_(0, place_M, weight_CK[lo:hi].reshape(-1)[entry_M])
    return out_GC


def gradient_of_weights(ids_CK: Tensor, grad_GC: Tensor, x: ItemRows) -> Tensor:
    """dL/dweight (C, K) from dL/d(x W) (G, C)."""
    C, K = ids_CK.shape
    if x.n_items * C <= _MOST_GRADIENT:
        whole_IC = PLAIN.sum_rows(grad_GC, *x.rows_by_item(0, x.n_items))
        columns_C1 = torch.arange(C, device=ids_CK.device)[:, None]
        return whole_IC[ids_CK.long(), columns_C1]
    grad_n = grad_GC.new_zeros(C * K)
    for lo, hi in _stretches(ids_CK, x):
        entry_M, row_M = _pairs(ids_CK[lo:hi], x)
        of_pair_M = grad_GC[row_M, lo + entry_M // K]
        grad_n[lo * K : hi * K].index_add_(0, entry_M, of_pair_M)
    return grad_n.view(C, K)


def sparse_product(ids_CK: Tensor, weight_CK: Tensor, x: ItemRows) -> Tensor:
    """As `weighted_sums`, in scipy."""
    C, K = ids_CK.shape
    indptr = np.arange(0, C * K + 1, K, dtype=np.int32)
    entries = (weight_CK.numpy().reshape(-1), ids_CK.numpy().reshape(-1), indptr)
    W_CI = scipy.sparse.csr_matrix(entries, shape=(C, x.n_items))
    product_CG = W_CI @ x.transposed
    return torch.from_numpy(product_CG.toarray(order="F")).T


def _counts(ids_CK: Tensor, x: ItemRows) -> tuple[Tensor, Tensor]:
    """Where the rows of each entry's item begin in `rows_by_item`, and how many there are: (C K,)
    each."""
    _, indptr = x.rows_by_item(0, x.n_items)
    flat = ids_CK.reshape(-1).long()
    first = indptr[flat]
    return first, indptr[flat + 1] - first


def _stretches(ids_CK: Tensor, x: ItemRows) -> list[tuple[int, int]]:
    """Ranges of columns with about _MOST_PAIRS pairs each."""
    C, K = ids_CK.shape
    ends = _counts(ids_CK, x)[1].view(C, K).sum(dim=1).cumsum(0)
    parts = ends.div(_MOST_PAIRS, rounding_mode="floor")
    lengths = torch.unique_consecutive(parts, return_counts=True)[1].tolist()
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return list(pairwise(bounds))


def _pairs(ids_CK: Tensor, x: ItemRows) -> tuple[Tensor, Tensor]:
    """Every pair of an entry and a row that holds its item: (M,) each, by entry."""
    rows_E, _ = x.rows_by_item(0, x.n_items)
    first, n = _counts(ids_CK, x)
    entry_M = torch.repeat_interleave(n)
    offset = first - (n.cumsum(0) - n)
    row_M = rows_E[offset[entry_M] + torch.arange(len(entry_M), device=ids_CK.device)]
    return entry_M, row_M
