"""What a step does with the gradients of the item matrices: measure them, or apply and drop them.

Shapes: G rows of the partition group, C columns of a block, K width of a source.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_vasp.kernels.interface import EXACT, Arithmetic, Kernels
from dist_vasp.model.norms import SharedItems, column_norms, diagonal_gradients
from dist_vasp.model.sinks import GRADIENT_ROWS, Sink, SumOfRows
from dist_vasp.parallel.clock import Clock
from dist_vasp.parallel.comm import Group, all_reduce
from dist_vasp.training.step.optimizer import InPlaceAdam


def squared(grad: Tensor) -> Tensor:
    """The squared norm of a tensor, a scalar."""
    return torch.linalg.vector_norm(grad) ** 2


class Norm(Sink):
    """Adds up the squared norm of the gradients of this rank's items in `squared_norm`.

    With one replica no gradient is formed (model/norms.py). Several replicas form each and add
    theirs, because a norm needs the rows of all of them.

    keeps: whether what gradients are made of is kept for `pass_on`. It has the size of the logits.
    arithmetic: of the products, whose sums are float32 also where their factors are bfloat16.
    """

    def __init__(
        self,
        replicas: Group,
        shared: SharedItems,
        squared_norm: Tensor,
        keeps: bool = False,
        arithmetic: Arithmetic = EXACT,
    ) -> None:
        self._replicas, self._shared, self.keeps = replicas, shared, keeps
        self._arithmetic = arithmetic
        self.squared_norm = squared_norm
        self._products: dict[int, tuple[Tensor, Tensor]] = {}  # by source: it and sum of g g^T
        self._kept: list[Callable[[Sink], None]] = []

    def begin(self) -> None:
        """Forget the step before."""
        self.squared_norm.zero_()
        self._products.clear()
        self._kept.clear()

    def pass_on(self, sink: Sink) -> None:
        """Give every gradient that was taken to another sink."""
        for give in self._kept:
            give(sink)
        self._kept.clear()

    def take(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        if self.keeps:
            self._kept.append(lambda sink: sink.take(parameter, first, grad))
        self.squared_norm += squared(all_reduce(grad, self._replicas))

    def take_product(
        self, parameter: Tensor, first: int, grad_GC: Tensor, source_GK: Tensor
    ) -> None:
        if self._replicas.size > 1:
            super().take_product(parameter, first, grad_GC, source_GK)
            return
        if self.keeps:
            self._kept.append(lambda sink: sink.take_product(parameter, first, grad_GC, source_GK))
        product_GG = self._by_itself(grad_GC, parameter.dtype)
        if id(parameter) in self._products:
            self._products[id(parameter)][1].add_(product_GG)
        else:
            self._products[id(parameter)] = source_GK, product_GG

    def take_sum(self, parameter: Tensor, gradient: SumOfRows) -> None:
        if self._replicas.size > 1:
            super().take_sum(parameter, gradient)
            return
        if self.keeps:
            self._kept.append(lambda sink: sink.take_sum(parameter, gradient))
        product_GG = self._by_itself(gradient.grad_GC, parameter.dtype)
        self.squared_norm += (self._shared.of(gradient, parameter.dtype) * product_GG).sum()
        if gradient.diagonal is not None:
            self.squared_norm -= squared(diagonal_gradients(gradient))

    def end(self) -> None:
        """Complete `squared_norm`: every gradient of the step has been taken."""
        for source_GK, sum_GG in self._products.values():
            self.squared_norm += (self._by_itself(source_GK, sum_GG.dtype) * sum_GG).sum()
        self.squared_norm.clamp_(min=0)  # the diagonal was taken off

    def _by_itself(self, rows_GK: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of a tensor with its transpose, (G, G) of a dtype."""
        rounded_GK = self._arithmetic.precision.cast(rows_GK)
        return self._arithmetic.kernels.product(rounded_GK, rounded_GK.T, dtype)


class Update(Sink):
    """Applies gradients as they come and drops them; `squared_norm` is that of all of them.

    alone: the kernels can apply a sum of rows without forming it, and no other rank has a part in
    it. Then dense gradients wait for `end`, which applies them together.
    """

    def __init__(
        self,
        optimizer: InPlaceAdam,
        replicas: Group,
        shared: SharedItems,
        kernels: Kernels,
        clock: Clock,
    ) -> None:
        self._optimizer, self._replicas, self._shared = optimizer, replicas, shared
        self._kernels, self._clock = kernels, clock
        self.alone = kernels.updates_alone and replicas.size == 1
        self._waiting: list[tuple[Tensor, Tensor]] = []
        device = optimizer.param_groups[0]["params"][0].device
        self.squared_norm = torch.zeros((), device=device)

    def begin(self) -> None:
        """Forget the step before."""
        self.squared_norm.zero_()
        self._waiting.clear()

    def take(self, parameter: Tensor, first: int, grad: Tensor) -> None:
        whole = grad.shape == parameter.shape
        if self.alone and whole and self._optimizer.lean_dim(parameter) is None:
            self._waiting.append((parameter, grad))
            return
        grad = all_reduce(grad, self._replicas)
        with self._clock("optimizer"):
            self.squared_norm += self._optimizer.update(parameter, first, grad)

    def take_sum(self, parameter: Tensor, gradient: SumOfRows) -> None:
        lean_dim = self._optimizer.lean_dim(parameter)
        formed = self._optimizer.l2(parameter) or gradient.x.values is not None
        if self.alone and not formed:
            norms_C = None
            if lean_dim == 1:
                norms_C = column_norms(gradient, self._shared.of(gradient, parameter.dtype))
            with self._clock("optimizer"):
                self.squared_norm += self._optimizer.update_sum(parameter, gradient, norms_C)
        elif lean_dim == 1:  # the second moment of a column needs the whole column
            self.take_rows(parameter, gradient, len(parameter))
        elif gradient.diagonal is None:
            self.take_rows(parameter, gradient, GRADIENT_ROWS)
        else:
            self.take_rows(parameter, gradient, self._kernels.gradient_rows)

    def end(self) -> None:
        """Apply what has waited: every gradient of the step has been taken."""
        if self._waiting:
            with self._clock("optimizer"):
                self.squared_norm += self._optimizer.update_many(self._waiting)
            self._waiting.clear()
