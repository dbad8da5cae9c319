"""Nadam, Adam and AdamW, updated in place: one rule for the trunk (inside DeepSpeed) and the item
matrices (outside it).

    m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2,    denom = sqrt(v / (1 - b2^t)) + eps
    Adam   p -= lr / (1 - b1^t) * m / denom
    AdamW  first multiplies p by 1 - lr * weight_decay
    Nadam  p -= lr * ((1 - mu_t) / (1 - prod mu_1..t) * g
                      + mu_(t+1) / (1 - prod mu_1..t+1) * m) / denom
           mu_t = b1 * (1 - 0.5 * 0.96^(t * momentum_decay))

Sources: Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW), Dozat 2016 (Nadam); the same
numbers as torch.optim's Adam, AdamW and NAdam.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels.interface import PLAIN, AdamStep, Kernels, Weights
from dist_vasp.model.sinks import SumOfRows
from dist_vasp.training.step.adam_step import Beside, Factors, factors_in, step_numbers
from dist_vasp.training.step.plain_update import SMALL, PlainUpdate

MOMENTS = ("exp_avg", "exp_avg_sq")
SCALARS = ("step", "mu_product")


class InPlaceAdam(torch.optim.Optimizer):
    """Adam, AdamW or Nadam by `config.name`.

    State per parameter: `exp_avg` and `exp_avg_sq` of its shape, and the scalars `step` and
    `mu_product`, which the parameters of a group share. A parameter group with `lean_dim` keeps one
    second moment per vector along that dimension of its matrices (the mean of the squared
    gradient), as embedding libraries do: about 8 bytes per weight. The gradient of the matrices of
    a group with `l2` grows by `l2` times the weights in `update` and `update_many`.

    beside: copies and starts, by parameter.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        config: OptimizerConfig,
        lr: float = 0.0,
        kernels: Kernels = PLAIN,
        beside: dict[Tensor, Beside] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "lean_dim": None, "rate": 1.0, "l2": 0.0})
        self.config = config
        self._grad_scale: float | Tensor = 1.0
        self._factors: dict[Tensor, Factors] = {}
        # One AdamStep per group, on the host, or on the device for kernels that read it there.
        self._numbers: Tensor | None = None
        self._kernels, self._beside = kernels, beside or {}
        self._plain = PlainUpdate(config, kernels)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's own would import torch's compiler first, a second of every start."""
        given = param_group["params"]
        params = [given] if isinstance(given, Tensor) else list(given)
        assert all(isinstance(p, Tensor) for p in params), "a parameter is no tensor"
        self.param_groups.append({**self.defaults, **param_group, "params": params})

    @property
    def grad_scale(self) -> float | Tensor:
        """What multiplies every gradient before it is used (joint clipping): a number, or a scalar
        of the device."""
        return self._grad_scale

    @grad_scale.setter
    def grad_scale(self, scale: float | Tensor) -> None:
        changes, self._grad_scale = scale is not self._grad_scale, scale
        if changes:
            self._write_scale()

    def _write_scale(self) -> None:
        """Put the scale where kernels read it, without a copy from the host."""
        if self._numbers is not None:
            scale, column = self.grad_scale, self._numbers[:, -1]
            column.copy_(scale) if isinstance(scale, Tensor) else column.fill_(scale)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """Update every parameter from its `.grad`."""
        assert closure is None
        self.begin_step()
        self.update_all()

    @torch.no_grad()
    def update_all(self) -> None:
        """Update every parameter from its `.grad`, in the step that `begin_step` opened."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._kernels.updates_alone:
            self.update_many([(p, p.grad) for p in params])  # type: ignore[misc]
            return
        small = [p for p in params if self._is_small(p)]
        for group in self.param_groups:
            own = {id(p) for p in group["params"]}
            together = [p for p in small if id(p) in own]
            moments = [[self.state[p][name] for p in together] for name in MOMENTS]
            parts = [together, *moments, [p.grad for p in together]]
            if together:
                self._plain.apply_together(parts, self._factors[together[0]], self.grad_scale)
        for p in params:
            if not self._is_small(p):
                m, v = (self.state[p][name] for name in MOMENTS)
                self._plain.apply(p, p.grad, m, v, self._factors[p], self.grad_scale)

    def begin_step(self, trained: Iterable[Tensor] | None = None) -> None:
        """Count a step for every parameter at once, or for the groups of those that are `trained`;
        `update` then takes their gradients piece by piece."""
        groups = [group for group in self.param_groups if group["params"]]
        if trained is not None:
            ids = {id(p) for p in trained}
            groups = [group for group in groups if id(group["params"][0]) in ids]
        numbers = [self._advance(group["params"], group["lr"]) for group in groups]
        own = torch.tensor(numbers, dtype=torch.float64)
        if self._kernels.updates_alone:
            own = self._on_device(own, groups[0]["params"][0].device)
        for group, whole in zip(groups, own, strict=True):
            self._factors |= dict.fromkeys(group["params"], factors_in(whole))

    def _on_device(self, numbers: Tensor, device: torch.device) -> Tensor:
        """The numbers where the kernels read them: at the same addresses in every step."""
        if self._numbers is None or len(self._numbers) != len(numbers):
            self._numbers = torch.zeros(numbers.shape, device=device)
        host = numbers.float()
        self._numbers.copy_(host.pin_memory() if device.type == "cuda" else host, True)
        if isinstance(self.grad_scale, Tensor) or self.grad_scale != 1.0:
            self._write_scale()
        return self._numbers

    @torch.no_grad()
    def update(self, parameter: Tensor, first: int, grad: Tensor) -> Tensor:
        """Update the rows of `parameter` from `first` on with their gradient, in the step that
        `begin_step` opened.

        Returns the squared norm of the gradient as it was used, a scalar: it passes through the
        registers anyway. A lean matrix whose vectors are its columns wants all of its rows at once.
        """
        rows, state = slice(first, first + len(grad)), self.state[parameter]
        moments = {
            name: state[name][rows] if len(state[name]) == len(parameter) else state[name]
            for name in MOMENTS
        }
        assert parameter in self._factors, "begin_step comes first"
        self._draw_to_start(parameter, rows)
        if self.l2(parameter):
            grad = grad + self.l2(parameter) * parameter[rows]
        copy, by = self._beside.get(parameter, Beside()).copy, self._factors[parameter]
        if self._kernels.updates_alone:
            part = None if copy is None else copy[rows]
            of = Weights(parameter[rows], moments["exp_avg"], moments["exp_avg_sq"], copy=part)
            return self._update_by_kernels(grad.contiguous(), of, self.lean_dim(parameter), by)
        m, v = moments.values()
        squared_norm = self._plain.apply(parameter[rows], grad, m, v, by, self.grad_scale)
        if copy is not None:
            copy[rows].copy_(parameter[rows])
        return squared_norm

    def _update_by_kernels(
        self, grad: Tensor, of: Weights, lean_dim: int | None, by: Factors
    ) -> Tensor:
        """Update weights from their gradient; the squared norm of the gradient."""
        if grad.dim() == 1:
            return self._kernels.update_many([(grad, of)], by.whole)
        if lean_dim == 0:
            return self._kernels.update_rows(grad, None, of, by.whole)
        if lean_dim == 1:
            assert of.second is not None
            denominators = self._plain.lean_denominators(
                grad.to(of.weights.dtype), of.second, by, self.grad_scale
            )
            of = replace(of, second=None, denominators=denominators)
        each = torch.arange(len(grad) + 1, device=grad.device)  # a row is the sum of itself
        return self._kernels.update_sum(grad, (each, each), None, of, by.whole)

    @torch.no_grad()
    def update_sum(
        self, parameter: Tensor, gradient: SumOfRows, squared_norms: Tensor | None = None
    ) -> Tensor:
        """Update all of `parameter` from a sum of rows that is never stored; the kernels must be
        able to.

        squared_norms: of the gradient's columns (C,), for a parameter with one second moment for
        each of them. Returns the gradient's squared norm, a scalar.
        """
        assert not self.l2(parameter), "the gradient is never formed"
        by = self._factors[parameter]
        self._draw_to_start(parameter, slice(None))
        bags = gradient.x.bags_of_items(*gradient.items)
        if self.lean_dim(parameter) == 0:
            assert gradient.diagonal is None
            of = self._weights_of(parameter)
            return self._kernels.update_rows(gradient.grad_GC, bags, of, by.whole)
        denominators = None
        if squared_norms is not None:
            v = self.state[parameter]["exp_avg_sq"]
            squares, n = squared_norms.view_as(v), len(parameter)
            denominators = self._plain.denominators_of_squares(v, squares, n, by, self.grad_scale)
        return self._kernels.update_sum(
            gradient.grad_GC,
            bags,
            gradient.diagonal,
            self._weights_of(parameter, denominators),
            by.whole,
        )

    @torch.no_grad()
    def update_many(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Update whole parameters, each from its gradient, in one pass; the kernels must be able
        to.

        parts: parameters and gradients. Returns the squared norm of all gradients, a scalar.
        """
        by_factors: dict[int, tuple[Tensor, list[tuple[Tensor, Weights]]]] = {}
        for parameter, grad in parts:
            self._draw_to_start(parameter, slice(None))
            if self.l2(parameter):
                grad = grad + self.l2(parameter) * parameter
            by = self._factors[parameter].whole
            by_factors.setdefault(by.data_ptr(), (by, []))[1].append(
                (grad, self._weights_of(parameter))
            )
        norms = [self._kernels.update_many(same, by) for by, same in by_factors.values()]
        return torch.stack(norms).sum()

    def _draw_to_start(self, parameter: Tensor, rows: slice) -> None:
        """Move some rows towards where they started, for a parameter that has a start."""
        beside = self._beside.get(parameter, Beside())
        if beside.start is not None:
            pull = self._group_of(parameter)["lr"] * beside.decay
            parameter[rows].lerp_(beside.start[rows], pull)

    def _weights_of(self, p: Tensor, denominators: Tensor | None = None) -> Weights:
        first, second = (self.state[p][name] for name in MOMENTS)
        copy = self._beside.get(p, Beside()).copy
        if denominators is None:
            return Weights(p, first, second, copy=copy)
        return Weights(p, first, None, denominators, copy)

    def ensure_state(self, p: Tensor) -> dict:
        """The state of `p`, created empty if there is none."""
        state = self.state[p]
        if not state:
            alike = [
                self.state[q] for q in self._group_of(p).get("params", ()) if self.state.get(q)
            ]
            state["step"] = alike[0]["step"] if alike else torch.zeros((), dtype=torch.float64)
            state["mu_product"] = (
                alike[0]["mu_product"] if alike else torch.ones((), dtype=torch.float64)
            )
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
            shape = list(p.shape)
            lean_dim = self.lean_dim(p)
            if lean_dim is not None:
                shape[1 - lean_dim] = 1
            state["exp_avg_sq"] = torch.zeros(shape, dtype=p.dtype, device=p.device)
        return state

    def lean_dim(self, p: Tensor) -> int | None:
        """The dimension along which each vector of `p` shares a second moment; None where every
        weight has its own."""
        group = self._group_of(p)
        return group["lean_dim"] if p.dim() == 2 else None

    def l2(self, p: Tensor) -> float:
        """What its weights are multiplied by where they are added to its gradient."""
        return self._group_of(p)["l2"] if p.dim() == 2 else 0.0

    def _group_of(self, p: Tensor) -> dict:
        groups = [group for group in self.param_groups if any(p is q for q in group["params"])]
        return groups[0] if groups else self.defaults

    def forget(self) -> None:
        """Start the moments anew, as the authors' code does where the learning rate changes."""
        for state in self.state.values():
            for value in state.values():
                value.zero_()
            state["mu_product"].fill_(1.0)

    def _advance(self, params: list[Tensor], lr: float) -> AdamStep:
        """Count a step in the state that the parameters of a group share; what the step multiplies
        gradient, momentum and weights by."""
        for p in params:
            state = self.ensure_state(p)
        t, product = float(state["step"]) + 1, float(state["mu_product"])
        numbers, mu = step_numbers(self.config, lr, t, product)
        state["step"] += 1
        state["mu_product"] *= mu
        return numbers

    def _is_small(self, p: Tensor) -> bool:
        return p.numel() <= SMALL and self.state[p]["exp_avg_sq"].shape == p.shape
