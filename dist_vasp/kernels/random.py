"""Random numbers that are a function of their place alone: the same on every device and layout.

A row of numbers has a 64-bit key, a hash of (seed, name, counters of the row). The number in
column c comes from the bits

    h(key, c) = mix(key + (c + 1) * gamma)        modulo 2^64

which is output c of the splitmix64 generator that starts at the key (Steele, Lea, Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014; mixer of Stafford's variant 13, see
dist_vasp/data/hashing.py). There is no state, so ranks, chunks, memory layout and dtype do not
change a number. Every operation is exact or correctly rounded, so the bits are the same on
a CPU and a GPU.

Shapes: R rows, C columns, N numbers of a chunk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_vasp.data.hashing import GAMMA, MULTIPLIERS, SHIFTS, Word, hash64, mix_in_place

CHUNK = 1 << 15  # numbers made at once: they stay in a CPU core's cache
DEVICE_CHUNK = 1 << 24  # the same on a GPU: enough to fill it, at most 512 MB of temporary memory
_SAMPLE = 1 << 20  # numbers that are filled to see how long it takes
SEGMENTS = 8  # log2 of the segments of the normal quantile function between two powers of two


class Distribution(Protocol):
    """Turns random bits into numbers."""

    def numbers(self, bits_N: Tensor) -> Tensor:
        """Return a float32 number for each 64-bit word of (N,) int64, and overwrite the words."""
        ...


@dataclass(frozen=True)
class Uniform:
    """Uniform on [low, high): low + (high - low) * k / 2^24, computed in float32.

    k - 2^23 is the upper 24 bits of a word, read as a signed integer. With low 0 and high 1 the
    number is exact.
    """

    low: float = 0.0
    high: float = 1.0

    def numbers(self, bits_N: Tensor) -> Tensor:
        k_N = bits_N.bitwise_right_shift_(40).to(torch.float32).add_(1 << 23)
        return k_N.mul_(self.step).add_(self.low)

    @property
    def step(self) -> float:
        """The distance between two neighbouring numbers."""
        return (self.high - self.low) / (1 << 24)


@dataclass(frozen=True)
class Normal:
    """Standard normal, by inversion of the distribution function, in float64.

    The upper 32 bits of a word, plus 1/2, are a sign and a number a of (0, 2^31). The result is
    -quantile(a / 2^32) with that sign; its largest absolute value is 6.34. The quantile function is
    linear between 256 points in each [2^e, 2^(e+1)) of a (Lee, Cheung, Villasenor, Luk,
    "Inversion-based hardware Gaussian random number generator", FPT 2006); its error is below 6e-7
    everywhere. Box-Muller takes twice the time on a CPU (9 against 4 ns a number), and logarithm
    and cosine have other last bits on other devices.
    """

    def numbers(self, bits_N: Tensor) -> Tensor:
        offsets, slopes = quantiles(bits_N.device)
        signed_N = bits_N.bitwise_right_shift_(32).to(torch.float64).add_(0.5)
        a_N = signed_N.abs()
        # The exponent of a and the upper bits of its mantissa count the segments.
        torch.bitwise_right_shift(a_N.view(torch.int64), 52 - SEGMENTS, out=bits_N)
        segments_N = bits_N.sub_(1022 << SEGMENTS)
        x_N = slopes.index_select(0, segments_N).mul_(a_N)
        x_N += offsets.index_select(0, segments_N)
        return x_N.copysign_(signed_N).to(torch.float32)


def row_keys(seed: int, name: str, *counters: Word) -> np.ndarray:
    """Return the keys of rows, uint64 of the shape that the counters broadcast to.

    name: the stream, such as the name of a matrix. counters: integers or integer arrays.
    """
    return hash64(seed, int(hash64(*name.encode())), *counters)


def fill(out_RC: Tensor, keys_R: np.ndarray, distribution: Distribution) -> None:
    """Fill `out_RC` (R, C), of any strides and floating dtype, with float32 random numbers.

    keys_R: the keys (R,) of its rows, from `row_keys`. On a GPU nothing waits for the device.
    """
    out_RC = out_RC.detach()
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        steps_C = np.arange(1, out_RC.shape[1] + 1, dtype=np.uint64) * GAMMA
    if out_RC.stride(0) < out_RC.stride(1):  # bits depend on the sum of a key and a step
        out_RC, keys_R, steps_C = out_RC.T, steps_C, keys_R
    if out_RC.device.type == "cpu":
        _fill_on_cpu(out_RC, keys_R, steps_C, distribution)
    else:
        _fill_on_device(out_RC, keys_R, steps_C, distribution)


def seconds_to_fill(n: int, device: torch.device) -> float:
    """Return about how long it takes to fill `n` new numbers, from a million of them.

    Fewer than a million take no time worth a word: 0.
    """
    if n < _SAMPLE:
        return 0.0
    keys = row_keys(0, "sample", np.arange(256))
    sample = torch.zeros((256, _SAMPLE // 256), device=device)
    if device.type == "cuda":  # the first call compiles
        fill(sample, keys, Uniform())
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    fill(sample, keys, Uniform())
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * n / _SAMPLE


def _fill_on_cpu(
    out_RC: Tensor, keys_R: np.ndarray, steps_C: np.ndarray, distribution: Distribution
) -> None:
    """Fill on one thread, 4 ns a number; numpy mixes the bits, in half of torch's time."""
    for rows, columns in _chunks(out_RC, CHUNK):
        bits = keys_R[rows, None] + steps_C[columns]
        mix_in_place(bits)
        numbers_N = distribution.numbers(torch.from_numpy(bits.view(np.int64)).view(-1))
        out_RC[rows, columns] = numbers_N.view(bits.shape)


def _fill_on_device(
    out_RC: Tensor, keys_R: np.ndarray, steps_C: np.ndarray, distribution: Distribution
) -> None:
    row_words, column_words = (_to_device(words, out_RC.device) for words in (keys_R, steps_C))
    in_one_pass = out_RC.is_cuda and out_RC.dtype == torch.float32 and out_RC.stride(1) == 1
    fused = _triton_fill() if in_one_pass else None
    if fused and isinstance(distribution, Uniform | Normal):
        fused(out_RC, row_words, column_words, distribution)
        return
    for rows, columns in _chunks(out_RC, DEVICE_CHUNK):
        bits = row_words[rows, None] + column_words[columns]
        _mix_(bits)
        out_RC[rows, columns] = distribution.numbers(bits.view(-1)).view(bits.shape)


@lru_cache(maxsize=1)
def _triton_fill() -> Callable[..., None] | None:
    """The fill of one pass; None where triton is not installed."""
    try:
        from dist_vasp.kernels.cuda_random import fill as fused
    except ImportError:
        return None
    return fused


def _chunks(out_RC: Tensor, size: int) -> list[tuple[slice, slice]]:
    """Blocks of at most `size` numbers, of whole rows where a row has no more."""
    n_rows, n_columns = out_RC.shape
    width = max(1, min(size, n_columns))
    height = max(1, size // width)
    return [
        (slice(row, row + height), slice(column, column + width))
        for row in range(0, n_rows, height)
        for column in range(0, n_columns, width)
    ]


def _to_device(words: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(words.view(np.int64))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _mix_(h: Tensor) -> None:
    """`mix_in_place` for int64 tensors, whose right shift keeps the sign."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        shifted = h >> int(shift)
        h ^= shifted.bitwise_and_((1 << (64 - int(shift))) - 1)
        if multiplier is not None:
            h *= int(multiplier.astype(np.int64))


@lru_cache(maxsize=8)
def quantiles(device: torch.device) -> Tensor:
    """Return (2, segments): offset and slope of the line that stands for each segment.

    Slopes have 21 significant bits, so that slope * a is exact in float64 and a fused
    multiply-add gives the same bits as two operations. Offsets are multiples of 2^-30. That
    rounding also removes what differs between C libraries.
    """
    index = np.arange(32 << SEGMENTS)
    width = 2.0 ** ((index >> SEGMENTS) - 1 - SEGMENTS)
    first = width * ((1 << SEGMENTS) + index % (1 << SEGMENTS))
    inverse = np.vectorize(NormalDist().inv_cdf)
    start, middle, end = (-inverse((first + f * width) / 2**32) for f in (0, 0.5, 1))
    mantissa, exponent = np.frexp((end - start) / width)
    slope = np.ldexp(np.round(mantissa * 2**21), exponent - 21)
    mean = (start + 4 * middle + end) / 6  # Simpson's rule
    offset = np.round((mean - slope * (first + width / 2)) * 2**30) / 2**30
    return torch.from_numpy(np.stack([offset, slope])).to(device)
