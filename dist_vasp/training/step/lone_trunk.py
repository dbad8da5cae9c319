"""The trunk where one rank trains: nothing is partitioned, so DeepSpeed has no part in it.

It has the methods of `zero.ZeroTrunk`. On a GPU that computes in bfloat16 its products read copies
of the weights, which the update writes; their gradients are bfloat16, too.

Shapes: B rows, H hidden width, K width of a source, L latent width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call

from dist_vasp.config.schema import Config
from dist_vasp.kernels.interface import Arithmetic
from dist_vasp.model.trunk import Trunk
from dist_vasp.parallel.comm import Ranks
from dist_vasp.training.step.adam_step import Beside
from dist_vasp.training.step.optimizer import MOMENTS, InPlaceAdam


class LoneTrunk:
    """A Trunk and its optimizer; call it as the trunk itself."""

    stage = 0

    def __init__(self, trunk: Trunk, config: Config, ranks: Ranks, by: Arithmetic) -> None:
        self.module, self.ranks = trunk.to(ranks.device), ranks
        self.n_parameters = sum(p.numel() for p in trunk.parameters())
        self._accumulation, self._n_backward = config.optimizer.accumulation, 0
        self._kernels = by.kernels
        self._parameters: dict[str, Tensor] = dict(trunk.named_parameters())
        self._read = self._parameters  # by products
        beside: dict[Tensor, Beside] = {}
        # Gradients of several micro-batches are added up: in float32, so without copies.
        if by.kernels.updates_alone and by.precision.dtype and self._accumulation == 1:
            self._read = {
                name: p.detach().to(by.precision.dtype).requires_grad_()
                for name, p in self._parameters.items()
            }
            beside = {p: Beside(self._read[name].data) for name, p in self._parameters.items()}
        self.optimizer = InPlaceAdam(
            self._parameters.values(), config.optimizer, kernels=by.kernels, beside=beside
        )
        self._squared_norm: Tensor | None = None

    def __call__(
        self, pre_BH: Tensor, noise_BL: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        with self.ranks.clock("trunk"):
            if self._read is self._parameters:
                return self.module(pre_BH, noise_BL)
            return functional_call(self.module, self._read, (pre_BH, noise_BL))

    def refresh(self) -> None:
        """Make the copies that products read anew: the weights have changed."""
        if self._read is not self._parameters:
            for name, p in self._parameters.items():
                self._read[name].data.copy_(p)

    def backward(self, scalar: Tensor) -> None:
        """Run autograd from `scalar`; gradients of micro-batches add up."""
        if self._n_backward % self._accumulation == 0:
            self._drop_gradients()
        with self.ranks.clock("trunk"):
            scalar.backward()
        self._n_backward += 1
        self._squared_norm = None

    def begin_step(self) -> None:
        """Count a step; what it multiplies gradients by is then known."""
        self.optimizer.begin_step()

    def step(self) -> None:
        """End a micro-batch; the last one of a step updates the parameters."""
        if self._n_backward % self._accumulation:
            return
        with self.ranks.clock("optimizer"):
            if self._kernels.updates_alone:
                scale = self.optimizer.grad_scale
                found = self.optimizer.update_many(self._gradients())
                if not isinstance(scale, Tensor):  # else the norm was known before
                    self._squared_norm = found
            else:
                self.squared_norm()
                self.optimizer.update_all()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        for leaf in self._read.values():
            leaf.grad = None

    def squared_norm(self) -> Tensor:
        """Of the gradient, after the last backward of a step: a float64 scalar on the device."""
        if self._squared_norm is None:
            grads = [grad for _, grad in self._gradients()]
            wide = None if grads[0].dtype.itemsize > 2 else torch.float32
            norms = torch._foreach_norm(grads, dtype=wide)
            self._squared_norm = torch.linalg.vector_norm(torch.stack(norms)).double() ** 2
        return self._squared_norm.double()

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter that has a gradient, and it."""
        pairs = [(p, self._read[name].grad) for name, p in self._parameters.items()]
        return [(p, grad) for p, grad in pairs if grad is not None]

    def close(self) -> None:
        """Nothing outside holds its memory."""

    @contextmanager
    def evaluating(self) -> Iterator[LoneTrunk]:
        """The trunk in evaluation mode, for the time of the body."""
        self.module.eval()
        try:
            yield self
        finally:
            self.module.train()

    # --- state ------------------------------------------------------------------------------------

    def ensure_state(self) -> list[dict]:
        """The optimizer's state of every parameter, created empty before the first step."""
        return [self.optimizer.ensure_state(p) for p in self._parameters.values()]

    def tensors(self, moments: bool) -> dict[str, Tensor]:
        """Every parameter and, if asked, its moments (`NAME.exp_avg`, ...)."""
        found = {}
        for name, p in self._parameters.items():
            found[name] = p.detach()
            state = self.optimizer.ensure_state(p)
            for moment in MOMENTS if moments else ():
                found[f"{name}.{moment}"] = state[moment]
        return found

    def shapes(self, moments: bool) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that `tensors(moments)` gives."""
        names = ["", *(f".{moment}" for moment in MOMENTS)] if moments else [""]
        return {
            f"{name}{more}": tuple(p.shape)
            for name, p in self._parameters.items()
            for more in names
        }

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors(moments=True)` gave, at any stage of ZeRO."""
        for name, value in self.tensors(moments=True).items():
            value.copy_(tensors[name])
