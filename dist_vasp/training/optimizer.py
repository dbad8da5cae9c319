"""Nadam, Adam and AdamW, updated in place: one rule for the trunk (inside DeepSpeed) and the item
matrices (outside it).

An update is one compiled pass over parameter, gradient and moments; uncompiled, it walks them in
chunks that stay in cache. Either way each is read and written once, and no temporary has the
parameter's size (torch.optim.NAdam needs 32 to 37 bytes a parameter at its peak).

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

import torch
from torch import Tensor

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels.interface import CPU_CHUNK, PLAIN, AdamStep, Kernels, Weights
from dist_vasp.model.sinks import SumOfRows
from dist_vasp.training.adam_step import Beside, Factors, factors_in, step_numbers

SMALL = 1 << 14  # numbers, as of a bias: a call costs more than the update of as many

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
        self._all = kernels.fuse(self._update_all)
        self._weights = kernels.fuse(self._update_weights)

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
            self._apply_together([p for p in small if any(p is q for q in group["params"])])
        for p in params:
            if not self._is_small(p):
                self._apply(p, p.grad, self.state[p], self._factors[p])  # type: ignore[arg-type]

    def begin_step(self) -> None:
        """Count a step for every parameter at once; `update` then takes their gradients piece by
        piece."""
        groups = [group for group in self.param_groups if group["params"]]
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
        squared_norm = self._apply(parameter[rows], grad, moments, by)
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
            denominators = self._lean_denom(grad.to(of.weights.dtype), of.second, by)
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
            self._add_squares(v, squared_norms.view_as(v), len(parameter))
            denominators = self._denom(v, by)
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

    def _apply(self, p: Tensor, grad: Tensor, state: dict, by: Factors) -> Tensor:
        m, v = (state[name] for name in MOMENTS)
        grad = grad.to(p.dtype)
        squared_norm = grad.new_zeros(())
        if v.shape == p.shape:
            update = self._all if p.numel() > SMALL else self._update_all
            for p_n, g_n, m_n, v_n in zip(
                *(x.view(-1).split(self._chunk(p)) for x in (p, grad, m, v)), strict=True
            ):
                squared_norm += update(p_n, self._scaled(g_n), m_n, v_n, by)
        else:
            denom = self._lean_denom(grad, v, by).expand_as(p)
            rows = max(1, self._chunk(p) // p.shape[1])
            for p_n, g_n, m_n, denom_n in zip(
                *(x.split(rows) for x in (p, grad, m, denom)), strict=True
            ):
                squared_norm += self._weights(p_n, self._scaled(g_n), m_n, denom_n, by)
        return squared_norm

    def _is_small(self, p: Tensor) -> bool:
        return p.numel() <= SMALL and self.state[p]["exp_avg_sq"].shape == p.shape

    def _apply_together(self, params: list[Tensor]) -> None:
        """Update small parameters of a group, such as biases, as if they were one: what a call
        costs is more than what it does."""
        if not params:
            return
        by = self._factors[params[0]]
        moments = [[self.state[p][name].view(-1) for p in params] for name in MOMENTS]
        parts = [[p.view(-1) for p in params], *moments]
        p_n, m_n, v_n = (torch.cat(part) for part in parts)
        grad_n = torch.cat([p.grad.reshape(-1) for p in params])  # type: ignore[union-attr]
        self._update_all(p_n, self._scaled(grad_n), m_n, v_n, by)
        for part, updated_n in zip(parts, (p_n, m_n, v_n), strict=True):
            torch._foreach_copy_(part, list(updated_n.split([len(x) for x in part])))

    def _lean_denom(self, grad: Tensor, v: Tensor, by: Factors) -> Tensor:
        """Update the one second moment per row (n, 1) or per column (1, n); the denominator of its
        shape."""
        along = 0 if v.shape[1] == grad.shape[1] else 1
        rows = max(1, CPU_CHUNK // grad.shape[1]) if grad.device.type == "cpu" else len(grad)
        sums = [(g_n * g_n).sum(dim=along, keepdim=True) for g_n in grad.split(rows)]
        squared = torch.cat(sums) if along else torch.stack(sums).sum(dim=0)
        self._add_squares(v, squared, grad.shape[along])
        return self._denom(v, by)

    def _add_squares(self, v: Tensor, squared: Tensor, n: int) -> None:
        """Move the second moments towards the mean of n squared gradients, given their sums."""
        assert squared.shape == v.shape, (squared.shape, v.shape)
        v.lerp_(squared * (self.grad_scale**2 / n), 1 - self.config.beta2)

    def _scaled(self, grad: Tensor) -> Tensor:
        scale = self.grad_scale
        return grad if isinstance(scale, float) and scale == 1.0 else grad * scale

    def _chunk(self, p: Tensor) -> int:
        """Elements to update at once."""
        if p.device.type != "cpu":
            return max(1, p.numel())
        return self._kernels.chunk

    def _denom(self, v: Tensor, by: Factors) -> Tensor:
        return v.sqrt().mul_(by.of_root).add_(self.config.eps)

    def _update_all(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, by: Factors) -> Tensor:
        """Both moments, then the weights, all of one shape; |g|^2."""
        v.mul_(self.config.beta2).addcmul_(g, g, value=1 - self.config.beta2)
        return self._update_weights(p, g, m, self._denom(v, by), by)

    def _update_weights(
        self, p: Tensor, g: Tensor, m: Tensor, denom: Tensor, by: Factors
    ) -> Tensor:
        """The momentum, then the weights; |g|^2."""
        c = self.config
        m.lerp_(g, 1 - c.beta1)
        step = m * by.of_momentum
        if c.name == "nadam":
            step += g * by.of_grad
        if c.weight_decay:
            p.mul_(by.shrink)
        p.addcdiv_(step, denom, value=-1)
        return (g * g).sum()
