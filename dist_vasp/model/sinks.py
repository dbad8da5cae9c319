"""Sinks: where the gradients of item matrices go, piece by piece.

A path says how a gradient arises, and the sink decides what becomes of it: it is added up, applied
and dropped, or only measured. So a gradient of a whole matrix never has to exist.

Shapes: G rows of the partition group, C columns of a block, K width of a source, n items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_vasp.kernels.interface import PLAIN, Kernels
from dist_vasp.model.sparse import ItemRows

GRADIENT_ROWS = 1024  # input items whose gradient is held at once: made, used and dropped in cache


@dataclass(frozen=True)
class SumOfRows:
    """A gradient whose row i is the sum of `grad_GC` over the rows of `x` that hold item lo + i,
    each times its rating where `x` has ratings.

    grad_GC: dL/d(outputs). x: the rows that the outputs are sums over. items: [lo, hi). diagonal:
    column c of row c + diagonal has no gradient; None where every entry has one.
    """

    grad_GC: Tensor
    x: ItemRows
    items: tuple[int, int]
    diagonal: int | None = None
    kernels: Kernels = PLAIN

    def rows(self, first: int, last: int) -> Tensor:
        """The rows [first, last) of the gradient: (last - first, C)."""
        lo = self.items[0]
        if self.x.values is not None:
            assert self.diagonal is None
            bags = self.x.rows_by_item(lo + first, lo + last)
            values = self.x.values_by_item(lo + first, lo + last)
            return self.kernels.sum_weighted_rows(self.grad_GC, *bags, values)
        any_start = self.kernels.updates_alone
        bags_of = self.x.bags_of_items if any_start else self.x.rows_by_item
        bags = bags_of(lo + first, lo + last)
        grad_nC = self.kernels.sum_rows(self.grad_GC, *bags)
        if self.diagonal is not None:
            start, stop = max(self.diagonal, first), min(self.diagonal + grad_nC.shape[1], last)
            if start < stop:
                square = grad_nC[start - first :, start - self.diagonal : stop - self.diagonal]
                torch.diagonal(square).zero_()
        return grad_nC


class Sink(ABC):
    """Takes the gradients of parameters, each a tensor with the items along its first dimension or,
    for an items x items matrix, its input items.

    A gradient that is a sum of rows is made and taken GRADIENT_ROWS rows at a time.
    """

    @abstractmethod
    def take(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        """Take the gradient of the rows of `parameter` from `first` on."""

    def take_product(
        self, parameter: Tensor, first: int, grad_GC: Tensor, source_GK: Tensor
    ) -> None:
        """Take the gradient grad^T source (C, K) of the C rows from `first` on."""
        self.take(parameter, first, grad_GC.T @ source_GK)  # in the precision of both

    def take_sum(self, parameter: Tensor, gradient: SumOfRows) -> None:
        """Take the gradient of every row of `parameter`."""
        self.take_rows(parameter, gradient, GRADIENT_ROWS)

    def take_rows(self, parameter: Tensor, gradient: SumOfRows, at_once: int) -> None:
        """Take the gradient of every row of `parameter`, `at_once` rows at a time."""
        n = gradient.items[1] - gradient.items[0]
        for first in range(0, n, at_once):
            self.take(parameter, first, gradient.rows(first, min(first + at_once, n)))


class AddToGrad(Sink):
    """Adds gradients to `parameter.grad`."""

    def take(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[first : first + len(grad)] += grad


class Drop(Sink):
    """Takes no gradient at all: for weights that are not trained."""

    def take(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        pass

    def take_product(
        self, parameter: Tensor, first: int, grad_GC: Tensor, source_GK: Tensor
    ) -> None:
        pass

    def take_sum(self, parameter: Tensor, gradient: SumOfRows) -> None:
        pass
