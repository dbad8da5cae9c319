"""Closed-form losses and gradients against autograd of the plain formulas, and against exact
arithmetic for large logits."""

from __future__ import annotations

import itertools
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_vasp.model.losses import (
    BinaryCrossEntropy,
    CosineLoss,
    FocalLoss,
    MultinomialLoss,
    ScoreError,
    SquaredError,
    make_loss,
    sum_log_sigmoid,
)
from dist_vasp.model.probability import probability
from tests.oracles.rounding import ELEMENTARY, SAFETY, UNIT

G, C = 7, 11
LOSSES = {
    "focal": FocalLoss(),
    "focal 0": FocalLoss(0.3, 0.0),
    "focal 1": FocalLoss(0.6, 1.0),
    "focal 3.5": FocalLoss(0.25, 3.5),
    "focal, zeros only": FocalLoss(0.0, 2.0),
    "focal, ones only": FocalLoss(1.0, 2.0),
    "bce": BinaryCrossEntropy(),
    "mse": SquaredError(),
    "cosine": CosineLoss(),
    "multinomial": MultinomialLoss(),
    "squared": ScoreError(),
}
EXTREMES = [-1e4, -200.0, -100.0, -50.0, 0.0, 50.0, 100.0, 200.0, 1e4]


def case(n_paths: int, seed: int, scale: float = 2.0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Logits (float64), y (G, C) with an empty row and a full one, weights with a zero."""
    generator = torch.Generator().manual_seed(seed)
    logits = [
        scale * torch.randn(G, C, generator=generator, dtype=torch.float64) for _ in range(n_paths)
    ]
    y = (torch.rand(G, C, generator=generator) < 0.3).double()
    y[1], y[2] = 0, 1
    weight = torch.rand(G, generator=generator, dtype=torch.float64)
    weight[3] = 0
    return logits, y, weight


def naive(loss, logits: list[Tensor], y: Tensor, weight: Tensor) -> Tensor:
    """As a reader of the paper would write it; autograd takes its gradient."""
    p = torch.ones_like(y)
    for logit in logits:
        p = p / (1 + torch.exp(-logit))
    if isinstance(loss, FocalLoss):
        per_item = torch.where(
            y == 1,
            -loss.alpha * (1 - p) ** loss.gamma * p.log(),
            -(1 - loss.alpha) * p**loss.gamma * (1 - p).log(),
        )
        return (weight[:, None] * per_item).sum()
    if isinstance(loss, BinaryCrossEntropy):
        return -(weight[:, None] * (y * p.log() + (1 - y) * (1 - p).log())).sum()
    if isinstance(loss, SquaredError):
        return (weight[:, None] * (y - p) ** 2).sum()
    if isinstance(loss, CosineLoss):
        return weight @ (
            1 - (p * y).sum(1) / ((p * p).sum(1).sqrt() * (y * y).sum(1).clamp(min=1).sqrt())
        )
    total = sum(logits)
    if isinstance(loss, ScoreError):
        return (weight[:, None] * (y - total) ** 2).sum()
    return -(weight[:, None] * y * (total - total.exp().sum(1, keepdim=True).log())).sum()


def ours(
    loss, logits: list[Tensor], y: Tensor, weight: Tensor, cuts: tuple[int, ...] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients, taken over blocks of columns cut at `cuts`."""
    bounds = [0, *cuts, y.shape[1]]
    blocks = [
        ([l[:, a:b].clone() for l in logits], y[:, a:b].nonzero(as_tuple=True))
        for a, b in itertools.pairwise(bounds)
    ]
    stats, total = None, weight.new_zeros(())
    if loss.row_statistics:
        stats = loss.combine(torch.stack([loss.row_stats(l, ones) for l, ones in blocks]))
        total = total + weight @ loss.row_loss(stats)
    grads = []
    for l, ones in blocks:
        value, grad = loss.block(l, ones, weight, stats)
        total = total + value
        grads.append(grad)
    return total, [torch.cat(parts, dim=1) for parts in zip(*grads, strict=True)]


@pytest.mark.parametrize("n_paths", [1, 2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_autograd(name, n_paths):
    loss = LOSSES[name]
    for seed in range(4):
        logits, y, weight = case(n_paths, seed)
        if name == "multinomial" or name == "cosine":
            weight[1] = 0  # an empty target does not count: VASP.row_weights
        leaves = [l.clone().requires_grad_() for l in logits]
        expected = naive(loss, leaves, y, weight)
        gradients = torch.autograd.grad(expected, leaves)
        before = [l.clone() for l in logits]
        value, found = ours(loss, logits, y, weight)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-13)
        assert len(found) == n_paths
        for grad, reference in zip(found, gradients, strict=True):
            torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-13)
            assert (grad[3] == 0).all()
        assert all(torch.equal(a, b) for a, b in zip(logits, before, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(sorted(LOSSES)),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.sets(st.integers(1, C - 1), max_size=4),
)
def test_blocks_change_nothing(name, n_paths, seed, cuts):
    """Losses add up over blocks; row statistics of cosine and multinomial combine to those of the
    whole row."""
    loss = LOSSES[name]
    logits, y, weight = case(n_paths, seed)
    value, grads = ours(loss, logits, y, weight)
    in_blocks, block_grads = ours(loss, logits, y, weight, tuple(sorted(cuts)))
    torch.testing.assert_close(in_blocks, value, rtol=1e-12, atol=1e-13)
    for a, b in zip(block_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["cosine", "multinomial"]),
    st.integers(1, 3),
    st.integers(0, 10**6),
    st.sets(st.integers(1, C - 1), min_size=2, max_size=5),
)
def test_row_stats_combine_over_blocks_then_partitions(name, n_paths, seed, cuts):
    loss = LOSSES[name]
    logits, y, _ = case(n_paths, seed)
    whole = loss.combine(loss.row_stats(logits, y.nonzero(as_tuple=True))[None])
    bounds = [0, *sorted(cuts), C]
    shares = [
        loss.row_stats([l[:, a:b] for l in logits], y[:, a:b].nonzero(as_tuple=True))
        for a, b in itertools.pairwise(bounds)
    ]
    partitions = [loss.combine(torch.stack(part)) for part in (shares[:2], shares[2:])]
    torch.testing.assert_close(loss.combine(torch.stack(partitions)), whole, rtol=1e-12, atol=1e-12)
    if name == "multinomial":
        torch.testing.assert_close(whole[:, 0], torch.logsumexp(sum(logits), 1))
    else:
        p = torch.sigmoid(torch.stack(logits)).prod(0)
        torch.testing.assert_close(whole[:, 0], (p * y).sum(1))
        torch.testing.assert_close(whole[:, 1], (p * p).sum(1))
    torch.testing.assert_close(whole[:, -1], y.sum(1))


# --- large logits ---------------------------------------------------------------------------------


def combinations(n_paths: int, dtype: torch.dtype) -> list[Tensor]:
    """Every combination of EXTREMES as one column per path, (9^n, 1) each."""
    table = torch.tensor(list(itertools.product(EXTREMES, repeat=n_paths)), dtype=dtype)
    return [column[:, None].clone() for column in table.T]


@pytest.mark.parametrize("n_paths", [1, 2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_large_logits_give_finite_loss_and_gradient(name, n_paths):
    loss = LOSSES[name]
    logits = combinations(n_paths, torch.float32)
    n = len(logits[0])
    for y in (torch.zeros(n, 1), torch.ones(n, 1)):
        # beside an ordinary item, beside its own likes, and alone
        for beside in ([torch.zeros(n, 1)] * n_paths, logits, [torch.empty(n, 0)] * n_paths):
            row = [torch.cat([l, b], dim=1) for l, b in zip(logits, beside, strict=True)]
            target = torch.cat([y, 1 - y[:, :1].expand(-1, beside[0].shape[1])], dim=1)
            if name == "multinomial" and not target.any():
                continue
            value, grads = ours(loss, row, target, torch.ones(n))
            assert value.isfinite()
            assert value >= 0
            assert all(grad.isfinite().all() for grad in grads)


def exact(loss, logits: tuple[float, ...], positive: bool) -> tuple[float, list[float]]:
    """Loss and gradient of one entry in 60 decimal digits, whose exponents do not run out."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**9, -(10**9)
        exponentials = [Decimal(l).exp() for l in logits]
        complements = [1 / (1 + e) for e in exponentials]
        p = Decimal(1)
        for e in exponentials:
            p *= e / (1 + e)
        if p < Decimal("0.5"):
            q = 1 - p
        else:  # every 1 - s is small: inclusion and exclusion loses nothing
            q = Decimal(0)
            for size in range(1, len(logits) + 1):
                for chosen in itertools.combinations(complements, size):
                    product = Decimal(1)
                    for c in chosen:
                        product *= c
                    q += product if size % 2 else -product
        if isinstance(loss, FocalLoss):
            a, g = Decimal(loss.alpha), Decimal(loss.gamma)
            if positive:
                value, slope = -a * q**g * p.ln(), a * g * q ** (g - 1) * p.ln() - a * q**g / p
            else:
                value, slope = (
                    -(1 - a) * p**g * q.ln(),
                    (1 - a) * (p**g / q - g * p ** (g - 1) * q.ln()),
                )
        elif isinstance(loss, BinaryCrossEntropy):
            value, slope = (-p.ln(), -1 / p) if positive else (-q.ln(), 1 / q)
        else:
            value, slope = (q * q, -2 * q) if positive else (p * p, 2 * p)
        return float(value), [float(slope * p * c) for c in complements]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", ["focal", "focal 0", "focal 1", "focal 3.5", "bce", "mse"])
def test_large_logits_are_exact(name, positive):
    loss = LOSSES[name]
    for n_paths, values in (
        (1, [*EXTREMES, -20.0, -3.0, 3.0, 20.0]),
        (2, [*EXTREMES, -8.0, 8.0]),
        (3, [-1e4, -50.0, 0.0, 9.0, 200.0, 1e4]),
    ):
        table = list(itertools.combinations_with_replacement(values, n_paths))
        logits = [torch.tensor([row[k] for row in table])[:, None] for k in range(n_paths)]
        expected = [exact(loss, row, positive) for row in table]
        for i, (value, gradient) in enumerate(expected):
            one = [l[i : i + 1] for l in logits]
            found, grads = ours(loss, one, torch.full((1, 1), float(positive)), torch.ones(1))
            # A logarithm of size m is known to m * 2^-24, and so is what it is the logarithm of.
            # Below 2e-38 float32 is zero.
            tolerance = {
                "rtol": 3e-5 if max(map(abs, table[i])) < 1e4 else 2e-3,
                "atol": 2e-38,
                "err_msg": f"{table[i]}",
            }
            np.testing.assert_allclose(found, value, **tolerance)
            np.testing.assert_allclose([float(g) for g in grads], gradient, **tolerance)


def test_log_probability_keeps_its_digits_near_zero_and_one():
    logits = combinations(3, torch.float64)
    lp = probability([l.float() for l in logits])
    reference = probability(logits)
    # three logarithms of sigmoids and two additions, none of which cancels
    rtol = SAFETY * (ELEMENTARY + 2) * UNIT
    torch.testing.assert_close(lp.log_p.double(), reference.log_p, rtol=rtol, atol=1e-40)
    # q = 1 - p is a sum of products of sigmoids, all positive: some ten operations, and a logarithm
    rtol = SAFETY * (2 * ELEMENTARY + 10) * UNIT
    torch.testing.assert_close(lp.log_q.double(), reference.log_q, rtol=rtol, atol=1e-40)
    torch.testing.assert_close(sum_log_sigmoid(logits), reference.log_p, rtol=1e-14, atol=0)
    with localcontext() as context:
        context.prec = 60
        for k in (-30.0, -1.0, 2.0, 40.0):
            s = 1 / (1 + (-Decimal(k)).exp())
            found = probability([torch.tensor([[k]], dtype=torch.float64)] * 3)
            assert float(found.log_p) == pytest.approx(float(3 * s.ln()), rel=1e-14)
            assert float(found.log_q) == pytest.approx(float((1 - s**3).ln()), rel=1e-13)


def test_cosine_of_tiny_probabilities_stays_between_zero_and_one():
    loss, y = CosineLoss(), torch.tensor([[1.0, 0.0, 1.0]] * len(EXTREMES))
    logits = [torch.tensor(EXTREMES)[:, None].expand(-1, 3).clone()]
    stats = loss.combine(loss.row_stats(logits, y.nonzero(as_tuple=True))[None])
    value = loss.row_loss(stats)
    assert ((value >= -1e-6) & (value <= 1 + 1e-6)).all()
    torch.testing.assert_close(
        value[4:], torch.full((5,), 1 - (2 / 3) ** 0.5), rtol=0, atol=SAFETY * 8 * UNIT
    )


def test_make_loss():
    kinds = {
        "focal": FocalLoss,
        "bce": BinaryCrossEntropy,
        "mse": SquaredError,
        "cosine": CosineLoss,
        "multinomial": MultinomialLoss,
    }
    for kind, cls in kinds.items():
        assert type(make_loss(kind, 0.4, 1.5)) is cls
    assert make_loss("focal", 0.4, 1.5) == FocalLoss(0.4, 1.5)
