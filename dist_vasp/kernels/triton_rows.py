"""The update of whole rows of a matrix with one second moment for each row, in Triton.

`cuda.py` calls it. Each program takes one row: the second moment needs the norm of all of it. The
first BLOCK columns of the gradient stay in registers between the norm and the update; the columns
after them, if there are some, are read or summed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dist_vasp.kernels.triton_kernels import scaled, second_moment, sum_of_rows, update_columns


@triton.jit
def columns_of_gradient(
    Ids, Ptr, Grad, n_columns, grad_row, By, r, c,
    SUMS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns c of the gradient of row r, scaled: 0 beyond the last one."""
    if SUMS:
        g = sum_of_rows(Ids, Ptr, Grad, n_columns, grad_row, r, c, UNROLL, BLOCK)
    else:
        g = tl.load(Grad + r.to(tl.int64) * grad_row + c, c < n_columns, 0.0).to(tl.float32)
    return scaled(g, By)


@triton.jit
def update_rows(
    Ids, Ptr, Grad, P, M, V, Copy, Norm, n_columns, grad_row, p_row, By,
    SUMS: tl.constexpr, HAS_COPY: tl.constexpr, HAS_MORE: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of P, M and Copy, and number r of V, which is the second moment of the row.

    SUMS: the gradient of row r is the sum of the rows of Grad that bag r names; else it is row r of
    Grad. HAS_MORE: whether a row has more than BLOCK columns. Norm takes the squared norm of the
    gradient of each row.
    """
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    g = columns_of_gradient(
        Ids, Ptr, Grad, n_columns, grad_row, By, r, c, SUMS, UNROLL, BLOCK
    )  # fmt: skip
    norm = tl.sum(g * g)
    if HAS_MORE:
        for start in range(BLOCK, n_columns, BLOCK):
            more = columns_of_gradient(
                Ids, Ptr, Grad, n_columns, grad_row, By, r, start + c, SUMS, UNROLL, BLOCK
            )
            norm += tl.sum(more * more)
    tl.store(Norm + r, norm)
    v, denominator = second_moment(tl.load(V + r), norm / n_columns, By)
    tl.store(V + r, v)
    first = r.to(tl.int64) * p_row
    update_columns(P, M, Copy, first, n_columns, c, g, denominator, By, HAS_COPY)
    if HAS_MORE:
        for start in range(BLOCK, n_columns, BLOCK):
            more = columns_of_gradient(
                Ids, Ptr, Grad, n_columns, grad_row, By, r, start + c, SUMS, UNROLL, BLOCK
            )
            update_columns(
                P, M, Copy, first, n_columns, start + c, more, denominator, By, HAS_COPY
            )  # fmt: skip
