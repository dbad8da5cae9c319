"""The random numbers of a GPU have the same bits as a CPU's. In Triton's interpreter on CPUs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")

import numpy as np
import torch

from dist_vasp.kernels import cuda_random
from dist_vasp.kernels.random import Normal, Uniform, fill, row_keys
from tests.support.interpreter import interpreted

pytestmark = interpreted

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GAMMA = np.uint64(0x9E3779B97F4A7C15)
SIZES = [(1, 1), (1, 3000), (7, 130), (70, 9), (3, 0), (0, 3)]
BOTH = [Uniform(), Uniform(-0.0123, 0.0123), Normal()]


def words(n_rows: int, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The words of the rows and of the columns, on the device."""
    keys = row_keys(3, "x", np.arange(n_rows))
    steps = np.arange(1, n_columns + 1, dtype=np.uint64) * GAMMA
    rows, columns = (torch.from_numpy(part.view(np.int64)) for part in (keys, steps))
    return rows.to(DEVICE), columns.to(DEVICE)


@pytest.mark.parametrize("distribution", BOTH)
@pytest.mark.parametrize(("n_rows", "n_columns"), SIZES)
def test_bits_equal_plain_torch(n_rows, n_columns, distribution):
    expected = torch.empty(n_rows, n_columns)
    fill(expected, row_keys(3, "x", np.arange(n_rows)), distribution)
    padded = torch.full((n_rows + 1, n_columns + 5), 7.0, device=DEVICE)
    inside = padded[:n_rows, :n_columns]
    cuda_random.fill(inside, *words(n_rows, n_columns), distribution)
    assert torch.equal(inside.cpu(), expected)
    assert (padded[n_rows:] == 7).all() and (padded[:, n_columns:] == 7).all()


@pytest.mark.parametrize("upper", [0, 1, 2**31 - 1, -1, -(2**31), 2**30, -(2**30) - 1])
def test_normal_of_extreme_words(upper):
    """Words whose mixture has the wanted upper bits: the mixer is a bijection."""
    word = unmix((upper << 32) % 2**64)
    signed = word - 2**64 if word >> 63 else word
    found = torch.empty(1, 1, device=DEVICE)
    rows, columns = torch.tensor([signed], device=DEVICE), torch.zeros(1, dtype=torch.int64)
    cuda_random.fill(found, rows, columns.to(DEVICE), Normal())
    expected = Normal().numbers(torch.tensor([upper << 32]))
    assert torch.equal(found.cpu().ravel(), expected)


def unmix(h: int) -> int:
    """The word that `mix_in_place` takes to h."""
    for shift, multiplier in [(31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)]:
        x = h
        for _ in range(64 // shift):
            x = h ^ x >> shift
        h = x * pow(multiplier, -1, 2**64) % 2**64
    return h


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("distribution", BOTH)
def test_fill_on_a_gpu_equals_a_cpu(distribution):
    keys = row_keys(3, "x", np.arange(70))
    expected = torch.empty(70, 3001)
    fill(expected, keys, distribution)
    for dtype in (torch.float32, torch.bfloat16):  # in one pass, and in plain torch
        found = torch.empty(70, 3001, device=DEVICE, dtype=dtype)
        fill(found, keys, distribution)
        assert torch.equal(found.cpu(), expected.to(dtype))
    transposed = torch.empty(3001, 70, device=DEVICE)
    fill(transposed.T, keys, distribution)
    assert torch.equal(transposed.T.cpu(), expected)
