"""One function loads weights: by item range, by a mapping of items, and never what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.checkpoint.header import Header
from dist_vasp.checkpoint.read import open_checkpoint
from dist_vasp.checkpoint.weights import load_weights
from dist_vasp.checkpoint.write import save
from dist_vasp.model.slices import ItemSlice
from dist_vasp.parallel.comm import form_groups
from dist_vasp.parallel.partition import Layout
from tests.unit.checkpoint.test_header import HEADER

ALONE = form_groups(0, Layout(1, 1, 1), torch.device("cpu"))
W = torch.arange(25.0).view(5, 5)
HEAD = torch.arange(10.0).view(5, 2)
LEAN = torch.arange(5.0).view(1, 5)
TRUNK = {"mu.bias": torch.tensor([1.0, 2.0])}


def item_to_item(lo: int, hi: int, tensor: torch.Tensor) -> ItemSlice:
    return ItemSlice("w", lo, hi, 1, tensor)


@pytest.fixture
def saved(tmp_path) -> Path:
    """W (5, 5) in two blocks of columns, one moment per column of it, and a head (5, 2)."""
    pieces = [
        item_to_item(0, 3, W[:, :3].contiguous()),
        item_to_item(3, 5, W[:, 3:].contiguous()),
        ItemSlice("w.exp_avg_sq", 0, 5, 1, LEAN),
        ItemSlice("head", 0, 5, 0, HEAD),
    ]
    save(tmp_path / "step-00000007", HEADER, pieces, TRUNK, ALONE)
    return tmp_path / "step-00000007"


def test_any_cut_is_filled(saved):
    w, head, lean = torch.zeros(5, 3), torch.zeros(2, 2), torch.zeros(1, 2)
    pieces = [
        item_to_item(1, 4, w),
        ItemSlice("head", 3, 5, 0, head),
        ItemSlice("w.exp_avg_sq", 2, 4, 1, lean),
    ]
    assert load_weights(open_checkpoint(saved), pieces, {}) == {}
    assert torch.equal(w, W[:, 1:4])
    assert torch.equal(head, HEAD[3:])
    assert torch.equal(lean, LEAN[:, 2:4])


@pytest.mark.parametrize("blocks", [[(0, 6)], [(0, 1), (1, 4), (4, 6)]])
def test_known_items_keep_their_rows_and_columns(saved, blocks):
    """Six items of which the checkpoint knows four, in another order."""
    old_rows = np.array([4, -1, 0, 3, -1, 1])
    known = np.flatnonzero(old_rows >= 0)
    w = [torch.full((6, hi - lo), -1.0) for lo, hi in blocks]
    head = torch.full((6, 2), -1.0)
    pieces = [item_to_item(lo, hi, t) for (lo, hi), t in zip(blocks, w, strict=True)]
    load_weights(open_checkpoint(saved), [*pieces, ItemSlice("head", 0, 6, 0, head)], {}, old_rows)
    expected = torch.full((6, 6), -1.0)
    expected[np.ix_(known, known)] = W[np.ix_(old_rows[known], old_rows[known])]
    assert torch.equal(torch.cat(w, dim=1), expected)
    assert torch.equal(head[known], HEAD[old_rows[known]])
    assert (head[old_rows < 0] == -1).all()


def test_the_trunk_has_the_wanted_tensors_and_no_more(saved):
    opened = open_checkpoint(saved)
    found = load_weights(opened, [], {"mu.bias": (2,)})
    assert found.keys() == {"mu.bias"} and torch.equal(found["mu.bias"], TRUNK["mu.bias"])
    for shapes in ({"mu.bias": (3,)}, {"mu.weight": (2,)}):
        with pytest.raises(ValueError, match=r"trunk\.safetensors has no mu\.\w+ of shape"):
            load_weights(opened, [], shapes)


@pytest.mark.parametrize("old_rows", [None, np.arange(5)], ids=["the same items", "mapped items"])
@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (ItemSlice("w", 0, 5, 0, torch.zeros(5, 5)), "items along axis 1, expected axis 0"),
        (ItemSlice("head", 0, 5, 0, torch.zeros(5, 3)), r"has shape \[5, 2\], expected \[5, 3\]"),
        (ItemSlice("bias", 0, 5, 0, torch.zeros(5)), "does not hold bias for all items 0 to 4"),
    ],
    ids=["axis", "width", "name"],
)
def test_what_does_not_fit_is_named(saved, piece, message, old_rows):
    with pytest.raises(ValueError, match=message):
        load_weights(open_checkpoint(saved), [piece], {}, old_rows)


def test_numbers_that_no_training_continues_from(tmp_path):
    broken = HEAD.clone()
    broken[2, 1] = torch.nan
    path = tmp_path / "step-00000007"
    save(path, HEADER, [ItemSlice("head", 0, 5, 0, broken)], {}, ALONE)
    with pytest.raises(ValueError, match=f"head holds NaN or infinite numbers; {Header.FIX_FILE}"):
        load_weights(open_checkpoint(path), [ItemSlice("head", 0, 5, 0, torch.zeros(5, 2))], {})
