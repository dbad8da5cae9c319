"""Norms of gradients that are never formed equal those of the formed ones, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model import slices
from dist_vasp.model.build import make_trunk
from dist_vasp.model.norms import SharedItems, column_norms, shared_items
from dist_vasp.model.sinks import AddToGrad, Sink, SumOfRows
from dist_vasp.model.step import MicroBatch
from dist_vasp.training.item_sinks import Norm
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
