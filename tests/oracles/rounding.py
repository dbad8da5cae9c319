"""Bounds of float32 tests, derived from rounding. This is the one place that says how far is far.

Why a bound is derived. Processors, libraries and numbers of threads sum in different orders and
have different elementary functions, so float32 results differ in their last bits. A bound that
one machine's result has suggested fails on another one. A derived bound holds on all of them.

The model of one operation, with u = 2^-24, the unit roundoff of float32:

    a op b, sqrt                   |error| <= u |result|
    exp, log, sigmoid, tanh, pow   |error| <= ELEMENTARY u |result|    (2 units in the last place)
    a sum of n terms, any order    |error| <= g_n (|t_1| + ... + |t_n|)
    a matrix product A B           |error| <= g_k |A| |B|          (k terms each)
                                   g_n = sqrt(n) u

(N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 2.2, 3.1, 4.2. The
worst case of a sum is n u. Errors of n additions do not all have one sign: N. Higham and T. Mary,
A New Approach to Probabilistic Rounding Error Analysis, 2019, show that a small multiple of
sqrt(n) u holds but for a probability that vanishes. The multiple is part of SAFETY.)

A chain of operations. `Rounded` runs the double precision oracle and adds to the result of every
operation a normal error for each number, as large as the table says. So each error passes through
the rest of the computation, backward pass and optimizer included, and is amplified by its true
condition number: a small gradient that is a difference of large terms gets a wide bound, a large
one a narrow one. The distance between such a run and the exact one, the largest of DRAWS runs,
times SAFETY, is the bound. SAFETY covers errors that conspire and a computation that takes more
operations than the oracle (partial sums of ranks, logarithms in place of products). Two float32
results that are compared with each other may be two bounds apart.

The bound depends on the seed, not on the machine: what is random comes from one generator.

Every comparison made here is kept. At the end pytest prints the largest ratio of an error to its
bound; `--rounding FILE` writes all of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-24
ELEMENTARY = 4
DRAWS = 8
SAFETY = 4.0

RATIOS: list[tuple[float, str]] = []  # of every comparison: error over bound, and what it was

# Operations of torch by how they round. `Rounded` refuses one that is in no table.
_EXACT = {
    "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "abs", "alias", "amax",
    "amin", "arange", "as_strided", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "clamp",
    "clamp_", "clamp_min", "clone", "constant_pad_nd", "copy_", "detach", "diagonal", "empty",
    "empty_like", "eq", "expand", "fill_", "full", "fill_diagonal_", "full_like", "ge", "gather",
    "gt", "index", "index_put_", "index_select", "isnan", "le", "lift_fresh", "logical_and",
    "logical_not", "logical_or", "lt", "masked_fill", "masked_fill_", "max", "maximum", "min",
    "minimum", "ne", "neg", "neg_", "new_zeros", "ones", "ones_like", "permute", "scalar_tensor",
    "scatter_", "select", "select_backward", "sgn", "sign", "slice", "slice_backward", "split",
    "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "view", "where", "zero_", "zeros",
    "zeros_like", "any", "all", "diagonal_backward", "value_selecting_reduction_backward",
}  # fmt: skip
_ROUNDED = {
    "add", "add_", "addcdiv", "addcdiv_", "addcmul", "addcmul_", "addmm", "bmm", "cumsum", "div",
    "index_add_", "div_", "dot", "lerp", "lerp_", "linalg_vector_norm", "mean", "mm", "mul", "mul_",
    "mv", "prod", "reciprocal", "rsub", "sqrt", "sqrt_", "sub", "sub_", "sum",
}  # fmt: skip
_ELEMENTARY = {
    "_log_softmax", "_log_softmax_backward_data", "_softmax", "exp", "expm1", "log", "log1p",
    "log_sigmoid_backward", "log_sigmoid_forward", "pow", "pow_", "rsqrt", "sigmoid",
    "sigmoid_backward", "silu", "silu_backward", "tanh", "tanh_backward",
}  # fmt: skip


def gamma(n: int) -> float:
    """The error of a sum of n terms, whatever their order, over the sum of their sizes."""
    return math.sqrt(n) * UNIT


class Rounded(TorchDispatchMode):
    """While entered, every float64 operation of torch has an error as large as float32's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [
            a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)
        ]
        if name in _EXACT or all(t.dtype != torch.float64 for t in tensors):
            return func(*args, **kwargs)
        assert name in _ROUNDED | _ELEMENTARY, f"{name}: add to rounding.py how it rounds"
        size = _largest_error(func, name, args, kwargs)
        result = func(*args, **kwargs)
        self._disturb(result, size, name)
        return result

    def _disturb(self, result: Any, size: Tensor | None, name: str) -> None:
        for out in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(out, Tensor) or out.dtype != torch.float64:
                continue
            error = UNIT * out.abs() * (ELEMENTARY if name in _ELEMENTARY else 2)
            if size is not None and size.shape == out.shape:
                error = torch.maximum(error, size)
            normal = torch.randn(out.shape, generator=self._generator, dtype=torch.float64)
            out.add_(error * normal)


def _largest_error(func: Any, name: str, args: Any, kwargs: Any) -> Tensor | None:
    """The error of an operation that adds terms up, which may be larger than its result; else
    None."""
    if name in ("mm", "bmm", "addmm", "mv", "dot"):
        first, second = args[-2], args[-1]
        size = gamma(first.shape[-1]) * (first.abs() @ second.abs())
        return size + 2 * UNIT * args[0].abs() if name == "addmm" else size
    if name in ("sum", "mean", "linalg_vector_norm", "cumsum"):
        if not (isinstance(args[0], Tensor) and args[0].dtype == torch.float64):
            return None
        of_sizes = func(args[0].abs(), *args[1:], **kwargs)
        return gamma(max(1, args[0].numel() // max(1, of_sizes.numel()))) * of_sizes
    if name in ("_log_softmax", "_softmax"):
        terms, result = args[0].shape[args[1]], func(*args, **kwargs).abs()
        scale = result if name == "_softmax" else args[0].abs() + result + 1
        return (gamma(terms) + ELEMENTARY * UNIT) * scale
    if name == "index_add_":
        total, dim, index, terms = args[:4]
        return gamma(len(index) + 1) * total.abs().index_add(dim, index, terms.abs())
    if name in ("lerp", "lerp_"):
        return 3 * UNIT * torch.maximum(args[0].abs(), args[1].abs())
    if name in ("addcmul", "addcmul_"):
        return 3 * UNIT * (args[0].abs() + (args[1] * args[2]).abs() * abs(kwargs.get("value", 1)))
    if name in ("addcdiv", "addcdiv_"):
        return 3 * UNIT * (args[0].abs() + (args[1] / args[2]).abs() * abs(kwargs.get("value", 1)))
    return None


@dataclass(frozen=True)
class Bounded:
    """Exact results by name, and how far a float32 result may be from them."""

    exact: dict[str, Tensor]
    bounds: dict[str, float]  # in the L2 norm of the whole
    each: dict[str, Tensor]  # for each number


def bounded(compute: Callable[[], Mapping[str, Any]], seed: int = 0) -> Bounded:
    """Run the double precision `compute` exactly and with rounding errors, and derive the bounds.

    `compute` returns named tensors or numbers. It must be the same computation each time.
    """
    exact = {name: _double(value) for name, value in compute().items()}
    norms = dict.fromkeys(exact, 0.0)
    each = {name: torch.zeros_like(value) for name, value in exact.items()}
    for draw in range(DRAWS):
        with Rounded(1000 * seed + draw):
            found = compute()
        for name, value in exact.items():
            away = (_double(found[name]) - value).abs()
            norms[name] = max(norms[name], SAFETY * float(torch.linalg.vector_norm(away)))
            each[name] = torch.maximum(each[name], SAFETY * away)
    return Bounded(exact, norms, each)


def bounded_scores(compute: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
    """The exact scores (rows, I) of a double precision oracle, and the bound of each."""
    found = bounded(lambda: {"scores": compute()})
    return found.exact["scores"].numpy(), found.each["scores"].numpy()


def same_list(ids: Any, listed: Any, exact: np.ndarray, bounds: np.ndarray, what: str) -> None:
    """Assert that two lists of item rows are equal but for items that rounding cannot tell apart.

    `exact` and `bounds` (I,) are the scores of the list's user.
    """
    ids, listed = np.asarray(ids, dtype=np.int64), np.asarray(listed, dtype=np.int64)
    assert ids.shape == listed.shape, what
    assert len(set(ids.tolist())) == len(ids), f"{what}: an item is listed twice"
    apart = np.abs(exact[ids] - exact[listed]) > bounds[ids] + bounds[listed]
    assert not apart.any(), f"{what}: listed {ids.tolist()}, expected {listed.tolist()}"


def _double(value: Any) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    return tensor.double().clone()


def within(found: Any, bound: Bounded, name: str, what: str = "", at_least: float = 0.0) -> None:
    """Assert that `found` is at most its bound (L2 norm), or `at_least`, from the exact `name`."""
    distance = float(torch.linalg.vector_norm(_double(found) - bound.exact[name]))
    check_ratio(distance, max(bound.bounds[name], at_least), f"{what} {name}".strip())


def each_within(found: Any, exact: Any, bounds: Any, what: str) -> None:
    """Assert that every number of `found` is at most its bound from the exact one."""
    away, bounds = (
        (_double(found) - _double(exact)).abs(),
        _double(bounds).expand_as(_double(found)),
    )
    ratio = torch.where(away == 0, 0.0, away / bounds)
    worst = int(ratio.argmax()) if ratio.numel() else 0
    if ratio.numel():
        check_ratio(float(away.flatten()[worst]), float(bounds.flatten()[worst]), what)


def stored(found: Any, exact: Any, what: str) -> None:
    """Assert that `found` is `exact`, computed in double precision and stored as float32 (2 u)."""
    exact = _double(exact)
    each_within(found, exact, 2 * UNIT * exact.abs() + 1e-10, what)


def check_ratio(error: float, bound: float, what: str) -> None:
    """Assert error <= bound, and keep the ratio for the summary. A NaN is never within a bound."""
    ratio = error / bound if bound else (0.0 if error == 0 else math.inf)
    where = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")
    RATIOS.append((ratio, f"{where} {what}"))
    assert ratio <= 1, f"{what}: the error {error:.3g} is {ratio:.3g} times its bound {bound:.3g}"
