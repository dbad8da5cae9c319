"""Rows of x scaled to length 1, with and without dropout."""

from __future__ import annotations

import pytest
import torch

from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.input_side import InputSide, UnitLength
from dist_vasp.model.sinks import AddToGrad
from dist_vasp.model.slices import NewStorage
from dist_vasp.parallel.comm import Group
from dist_vasp.parallel.partition import ItemPartition
from tests.oracles.dense import dense_rows
from tests.unit.model.test_sparse import item_rows

ROWS = [[0, 2, 3, 8], [], [1], [0, 1, 2, 3, 4, 5, 6, 7, 8]]
N_ITEMS, HIDDEN = 9, 4


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.75, True), (0.75, False)])
def test_scaled_rows_and_their_gradient_equal_dense_ones(dropout, training):
    storage = NewStorage(
        ItemPartition(N_ITEMS, 1, 0), torch.device("cpu"), Arithmetic(torch.float64)
    )
    side = InputSide(storage, HIDDEN, UnitLength(dropout))
    side.initialise(3, N_ITEMS)
    x, alone = item_rows(ROWS, N_ITEMS), Group(1, 0)
    (piece,) = side.slices()
    dense_x = dense_rows(ROWS, N_ITEMS, torch.float64)
    unit = dense_x / dense_x.norm(dim=1, keepdim=True).clamp(min=1)
    if training:  # on average a share of 1 - dropout of the items is left
        unit = unit / (1 - dropout) ** 0.5
    torch.testing.assert_close(side.forward(x, alone, training), unit @ piece.tensor)
    if training:
        grad = torch.randn(len(ROWS), HIDDEN, dtype=torch.float64)
        side.backward(x, grad, AddToGrad())
        torch.testing.assert_close(piece.tensor.grad, unit.T @ grad)


def test_training_expects_what_ranking_computes():
    whole = item_rows([list(range(64))], 64)
    left = item_rows([list(range(0, 64, 4))], 64)
    like = torch.zeros(1, 1, dtype=torch.float64)
    of_one_item = UnitLength(0.75).factors(left, True, like)
    assert of_one_item * 16 == UnitLength(0.75).factors(whole, False, like) * 64
