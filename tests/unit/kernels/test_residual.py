"""The residual layer of a GPU equals its formulas, forward and backward. In Triton's interpreter.

Float32 results lie within the bounds of rounding. Of bfloat16 inputs all is computed in float32,
so that results lie within these bounds and the rounding of what is stored.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")

import torch
from torch import Tensor
from torch.func import functional_call

from dist_vasp.kernels import cuda_residual
from dist_vasp.kernels.cuda import TritonKernels
from dist_vasp.kernels.interface import PLAIN, Arithmetic, Norm
from dist_vasp.kernels.precision import BF16
from dist_vasp.model.trunk import ResidualTrunk
from tests.oracles.rounding import bounded, each_within, within
from tests.support.interpreter import interpreted

pytestmark = interpreted

KERNELS, EPS = TritonKernels(), 1e-3
STORED = 2.0**-7  # of bfloat16: the interpreter cuts off where a GPU rounds
HALF, FULL = torch.bfloat16, torch.float32
NAMES = ("h", "bias", "sum", "weight", "shift")
# Rows and columns: one or several rows in a tile, tiles that are not full, several for a program.
SIZES = [(1, 1), (5, 7), (1, 100), (70, 100), (11, 512), (5, 2049)]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    monkeypatch.setattr(cuda_residual, "PROGRAMS", 2)  # so that each has several tiles


def inputs(n_rows: int, n_columns: int, without: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What a layer reads, and weights for the sum of its results."""
    generator = torch.Generator().manual_seed(n_rows + n_columns)
    shapes = dict.fromkeys(NAMES, (n_columns,))
    shapes |= dict.fromkeys(("h", "sum", "of out", "of new sum"), (n_rows, n_columns))
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value for name, value in found.items() if name not in without}


def formulas(of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x = of["h"] + of.get("bias", 0) + of.get("sum", 0)
    a = x / (1 + torch.exp(-x))
    centred = a - a.mean(dim=1, keepdim=True)
    variance = (centred * centred).mean(dim=1, keepdim=True)
    out = centred / torch.sqrt(variance + EPS) * of["weight"] + of["shift"]
    return out, out + of["sum"] if "sum" in of else out


def by(kernels, of: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    norm = Norm(of["weight"], of["shift"], EPS)
    return kernels.residual(of["h"], of.get("bias"), of.get("sum"), norm)


def results(compute, of: dict[str, Tensor]) -> dict[str, Tensor]:
    """Both results, and the gradient of each input from those results that have a weight."""
    leaves = {name: of[name].clone().requires_grad_() for name in NAMES if name in of}
    out, new_sum = compute(leaves)
    weighted = {"of out": out, "of new sum": new_sum}
    total = sum(
        (of[name].to(result.dtype) * result).double().sum()
        for name, result in weighted.items()
        if name in of
    )
    grads = torch.autograd.grad(total, list(leaves.values()))
    found = {f"gradient {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out, "new sum": new_sum} | found


def double(of: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in of.items()}


def check(of: dict[str, Tensor]) -> None:
    exact = bounded(lambda: results(formulas, double(of)))
    for name, value in results(lambda leaves: by(KERNELS, leaves), of).items():
        wanted, bound = exact.exact[name], exact.bounds[name]
        if value.dtype == FULL:
            within(value, exact, name)
        else:
            each_within(value, wanted, STORED * wanted.abs() + bound, name)


@pytest.mark.parametrize(("n_rows", "n_columns"), SIZES)
def test_float32(n_rows, n_columns):
    check(inputs(n_rows, n_columns))


WITHOUT = [
    ("sum",),
    ("bias",),
    ("sum", "bias"),
    ("of new sum",),
    ("of out",),
    ("sum", "of new sum"),
    ("bias", "of new sum"),
]


@pytest.mark.parametrize("without", WITHOUT, ids=", ".join)
def test_what_may_be_absent(without):
    of = inputs(11, 40, without)
    check(of)
    check({name: value.to(HALF) for name, value in of.items()})


@pytest.mark.parametrize("vectors", [FULL, HALF], ids=["fp32 vectors", "bf16 vectors"])
@pytest.mark.parametrize(("n_rows", "n_columns"), SIZES)
def test_bfloat16(n_rows, n_columns, vectors):
    of = {
        name: value.to(vectors if name in ("bias", "weight", "shift") else HALF)
        for name, value in inputs(n_rows, n_columns).items()
    }
    found = results(lambda leaves: by(KERNELS, leaves), of)
    assert {name: value.dtype for name, value in found.items()} == {
        "out": HALF,
        "new sum": HALF,
        "gradient h": HALF,
        "gradient sum": HALF,
        **{f"gradient {name}": vectors for name in ("bias", "weight", "shift")},
    }
    check(of)


def test_the_same_numbers_every_time():
    of = inputs(70, 100)
    first, second = (results(lambda leaves: by(KERNELS, leaves), of) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_rows_that_are_apart_in_memory():
    of = inputs(6, 16)
    wide = {name: torch.cat([of[name], of[name]], 1) for name in ("h", "sum")}
    sliced = of | {name: value[:, :16] for name, value in wide.items()}
    whole, part = by(KERNELS, of), by(KERNELS, sliced)
    assert torch.equal(whole[0], part[0]) and torch.equal(whole[1], part[1])


@pytest.mark.parametrize(
    ("n_rows", "n_columns", "dtype"),
    [(0, 8, FULL), (2, 8, torch.float64), (1, 8193, FULL)],
    ids=["no rows", "fp64", "wide"],
)
def test_what_the_kernels_do_not_take_is_plain_torch(n_rows, n_columns, dtype):
    of = {name: value.to(dtype) for name, value in inputs(n_rows, n_columns).items()}
    for ours, plain in zip(by(KERNELS, of), by(PLAIN, of), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, plain)


@pytest.mark.parametrize("copies", [FULL, HALF], ids=["fp32 weights", "bf16 copies"])
def test_a_trunk_in_bfloat16(copies):
    """Its gradients have the dtype of its weights, and agree with float32's to some roundings."""
    half = ResidualTrunk(16, 8, 3, 2, Arithmetic(FULL, BF16, KERNELS))
    full = ResidualTrunk(16, 8, 3, 2)
    for trunk in (half, full):
        trunk.initialise(1)
    generator = torch.Generator().manual_seed(2)
    pre_BH, noise_BL = (torch.randn(9, n, generator=generator) for n in (16, 8))
    found = []
    for trunk, dtype in ((half, copies), (full, FULL)):
        leaves = {
            name: p.detach().to(dtype).requires_grad_() for name, p in trunk.named_parameters()
        }
        leaves["pre"] = pre_BH.clone().requires_grad_()
        weights = {name: leaf for name, leaf in leaves.items() if name != "pre"}
        (d_BH, z_BL), kl_B = functional_call(trunk, weights, (leaves["pre"], noise_BL))
        assert d_BH.dtype == z_BL.dtype == (HALF if trunk is half else FULL)
        assert kl_B.dtype == FULL
        total = (d_BH * noise_BL.repeat(1, 2)).sum() + z_BL.square().sum() + kl_B.sum()
        grads = torch.autograd.grad(total, list(leaves.values()))
        found.append(dict(zip(leaves, grads, strict=True)))
    for name, ours in found[0].items():
        assert ours.dtype == (FULL if name == "pre" else copies), name
        wanted = found[1][name]
        assert (ours - wanted).norm() <= 0.1 * wanted.norm(), name
