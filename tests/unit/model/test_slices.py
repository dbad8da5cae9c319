"""Initial weights of item matrices: Glorot, and the same on every layout."""

from __future__ import annotations

import pytest
import torch

from dist_vasp.config.schema import Config, ModelConfig, ParallelConfig
from dist_vasp.kernels.interface import EXACT, Arithmetic, Kernels
from dist_vasp.model.build import new_model
from dist_vasp.model.slices import ItemSlice, NewStorage
from dist_vasp.parallel.comm import Group, Ranks
from dist_vasp.parallel.partition import ItemPartition, Layout
from tests.support.partitioned import assemble, export

N_ITEMS, HIDDEN, LATENT = 97, 33, 17  # divisible by none of 2, 3, 4
SIZES = {"hidden": HIDDEN, "latent": LATENT, "encoder_layers": 1, "decoder_layers": 1}


class Aligned(Kernels):
    align = 16


def initial(partitions: int, arithmetic: Arithmetic = EXACT, columns: int = 0, seed: int = 4):
    """The whole matrices of a VASP that `partitions` ranks initialise, by name."""
    config = Config(model=ModelConfig(**SIZES), parallel=ParallelConfig(block_columns=columns))
    pieces = []
    for rank in range(partitions):
        layout, alone = Layout(partitions, partitions, 1), Group(1, 0)
        ranks = Ranks(rank, layout, torch.device("cpu"), alone, alone, alone)
        model = new_model(config, N_ITEMS, ranks, arithmetic)
        model.initialise(seed)
        pieces += export(model.slices())
    return assemble(pieces)


def test_the_number_of_ranks_blocks_and_the_dtype_do_not_change_initial_weights():
    whole = initial(1)
    for name, p in initial(2).items():
        assert torch.equal(p, whole[name]), name
    for name, p in initial(3, columns=10).items():
        assert torch.equal(p, whole[name]), name
    for name, p in initial(1, Arithmetic(torch.float64)).items():
        assert torch.equal(p, whole[name].double()), name
    for name, p in initial(2, Arithmetic(kernels=Aligned()), columns=16).items():
        assert torch.equal(p, whole[name]), name


def test_padding_is_zero_and_belongs_to_no_slice():
    part = ItemPartition(N_ITEMS, 2, 1)
    storage = NewStorage(part, torch.device("cpu"), Arithmetic(kernels=Aligned()), width=32)
    by_row, by_column = storage.rows("rows", 5)[0], storage.columns("columns")[-1]
    for piece in (by_row, by_column):
        piece.glorot(3, 10)
        assert piece.whole.shape[piece.item_dim] % 16 == 0
        front = piece.whole.narrow(piece.item_dim, 0, piece.hi - piece.lo)
        assert front.count_nonzero() == front.numel() == piece.whole.count_nonzero()
        moment = piece.like("moment", torch.ones_like(piece.whole))
        assert moment.tensor.shape == piece.tensor.shape == front.shape


def test_initial_weights_are_glorot():
    whole, other = initial(1), initial(1, seed=5)
    fans = {
        "input.weight": N_ITEMS + HIDDEN,
        "output.decoder.weight": N_ITEMS + HIDDEN,
        "output.latent.weight": N_ITEMS + LATENT,
        "output.nease.weight": 2 * N_ITEMS,
    }
    seen = []
    for name, p in whole.items():
        if name not in fans:
            assert (p == 0).all(), name
            continue
        bound = (6 / fans[name]) ** 0.5
        assert 0.95 * bound < p.abs().max() <= bound, name
        assert abs(float(p.std()) / (bound / 3**0.5) - 1) < 0.1, name
        assert not torch.equal(p, other[name])
        seen.append(p[: N_ITEMS - 1, :LATENT].flatten() / bound)
    assert len(seen) == len(fans)
    assert (whole["output.nease.weight"].diagonal() == 0).all()
    assert torch.corrcoef(torch.stack(seen)).fill_diagonal_(0).abs().max() < 0.12


@pytest.mark.parametrize("item_dim", [0, 1])
def test_rows_beyond_the_items_are_left_alone(item_dim):
    tensor = torch.zeros((8, 5) if item_dim == 0 else (5, 8))
    ItemSlice("input.weight", 10, 16, item_dim, tensor).glorot(1, 20)
    by_item = tensor.movedim(item_dim, 0)
    assert (by_item[:6] != 0).all() and (by_item[6:] == 0).all()
