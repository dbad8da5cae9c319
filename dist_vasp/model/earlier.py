"""The encoder as it was before the present phase of the training, for a prior that reads it.

It is a second input side, partitioned by item like the first, and a second trunk, which every rank
holds whole. Neither has a gradient. A checkpoint that training resumes from keeps both, under the
names of the encoder with `.old` behind. An export leaves them out.

Shapes: B rows of this rank, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from dist_vasp.model.input_side import InputSide
from dist_vasp.model.slices import ItemSlice
from dist_vasp.model.sparse import ItemRows
from dist_vasp.model.step import Prior
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import Group

OLD = ".old"  # behind the name of a weight of the encoder


class EarlierEncoder(ABC):
    """An input side and a trunk that are copied where a phase begins, and else stay as they are."""

    def __init__(self, input: InputSide, trunk: Trunk) -> None:
        self._input = input
        self.trunk = trunk.eval().requires_grad_(False)

    def slices(self) -> list[ItemSlice]:
        """This rank's slices of the old W1."""
        return self._input.slices()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter of the old trunk, whole, by its name in a checkpoint."""
        return {f"{name}{OLD}": p for name, p in self.trunk.named_parameters()}

    @torch.no_grad()
    def take(self, slices: list[ItemSlice], trunk: Mapping[str, Tensor]) -> None:
        """Copy the encoder: this rank's slices of W1, and the whole trunk by name."""
        for own, piece in zip(self.slices(), slices, strict=True):
            own.whole.copy_(piece.whole)
        self.load({f"{name}{OLD}": tensor for name, tensor in trunk.items()})

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, after the slices have their weights."""
        for name, parameter in self.tensors().items():
            parameter.copy_(tensors[name])
        for piece in self.slices():
            piece.refresh()

    @torch.no_grad()
    def prior(self, x: ItemRows, group: Group) -> Prior:
        """The prior of this rank's rows, given the rows of the group."""
        pre_BH = self._input.forward(x, group)
        own = slice(group.rank * len(pre_BH), (group.rank + 1) * len(pre_BH))
        return self.prior_of(pre_BH, x.lengths[own])

    @abstractmethod
    def prior_of(self, pre_BH: Tensor, lengths_B: Tensor) -> Prior:
        """The prior of rows, given the old W1 x and the number of their interactions."""
