"""Norms of gradients that are never formed equal those of the formed ones, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.kernels.precision import BF16
from dist_vasp.model import slices
from dist_vasp.model.build import make_trunk
from dist_vasp.model.norms import SharedItems, column_norms, shared_items
from dist_vasp.model.sinks import AddToGrad, Sink, SumOfRows
from dist_vasp.model.step import MicroBatch
from dist_vasp.training.step.item_sinks import Norm
from tests.support.partitioned import SMALL, gathered, make_model, pad_noise, plain, random_rows
from tests.support.ranks import run_ranks

N_ITEMS, N_ROWS = 23, 11
CASES = [("vasp", "focal"), ("nease", "cosine"), ("flvae", "multinomial"), ("wide_deep", "focal")]


class ColumnNorms(Sink):
    """Compares the squared norms of the columns of every sum of rows with those of its rows."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def take(self, parameter: torch.Tensor, first: int, grad: torch.Tensor) -> None:
        pass

    def take_sum(self, parameter: torch.Tensor, gradient: SumOfRows) -> None:
        formed = gradient.rows(0, gradient.items[1] - gradient.items[0])
        wanted = (formed * formed).sum(dim=0)
        found = column_norms(gradient, shared_items(gradient, parameter.dtype))
        self.errors.append(
            float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
        )


def norms(ranks, cases) -> list[tuple[float, float, list[float]]]:
    """For each case: the squared norm of this rank's gradients by formula and by forming them, and
    the errors of columns."""
    slices.BLOCK_COLUMNS = 5
    torch.set_grad_enabled(False)
    x, y = random_rows(N_ROWS, N_ITEMS, 1, empty=(2,)), random_rows(N_ROWS, N_ITEMS, 2, empty=(4,))
    x[0] = list(range(N_ITEMS))
    noise = np.random.default_rng(3).normal(size=(N_ROWS, SMALL["latent"]))
    found = []
    for kind, loss in cases:
        model = make_model(kind, N_ITEMS, ranks, loss)
        trunk = make_trunk(model.config, 5, Arithmetic(torch.float64))
        x_G, y_G, mine, padded = gathered(x, y, N_ITEMS, ranks)
        rows = MicroBatch(x_G, y_G, pad_noise(noise, mine, padded, torch.float64), N_ROWS)
        norm, columns = (
            Norm(ranks.replica_group, SharedItems(), torch.zeros((), dtype=torch.float64)),
            ColumnNorms(),
        )
        norm.begin()
        model.gradients(plain(trunk), rows, norm)
        norm.end()
        model.gradients(plain(trunk), rows, columns)
        model.gradients(plain(trunk), rows, AddToGrad())
        formed = sum(float((piece.whole.grad**2).sum()) for piece in model.trained_slices())
        found.append((float(norm.squared_norm), formed, columns.errors))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_norms_by_formula(world_size):
    for rank in run_ranks(norms, world_size, CASES):
        for case, (by_formula, formed, errors) in zip(CASES, rank, strict=True):
            assert by_formula == pytest.approx(formed, rel=1e-10), case
            assert all(error < 1e-10 for error in errors), case
            assert formed > 0


def norms_in_bf16(ranks) -> list[tuple[float, float]]:
    """Squared norms in bf16 and in double precision: of a product, and of a sum of rows."""
    generator = torch.Generator().manual_seed(1)
    rows = random_rows(N_ROWS, N_ITEMS, 1)
    x_G = gathered(rows, rows, N_ITEMS, ranks)[0]
    grad_GC, source_GK = (
        torch.randn(N_ROWS, n, generator=generator).bfloat16() for n in (N_ITEMS, 7)
    )
    weight_CK = torch.zeros(N_ITEMS, 7)
    wide_GH = torch.randn(N_ROWS, 7, generator=generator)
    formed = [
        grad_GC.double().T @ source_GK.double(),
        SumOfRows(wide_GH.double(), x_G, (0, N_ITEMS)).rows(0, N_ITEMS),
    ]
    found = []
    for k, gradient in enumerate(formed):
        norm = Norm(
            ranks.replica_group,
            SharedItems(),
            torch.zeros(()),
            arithmetic=Arithmetic(precision=BF16),
        )
        norm.begin()
        if k:
            norm.take_sum(weight_CK, SumOfRows(wide_GH, x_G, (0, N_ITEMS)))
        else:
            norm.take_product(weight_CK, 0, grad_GC, source_GK)
        norm.end()
        found.append((float(norm.squared_norm), float((gradient**2).sum())))
    return found


def test_norms_in_bf16_are_summed_in_float32():
    (found,) = run_ranks(norms_in_bf16, 1)
    (of_product, exact_product), (of_sum, exact_sum) = found
    assert of_product == pytest.approx(exact_product, rel=1e-5)  # its factors are bfloat16 anyway
    assert of_sum == pytest.approx(exact_sum, rel=1e-2)  # float32 gradients, rounded once
