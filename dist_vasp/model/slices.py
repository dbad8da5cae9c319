"""Slices of item matrices, and the storage they lie in.

An item matrix is cut along its item axis. A rank in training owns one range of items; a model
that is read from disk has one range for each of its files. Paths and the input side hold lists of
slices, so that both are the same model.

Shapes: I items, J items of a slice, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_vasp.kernels.random import Uniform, fill, row_keys
from dist_vasp.parallel.partition import ItemPartition

BLOCK_COLUMNS = 256  # a block of logits stays in a CPU core's cache (docs/experiments.md)
GPU_BLOCK_COLUMNS = 2048  # fewer, larger kernels; not measured yet
GRADIENT_ROWS = 1024  # input items whose gradient is held at once: made, used and dropped in cache

Range = tuple[int, int]


@dataclass(frozen=True)
class Sink:
    """Takes the gradients of item matrices, block by block: (parameter, first row, gradient).

    `rows`: how many rows of an items x items matrix it takes in one call.
    """

    take: Callable[[Tensor, int, Tensor], None]
    rows: int = GRADIENT_ROWS

    def __call__(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        self.take(parameter, first, grad)


def add_to_grad(parameter: Tensor, first: int, grad: Tensor) -> None:
    """Add a gradient to `parameter.grad`."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad[first : first + len(grad)] += grad


def drop(parameter: Tensor, first: int, grad: Tensor) -> None:
    """Take the gradient of a weight that is not trained."""


@dataclass(frozen=True)
class ItemSlice:
    """The items [lo, hi) of an item matrix, along dimension `item_dim` of `tensor`."""

    name: str
    lo: int
    hi: int
    item_dim: int
    tensor: Tensor

    def glorot(self, seed: int, fan: int) -> None:
        """Fill with Glorot uniform weights.

        A weight depends on (seed, name, item, position) alone, so every layout starts from the same
        matrix. fan: rows plus columns of the whole matrix.
        """
        bound = (6 / fan) ** 0.5
        keys = row_keys(seed, self.name, np.arange(self.lo, self.hi, dtype=np.uint64))
        by_item = self.tensor.movedim(self.item_dim, 0)
        fill(by_item[: len(keys)], keys, Uniform(-bound, bound))


def block_width(block_columns: int, device: torch.device) -> int:
    """The items of a block: `parallel.block_columns`, or the default of the device for 0."""
    return block_columns or (BLOCK_COLUMNS if device.type == "cpu" else GPU_BLOCK_COLUMNS)


class Storage(Protocol):
    """Where the slices of item matrices come from: new memory, or the files of a checkpoint.

    blocks: the ranges of items that one pass over the output side takes, in order.
    """

    n_items: int
    blocks: list[Range]

    def rows(self, name: str, width: int | None = None) -> list[ItemSlice]:
        """The slices (J, width), or (J,) without a width, of a matrix with one row per item."""
        ...

    def columns(self, name: str) -> list[ItemSlice]:
        """One slice (I, C) for each block, of an items x items matrix."""
        ...

    def before_reading(self, items: Tensor) -> None:
        """Tell the storage that the rows `items` of its items x items matrices are read next."""
        ...


class NewStorage:
    """New zero matrices for the items [start, stop) of a catalogue."""

    def __init__(
        self, part: ItemPartition, device: torch.device, dtype: torch.dtype, block_columns: int = 0
    ) -> None:
        self.part, self.n_items = part, part.n_items
        self.blocks = part.blocks(block_width(block_columns, device))
        self.device, self.dtype = device, dtype

    def rows(self, name: str, width: int | None = None) -> list[ItemSlice]:
        shape = (self.part.size,) if width is None else (self.part.size, width)
        return [ItemSlice(name, self.part.start, self.part.stop, 0, self._zeros(*shape))]

    def columns(self, name: str) -> list[ItemSlice]:
        # One contiguous (I, C) table for each block: sums of its rows stay in cache.
        return [
            ItemSlice(name, lo, hi, 1, self._zeros(self.n_items, hi - lo)) for lo, hi in self.blocks
        ]

    def before_reading(self, items: Tensor) -> None:
        pass

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)
