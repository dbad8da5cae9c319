"""The latent code of a GPU equals its formulas, forward and backward. In Triton's interpreter.

Float32 results lie within the bounds of rounding; bfloat16 ones, computed in float32 too, within
these bounds and the rounding of what is stored.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")

import torch
from torch import Tensor

from dist_vasp.kernels.cuda import TritonKernels
from dist_vasp.kernels.interface import PLAIN
from tests.oracles.rounding import bounded, each_within, within
from tests.support.interpreter import interpreted

pytestmark = interpreted

KERNELS, FULL, HALF = TritonKernels(), torch.float32, torch.bfloat16
STORED = 2.0**-7  # of bfloat16: the interpreter cuts off where a GPU rounds


def inputs(n_rows: int, n_columns: int) -> dict[str, Tensor]:
    """mu, logvar and noise, and weights for the sum of the results."""
    generator = torch.Generator().manual_seed(n_rows + n_columns)
    names = ("mu", "logvar", "noise", "of z")
    found = {name: torch.randn(n_rows, n_columns, generator=generator) for name in names}
    return found | {"of kl": torch.randn(n_rows, generator=generator)}


def formulas(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    spread = torch.exp(logvar / 2)
    return mu + spread * noise, (mu * mu + spread * spread - 1 - logvar).mean(dim=1) / 2


def kernel(mu: Tensor, logvar: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return KERNELS.latent_code(mu, logvar, noise, FULL)


def results(compute, of: dict[str, Tensor]) -> dict[str, Tensor]:
    mu, logvar = (of[name].clone().requires_grad_() for name in ("mu", "logvar"))
    z, kl = compute(mu, logvar, of["noise"])
    total = (z * of["of z"]).double().sum() + (kl * of["of kl"]).double().sum()
    grads = torch.autograd.grad(total, [mu, logvar])
    return {"z": z, "kl": kl, "gradient mu": grads[0], "gradient logvar": grads[1]}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("n_rows", "n_columns"), [(1, 1), (3, 7), (2, 1024), (5, 1030)])
def test_results_and_gradients(n_rows, n_columns, dtype):
    of = inputs(n_rows, n_columns)
    of |= {name: of[name].to(dtype) for name in ("mu", "logvar", "of z")}
    found = results(kernel, of)
    assert found["kl"].dtype == FULL
    exact = bounded(lambda: results(formulas, {name: v.double() for name, v in of.items()}))
    for name, value in found.items():
        if value.dtype == FULL:
            within(value, exact, name)
        else:
            wanted = exact.exact[name]
            each_within(value, wanted, STORED * wanted.abs() + exact.bounds[name], name)


@pytest.mark.parametrize(
    ("noisy", "dtype"), [(False, FULL), (True, torch.float64)], ids=["no noise", "fp64"]
)
def test_what_the_kernels_do_not_take_is_plain_torch(noisy, dtype):
    of = {name: value.to(dtype) for name, value in inputs(2, 5).items()}
    arguments = of["mu"], of["logvar"], of["noise"] if noisy else None, dtype
    ours, plain = KERNELS.latent_code(*arguments), PLAIN.latent_code(*arguments)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
