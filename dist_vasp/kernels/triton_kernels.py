"""The GPU kernels themselves, in Triton. `cuda.py` says what they are called with.

Each program computes one block of BLOCK numbers. Numbers are summed and updated in float32, in
whatever precision they are stored. Several tensors reach a kernel as a table of their addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_rows(
    Ids, Ptr, Table, n_columns, table_row, r, c, UNROLL: tl.constexpr, BLOCK: tl.constexpr
):
    """The columns c of the sum of the rows of a table that bag r names."""
    here = c < n_columns
    first, last = tl.load(Ptr + r), tl.load(Ptr + r + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for e in range(first, last, UNROLL):
        es = e + tl.arange(0, UNROLL)
        inside = es < last
        rows = tl.load(Ids + es, inside, 0).to(tl.int64)
        values = tl.load(
            Table + rows[:, None] * table_row + c[None, :], inside[:, None] & here[None, :], 0.0
        )
        total += tl.sum(values.to(tl.float32), 0)
    return total


@triton.jit
def sum_rows(
    Ids, Ptr, Table, Out, n_columns, table_row, out_row, UNROLL: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of_rows(Ids, Ptr, Table, n_columns, table_row, r, c, UNROLL, BLOCK)
    out = Out + r.to(tl.int64) * out_row + c
    tl.store(out, total.to(Out.dtype.element_ty), c < n_columns)


@triton.jit
def scaled(g, By):
    """A gradient as the update uses it. By: an AdamStep (kernels/interface.py)."""
    return g * tl.load(By + 9)


@triton.jit
def second_moment(v, squared, By):
    """New second moment from a squared gradient, and the denominator that it gives
    (training/step/optimizer.py)."""
    beta2, eps, of_root = tl.load(By + 1), tl.load(By + 2), tl.load(By + 5)
    v = v * beta2 + squared * tl.load(By + 8)
    return v, tl.sqrt(v) * of_root + eps


@triton.jit
def adam(p, g, m, denominator, By):
    """New weights and first moment (training/step/optimizer.py)."""
    beta1, of_grad, of_momentum = tl.load(By), tl.load(By + 3), tl.load(By + 4)
    m = m * beta1 + g * tl.load(By + 7)
    return p * tl.load(By + 6) - (m * of_momentum + g * of_grad) / denominator, m


@triton.jit
def update_columns(P, M, Copy, first, n_columns, c, g, denominator, By, HAS_COPY: tl.constexpr):
    """Update the columns c of the row whose number 0 is number `first` of P."""
    at, here = first + c, c < n_columns
    p, m = tl.load(P + at, here, 0.0), tl.load(M + at, here, 0.0)
    p, m = adam(p, g, m, denominator, By)
    tl.store(P + at, p, here)
    tl.store(M + at, m, here)
    if HAS_COPY:
        tl.store(Copy + at, p.to(Copy.dtype.element_ty), here)


@triton.jit
def update_sum(
    Ids, Ptr, Grad, P, M, V, Denominators, Copy, Norm,
    n_columns, grad_row, p_row, denominator_row, denominator_column, diagonal, By,
    HAS_V: tl.constexpr, HAS_COPY: tl.constexpr, HAS_DIAGONAL: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row r of P: its gradient is a sum of rows of Grad, and is used at once.

    Norm (rows, blocks of columns) takes the squared norm of what each program has summed.
    """
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = c < n_columns
    g = sum_of_rows(Ids, Ptr, Grad, n_columns, grad_row, r, c, UNROLL, BLOCK)
    if HAS_DIAGONAL:
        g = tl.where(c + diagonal == r, 0.0, g)
    g = scaled(g, By)
    tl.store(Norm + r * tl.num_programs(1) + tl.program_id(1), tl.sum(tl.where(here, g * g, 0.0)))
    first = r.to(tl.int64) * p_row
    if HAS_V:
        at = first + c
        v, denominator = second_moment(tl.load(V + at, here, 0.0), g * g, By)
        tl.store(V + at, v, here)
    else:
        where = r.to(tl.int64) * denominator_row + c * denominator_column
        denominator = tl.load(Denominators + where, here, 1.0)
    update_columns(P, M, Copy, first, n_columns, c, g, denominator, By, HAS_COPY)


@triton.jit
def read(pointers, here, MASKED: tl.constexpr):
    """Numbers, 0 where `here` is false. Without a mask several are read at once."""
    return tl.load(pointers, here, 0.0) if MASKED else tl.load(pointers)


@triton.jit
def write(pointers, numbers, here, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointers, numbers, here)
    else:
        tl.store(pointers, numbers)


@triton.jit
def update_block(
    P, M, V, G, C, first, size, By,
    HAS_COPY: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update the numbers from `first` on; the squared norm of their gradient."""
    at = first + tl.arange(0, BLOCK)
    here = at < size
    g = scaled(read(G + at, here, MASKED).to(tl.float32), By)
    v, denominator = second_moment(read(V + at, here, MASKED), g * g, By)
    p, m = read(P + at, here, MASKED), read(M + at, here, MASKED)
    p, m = adam(p, g, m, denominator, By)
    write(P + at, p, here, MASKED)
    write(M + at, m, here, MASKED)
    write(V + at, v, here, MASKED)
    if HAS_COPY:
        write(C + at, p.to(C.dtype.element_ty), here, MASKED)
    return tl.sum(g * g)


@triton.jit
def update_many(
    Parts, Offsets, Sizes, Grads, Ps, Ms, Vs, Copies, Norm, By,
    GRAD: tl.constexpr, COPY: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one of several tensors, whose addresses are Grads, Ps, Ms, Vs and Copies.

    Program k updates the tensor Parts[k] from number Offsets[k] on. Norm takes the squared norm of
    its gradients.
    """
    k = tl.program_id(0)
    part = tl.load(Parts + k)
    first, size = tl.multiple_of(tl.load(Offsets + k), BLOCK), tl.load(Sizes + part)
    P = tl.multiple_of(tl.load(Ps + part).to(tl.pointer_type(tl.float32)), 16)
    M = tl.multiple_of(tl.load(Ms + part).to(tl.pointer_type(tl.float32)), 16)
    V = tl.multiple_of(tl.load(Vs + part).to(tl.pointer_type(tl.float32)), 16)
    G = tl.multiple_of(tl.load(Grads + part).to(tl.pointer_type(GRAD)), 16)
    C = tl.multiple_of(tl.load(Copies + part).to(tl.pointer_type(COPY)), 16)
    if first + BLOCK <= size:
        norm = update_block(P, M, V, G, C, first, size, By, HAS_COPY, False, BLOCK)
    else:
        norm = update_block(P, M, V, G, C, first, size, By, HAS_COPY, True, BLOCK)
    tl.store(Norm + k, norm)


@triton.jit
def sigmoid(logit, shift):
    """sigmoid, 1 - sigmoid, and exp(shift - |logit|)."""
    u = tl.exp(shift - tl.abs(logit))
    larger = 1 / (1 + u)
    return tl.where(logit > 0, larger, u * larger), tl.where(logit > 0, u * larger, larger), u


@triton.jit
def focal(
    Logits, IsOne, Weights, Grads, Loss, n_items, n_padded, logits_row, ones_row, grads_row,
    alpha, gamma, smallest,
    PATHS: tl.constexpr, GAMMA: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of the focal loss of a product of sigmoids, as `losses.probability` writes it.

    Logits and Grads are the addresses of PATHS tensors. All rows have n_padded numbers. GAMMA:
    gamma, where it is 0 or 2. smallest: minus the logarithm of a quarter of the rounding unit.
    """
    r = tl.program_id(0).to(tl.int64)
    weight = tl.load(Weights + r)
    total = 0.0
    for start in range(0, n_padded, BLOCK):
        c = start + tl.arange(0, BLOCK)
        here, stored = c < n_items, c < n_padded
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        for k in tl.static_range(PATHS):
            path = tl.multiple_of(tl.load(Logits + k).to(tl.pointer_type(TYPE)), 16)
            logit = tl.load(path + r * logits_row + c, stored, 0.0).to(tl.float32)
            least = tl.minimum(least, logit)
        shift = tl.maximum(least - smallest, 0.0)
        below, spread, q = tl.zeros_like(least), tl.zeros_like(least), tl.zeros_like(least)
        p = tl.full((BLOCK,), 1.0, tl.float32)
        for k in tl.static_range(PATHS):
            path = tl.multiple_of(tl.load(Logits + k).to(tl.pointer_type(TYPE)), 16)
            logit = tl.load(path + r * logits_row + c, stored, 0.0).to(tl.float32)
            hit, miss, u = sigmoid(logit, shift)
            below += tl.minimum(logit, 0.0)
            spread = spread + u + spread * u
            q, p = q + p * miss, p * hit
        scale, over_q = tl.exp(-shift), 1 / q
        log_p = below - log1p(spread * scale)
        log_q = tl.where(p < 0.5, log1p(-p), tl.log(q)) - shift
        q = q * scale
        is_one = tl.load(IsOne + r * ones_row + c, stored, 0) != 0
        base = tl.where(is_one, q, p)
        if GAMMA == 2:
            power = base * base
        elif GAMMA == 0:
            power = tl.full((BLOCK,), 1.0, tl.float32)
        else:
            power = tl.exp(gamma * tl.log(base))
        modulator = tl.where(is_one, -alpha, alpha - 1) * power
        loss = modulator * tl.where(is_one, log_p, log_q)
        slope_miss = gamma * loss
        slope_p = tl.where(is_one, modulator, slope_miss)
        slope_q = tl.where(is_one, slope_miss, modulator)
        common = (q * slope_p - p * slope_q) * weight * over_q
        total += tl.sum(tl.where(here, loss, 0.0))
        for k in tl.static_range(PATHS):
            path = tl.multiple_of(tl.load(Logits + k).to(tl.pointer_type(TYPE)), 16)
            logit = tl.load(path + r * logits_row + c, stored, 0.0).to(tl.float32)
            _, miss, _ = sigmoid(logit, shift)
            grads = tl.multiple_of(tl.load(Grads + k).to(tl.pointer_type(TYPE)), 16)
            grad = tl.where(here, miss * common, 0.0)
            tl.store(grads + r * grads_row + c, grad.to(TYPE), stored)
    tl.store(Loss + r, total)


@triton.jit
def log1p(x):
    """log(1 + x) without losing x where it is small: Goldberg 1991, theorem 4."""
    one_more = 1 + x
    return tl.where(one_more == 1, x, tl.log(one_more) * (x / (one_more - 1)))
