"""Counter-based random numbers: their bits, their statistics, and what they do not depend on."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from scipy import stats

from dist_vasp.kernels import random
from dist_vasp.kernels.random import Normal, Uniform, fill, row_keys

CPU = torch.device("cpu")
WORD = 1 << 64
GAMMA = 0x9E3779B97F4A7C15
EDGES = [0, 1, 2, 3, 127, 128, 255, 256, 2**31 - 2, 2**31 - 1, -1, -2, -255, -(2**31)]


def mix(h: int) -> int:
    h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 % WORD
    h = (h ^ h >> 27) * 0x94D049BB133111EB % WORD
    return h ^ h >> 31


def hash_of(words: list[int]) -> int:
    h = len(words)
    for word in words:
        h = mix((h + (word % WORD + 1) * GAMMA) % WORD)
    return h


def bits(seed: int, name: str, counters: list[int], column: int) -> int:
    """The generator as its docstring defines it, on Python integers."""
    key = hash_of([seed, hash_of(list(name.encode())), *counters])
    return mix((key + (column + 1) * GAMMA) % WORD)


def uniform_of(word: int) -> float:
    return ((word >> 40) ^ (1 << 23)) / 2**24  # flips the sign bit


def filled(distribution, rows: int, columns: int, seed: int = 0, name: str = "x") -> torch.Tensor:
    out = torch.empty(rows, columns)
    fill(out, row_keys(seed, name, np.arange(rows)), distribution)
    return out


def normal_of(upper: np.ndarray) -> np.ndarray:
    """Normal numbers for the upper 32 bits of words, given as signed integers."""
    return Normal().numbers(torch.from_numpy(upper.astype(np.int64) << 32)).numpy()


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, -1])
def test_uniform_equals_the_definition(seed):
    rows, columns = [0, 1, 5, 2**40], [0, 1, 2, 63, 300]
    out = torch.empty(len(rows), 301)
    fill(out, row_keys(seed, "W", 3, np.array(rows)), Uniform())
    for r, row in enumerate(rows):
        for c in columns:
            assert float(out[r, c]) == uniform_of(bits(seed, "W", [3, row], c))


def test_the_normal_quantile_has_always_the_same_bits():
    """Also where the C library has another logarithm."""
    table = random.quantiles(CPU).numpy().astype("<f8")
    assert hashlib.sha256(table.tobytes()).hexdigest() == (
        "64973c5a1393edd5c2807eaeb0b60e2288d2e492189b0789af141e3fbabf5de1"
    )


def test_normal_equals_the_definition():
    table = random.quantiles(CPU).tolist()
    out = filled(Normal(), 3, 50, seed=4)
    for row, column in [(0, 0), (0, 1), (1, 49), (2, 25), (2, 26)]:
        word = bits(4, "x", [row], column) >> 32
        y = word - (1 << 32 if word >> 31 else 0) + 0.5
        (pattern,) = struct.unpack("<q", struct.pack("<d", abs(y)))
        segment = (pattern >> 44) - (1022 << 8)
        x = table[0][segment] + table[1][segment] * abs(y)
        assert float(out[row, column]) == np.float32(x if y > 0 else -x)


def test_normal_is_the_inverse_of_the_distribution_function():
    """Every segment, to 6.3 standard deviations: 6e-7 and half a float32 step."""
    rng = np.random.default_rng(0)
    upper = rng.integers(0, 2**31, 200_000) >> rng.integers(0, 31, 200_000)
    upper = np.concatenate([upper, -1 - upper, EDGES])
    y = upper + 0.5
    expected = np.sign(y) * stats.norm.isf(np.abs(y) / 2**32)
    found = normal_of(upper)
    assert np.abs(expected).max() > 6.3
    np.testing.assert_allclose(found, expected, rtol=0, atol=8.4e-7)
    np.testing.assert_array_equal(normal_of(-1 - upper), -found)


@pytest.mark.parametrize("distribution", [Uniform(-0.3, 0.3), Normal()])
def test_layout_chunks_dtype_and_device_code_do_not_matter(distribution, monkeypatch):
    whole = filled(distribution, 37, 1001)
    keys = row_keys(0, "x", np.arange(37))
    by_rows = torch.empty(37, 1001)
    for lo, hi in [(0, 1), (1, 20), (20, 37)]:
        fill(by_rows[lo:hi], keys[lo:hi], distribution)
    assert torch.equal(by_rows, whole)
    transposed = torch.empty(1001, 37)
    fill(transposed.T, keys, distribution)
    assert torch.equal(transposed.T, whole)
    padded = torch.full((40, 1024), 9.0)
    fill(padded[:37, :1001], keys, distribution)
    assert torch.equal(padded[:37, :1001], whole)
    assert (padded[37:] == 9).all() and (padded[:, 1001:] == 9).all()
    for dtype in (torch.float64, torch.bfloat16):
        other = torch.empty(37, 1001, dtype=dtype)
        fill(other, keys, distribution)
        assert torch.equal(other, whole.to(dtype))
    monkeypatch.setattr(random, "CHUNK", 100)
    in_pieces = torch.nn.Parameter(torch.empty(37, 1001))
    fill(in_pieces, keys, distribution)
    assert torch.equal(in_pieces.detach(), whole)
    monkeypatch.setattr(random, "DEVICE_CHUNK", 3000)
    on_device = torch.empty(37, 1001)
    steps = np.arange(1, 1002, dtype=np.uint64) * np.uint64(GAMMA)
    random._fill_on_device(on_device, keys, steps, distribution)
    assert torch.equal(on_device, whole)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (1, 1), (1, 70_000), (70_000, 1)])
def test_odd_sizes(rows, columns):
    found = filled(Uniform(), rows, columns)
    assert found.shape == (rows, columns)
    if found.numel():
        assert float(found[-1, -1]) == uniform_of(bits(0, "x", [rows - 1], columns - 1))


N = 1 << 20
SHAPES = [(1, N), (1024, 1024), (N, 1)]  # along a row, both, along counters


@pytest.mark.parametrize("shape", SHAPES)
def test_uniform_numbers_are_uniform(shape):
    x = filled(Uniform(), *shape).numpy().ravel().astype(float)
    assert x.min() >= 0 and x.max() < 1
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    assert abs(x.mean() - 0.5) < 4 / np.sqrt(12 * N)
    assert abs(x.var() - 1 / 12) < 4 * np.sqrt(1 / 180 / N)
    k = (x * 2**24).astype(np.int64)
    ones = np.array([(k >> bit & 1).sum() for bit in range(24)])
    assert stats.chi2.sf((((2 * ones - N) ** 2) / N).sum(), 24) > 1e-3
    for low in (k & 1023, k >> 14):
        assert stats.chisquare(np.bincount(low, minlength=1024)).pvalue > 1e-3
    pairs = np.bincount((k[:-1:2] >> 19) * 32 + (k[1::2] >> 19), minlength=1024)
    assert stats.chisquare(pairs).pvalue > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_normal_numbers_are_normal(shape):
    x = filled(Normal(), *shape).numpy().ravel().astype(float)
    assert stats.kstest(x, "norm").pvalue > 1e-3
    for power, moment in enumerate([0, 1, 0, 3, 0, 15, 0, 105], start=1):
        second = [1, 3, 15, 105, 945, 10395, 135135, 2027025][power - 1]
        assert abs((x**power).mean() - moment) < 4 * np.sqrt((second - moment**2) / N), power
    for limit in (3.0, 3.5, 4.0):
        assert stats.binomtest(int((abs(x) > limit).sum()), N, 2 * stats.norm.sf(limit)).pvalue > (
            1e-3
        )


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.numpy().ravel(), b.numpy().ravel())[0, 1])


@pytest.mark.parametrize("distribution", [Uniform(), Normal()])
def test_neighbours_are_not_correlated(distribution):
    x = filled(distribution, 1024, 1024)
    others = {
        "columns": (x[:, 1:], x[:, :-1]),
        "columns, two apart": (x[:, 2:], x[:, :-2]),
        "rows": (x[1:], x[:-1]),
        "diagonal": (x[1:, 1:], x[:-1, :-1]),
        "seeds": (x, filled(distribution, 1024, 1024, seed=1)),
        "names": (x, filled(distribution, 1024, 1024, name="y")),
        "transposed": (x, x.T.contiguous()),
        "squares of columns": (x[:, 1:].square(), x[:, :-1].square()),
    }
    for name, (a, b) in others.items():
        limit = 4.5 / np.sqrt(a.numel())
        assert abs(_correlation(a, b)) < limit, name


def test_streams_share_no_number():
    """Keys and words of rows, names and seeds are all different."""
    keys = np.concatenate(
        [row_keys(s, n, np.arange(1000)) for s in range(10) for n in ("a", "b", "ab", "ba", "")]
    )
    assert len(np.unique(keys)) == len(keys)
    assert row_keys(1, "a", 2, 3) != row_keys(1, "a", 3, 2)
    assert row_keys(1, "a", 2) != row_keys(2, "a", 1)
