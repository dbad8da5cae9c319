"""The in-place update against torch.optim, in double precision."""

from __future__ import annotations

import pytest
import torch

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.training.step import plain_update as module
from dist_vasp.training.step.optimizer import InPlaceAdam

TORCH = {
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, eps=1e-7, momentum_decay=4e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-7),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-7, weight_decay=0.1),
}


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 7)
    generator = torch.Generator().manual_seed(1)
    start = [
        torch.randn(5, 7, generator=generator, dtype=torch.float64),
        torch.randn(3, generator=generator, dtype=torch.float64),
    ]
    theirs, ours = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    config = OptimizerConfig(name=name, weight_decay=0.1 if name == "adamw" else 0.0)
    a, b = TORCH[name](theirs), InPlaceAdam(ours, config, lr=0.01)
    for step in range(30):
        if step == 20:
            for group in (*a.param_groups, *b.param_groups):
                group["lr"] = 0.001
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(theirs, ours, strict=True):
        # torch keeps the product of the mu_t in float32
        torch.testing.assert_close(q, p, rtol=1e-7 if name == "nadam" else 1e-12, atol=1e-14)


def test_l2_grows_the_gradient_of_matrices_alone():
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), 4)]
    theirs, ours = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    groups = [{"params": [theirs[0]], "weight_decay": 0.1}, {"params": [theirs[1]]}]
    a = torch.optim.Adam(groups, lr=0.01, eps=1e-7)
    b = InPlaceAdam([{"params": ours, "l2": 0.1}], OptimizerConfig(name="adam"), lr=0.01)
    for _ in range(5):
        b.begin_step()
        for p, q in zip(theirs, ours, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for first in range(0, len(q), 2):
                b.update(q, first, p.grad[first : first + 2])
        a.step()
    for p, q in zip(theirs, ours, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-12, atol=1e-14)


def test_grad_scale_is_a_scaled_gradient():
    p, q = (torch.nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2))
    a, b = (InPlaceAdam([x], OptimizerConfig(eps=1.0), lr=0.1) for x in (p, q))
    grad = torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=torch.float64)
    p.grad, q.grad, b.grad_scale = grad * 0.25, grad, 0.25
    a.step()
    b.step()
    torch.testing.assert_close(p, q, rtol=1e-14, atol=0)


def test_forget_starts_anew():
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    fresh = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    a, b = (InPlaceAdam([x], OptimizerConfig(), lr=0.1) for x in (p, fresh))
    p.grad = torch.ones_like(p)
    a.step()
    a.forget()
    with torch.no_grad():
        p.fill_(1.0)
    for x, optimizer in ((p, a), (fresh, b)):
        x.grad = torch.full_like(x, 0.5)
        optimizer.step()
    torch.testing.assert_close(p, fresh, rtol=0, atol=0)


@pytest.mark.parametrize(("lean_dim", "width"), [(0, 4), (1, 4), (1, 1)])
def test_lean_shares_one_second_moment_per_vector(lean_dim, width, monkeypatch):
    """By hand: v is the running mean of the squared gradient averaged over the vector; pieces give
    the same as the whole."""
    monkeypatch.setattr(module, "CPU_CHUNK", 8)
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(6, width, generator=generator, dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = InPlaceAdam(
        [{"params": [p], "lean_dim": lean_dim}], OptimizerConfig(name="adam"), lr=0.1
    )
    m, v, expected = (
        torch.zeros_like(start),
        torch.zeros(6 if lean_dim == 0 else width, dtype=torch.float64),
        start.clone(),
    )
    for t in (1, 2, 3):
        grad = torch.randn(6, width, generator=generator, dtype=torch.float64)
        optimizer.begin_step()
        for first in (0, 2, 4) if lean_dim == 0 else (0,):
            optimizer.update(p, first, grad[first : first + 2] if lean_dim == 0 else grad)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * (grad**2).mean(dim=1 - lean_dim)
        denom = (v / (1 - 0.999**t)).sqrt() + 1e-7
        expected -= 0.1 * m / (1 - 0.9**t) / (denom[:, None] if lean_dim == 0 else denom)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
    state = optimizer.state[p]
    assert sum(state[name].numel() for name in ("exp_avg", "exp_avg_sq")) == 6 * width + len(v)
