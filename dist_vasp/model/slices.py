"""Slices of item matrices, and the storage they lie in.

An item matrix is cut along its item axis. A rank in training owns one range of items; a model
that is read from disk has one range for each of its files. Paths and the input side hold lists of
slices, so that both are the same model.

Shapes: I items, J items of a slice, C columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_vasp.kernels.interface import EXACT, Arithmetic
from dist_vasp.kernels.random import Uniform, fill, row_keys
from dist_vasp.parallel.partition import ItemPartition

BLOCK_COLUMNS = 256  # a block of logits stays in a CPU core's cache (docs/experiments.md)
GPU_BLOCK_COLUMNS = 2048  # of the closed form
GPU_ALIGN = 128  # a product with an odd dimension runs at a sixth of the rate

Range = tuple[int, int]


@dataclass(frozen=True)
class ItemSlice:
    """The items [lo, hi) of an item matrix, along dimension `item_dim` of `tensor`.

    padded: the memory that `tensor` is the front of; its further items are zero and stay zero. None
    where there are none. copy: the padded weights in the precision of the products, None where
    products read the weights themselves.
    """

    name: str
    lo: int
    hi: int
    item_dim: int
    tensor: Tensor
    padded: Tensor | None = None
    copy: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """The weights with their padding: what is updated."""
        return self.tensor if self.padded is None else self.padded

    @property
    def working(self) -> Tensor:
        """The weights with their padding, as products read them."""
        return self.whole if self.copy is None else self.copy

    def like(self, name: str, whole: Tensor) -> ItemSlice:
        """The same items of `whole`, a moment of these weights or of each of their vectors."""
        return _front_of(whole, name, (self.lo, self.hi), self.item_dim)

    def refresh(self) -> None:
        """Make the copy anew from the weights."""
        if self.copy is not None:
            self.copy.copy_(self.whole)

    def glorot(self, seed: int, fan: int) -> None:
        """Fill with Glorot uniform weights.

        A weight depends on (seed, name, item, position) alone, so every layout starts from the same
        matrix. fan: rows plus columns of the whole matrix.
        """
        bound = (6 / fan) ** 0.5
        keys = row_keys(seed, self.name, np.arange(self.lo, self.hi, dtype=np.uint64))
        by_item = self.tensor.movedim(self.item_dim, 0)
        fill(by_item[: len(keys)], keys, Uniform(-bound, bound))


def _front_of(
    whole: Tensor, name: str, items: Range, item_dim: int, copy: Tensor | None = None
) -> ItemSlice:
    """The slice whose weights are the front of `whole`; the rest is padding."""
    n = items[1] - items[0]
    if whole.shape[item_dim] == n:
        return ItemSlice(name, *items, item_dim, whole, None, copy)
    return ItemSlice(name, *items, item_dim, whole.narrow(item_dim, 0, n), whole, copy)


def block_width(block_columns: int, device: torch.device) -> int:
    """The items of a block: `parallel.block_columns`, or the default of the device for 0."""
    return block_columns or (BLOCK_COLUMNS if device.type == "cpu" else GPU_BLOCK_COLUMNS)


class Storage(Protocol):
    """Where the slices of item matrices come from: new memory, or the files of a checkpoint.

    blocks: the ranges of items that one pass over the output side takes, in order. arithmetic: how
    its weights are computed with.
    """

    n_items: int
    blocks: list[Range]
    arithmetic: Arithmetic

    def rows(
        self, name: str, width: int | None = None, dtype: torch.dtype | None = None
    ) -> list[ItemSlice]:
        """The slices (J, width), or (J,) without a width, of a matrix with one row per item.

        dtype: that of the weights by default; numbers of another one are no weights.
        """
        ...

    def columns(self, name: str) -> list[ItemSlice]:
        """One slice (I, C) for each block, of an items x items matrix."""
        ...

    def before_reading(self, items: Tensor) -> None:
        """Tell the storage that the rows `items` of its items x items matrices are read next."""
        ...


class NewStorage:
    """New zero matrices for the items [start, stop) of a catalogue.

    width: items of a block, 0 for the default of the device.
    """

    def __init__(
        self,
        part: ItemPartition,
        device: torch.device,
        arithmetic: Arithmetic = EXACT,
        width: int = 0,
    ) -> None:
        self.part, self.n_items = part, part.n_items
        self.device, self.arithmetic = device, arithmetic
        # A block begins where the padding of the one before it would end.
        self.blocks = part.blocks(arithmetic.kernels.padded(block_width(width, device)))

    def rows(
        self, name: str, width: int | None = None, dtype: torch.dtype | None = None
    ) -> list[ItemSlice]:
        n = self.arithmetic.kernels.padded(self.part.size)
        shape = (n,) if width is None else (n, width)
        return [self._slice(name, (self.part.start, self.part.stop), 0, shape, dtype)]

    def columns(self, name: str) -> list[ItemSlice]:
        # One contiguous (I, C) table for each block: sums of its rows stay in cache.
        return [
            self._slice(name, (lo, hi), 1, (self.n_items, self.arithmetic.kernels.padded(hi - lo)))
            for lo, hi in self.blocks
        ]

    def before_reading(self, items: Tensor) -> None:
        pass

    def _slice(
        self,
        name: str,
        items: Range,
        item_dim: int,
        shape: tuple[int, ...],
        dtype: torch.dtype | None = None,
    ) -> ItemSlice:
        whole = torch.zeros(shape, device=self.device, dtype=dtype or self.arithmetic.dtype)
        short, is_matrix = self.arithmetic.precision.dtype, dtype is None and len(shape) > 1
        copy = torch.zeros_like(whole, dtype=short) if short and is_matrix else None
        return _front_of(whole, name, items, item_dim, copy)
