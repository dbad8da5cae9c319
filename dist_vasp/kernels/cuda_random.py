"""`random.fill` on a GPU in one pass, in Triton: a number is made in registers and stored.

Plain torch makes the same bits in about thirty passes over memory. triton comes with torch's CUDA
build; nothing imports this file on a CPU but its test.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_vasp.kernels.random import SEGMENTS, Normal, Uniform, quantiles

BLOCK = 1024  # 8 numbers per thread


@triton.jit
def _fill(
    Out, RowWords, ColumnWords, Offsets, Slopes,
    n_columns, out_row, low, step,
    SEGMENTS: tl.constexpr, NORMAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns of one row; see `Uniform` and `Normal` in random.py."""
    r = tl.program_id(0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = c < n_columns
    word = tl.load(RowWords + r) + tl.load(ColumnWords + c, here, 0)
    h = word.to(tl.uint64, bitcast=True)
    h ^= h >> 30
    h *= 0xBF58476D1CE4E5B9
    h ^= h >> 27
    h *= 0x94D049BB133111EB
    h ^= h >> 31
    if NORMAL:
        signed = (h.to(tl.int64, bitcast=True) >> 32).to(tl.float64) + 0.5
        a = tl.abs(signed)
        segment = (a.to(tl.int64, bitcast=True) >> (52 - SEGMENTS)) - (1022 << SEGMENTS)
        x = tl.abs(tl.load(Slopes + segment) * a + tl.load(Offsets + segment))
        number = tl.where(signed < 0, -x, x).to(tl.float32)
    else:
        k = (h >> 40).to(tl.int32) ^ (1 << 23)
        number = k.to(tl.float32) * step + low
    tl.store(Out + r.to(tl.int64) * out_row + c, number, here)


def fill(
    out_RC: Tensor, row_words_R: Tensor, column_words_C: Tensor, distribution: Uniform | Normal
) -> None:
    """Fill float32 `out_RC`, whose columns lie side by side; the words are int64 on its device."""
    n_rows, n_columns = out_RC.shape
    if not out_RC.numel():
        return
    assert out_RC.dtype == torch.float32 and out_RC.stride(1) == 1
    if isinstance(distribution, Normal):
        low, step, (offsets, slopes) = 0.0, 0.0, quantiles(out_RC.device)
    else:
        low, step = distribution.low, distribution.step
        offsets = slopes = row_words_R  # not read
    block = min(BLOCK, triton.next_power_of_2(n_columns))
    _fill[(n_rows, triton.cdiv(n_columns, block))](
        out_RC, row_words_R, column_words_C, offsets, slopes,
        n_columns, out_RC.stride(0), low, step,
        SEGMENTS=SEGMENTS, NORMAL=isinstance(distribution, Normal), BLOCK=block,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where plain torch rounds twice
    )  # fmt: skip
