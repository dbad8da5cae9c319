"""The optimizer with the kernels of a GPU equals the one in plain torch. They run in Triton's
interpreter, on CPUs."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")

import torch

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels.cuda import TritonKernels
from dist_vasp.kernels.interface import PLAIN
from dist_vasp.training.step.adam_step import Beside
from dist_vasp.training.step.optimizer import InPlaceAdam
from tests.support.interpreter import interpreted
from tests.unit.kernels.test_triton import BF16, KERNELS, numbers

pytestmark = interpreted


@pytest.mark.parametrize("l2", [0.0, 0.1])
@pytest.mark.parametrize("lean_dim", [None, 0, 1], ids=["full", "lean rows", "lean columns"])
def test_a_matrix_equals_the_plain_one_however_its_gradient_comes(lean_dim, l2):
    """Whole, or some rows at a time, and drawn to its start."""
    grads = [numbers(30, 20, seed=k) for k in range(3)]
    found = []
    for kernels, at_once in ((PLAIN, 30), (KERNELS, 30), (KERNELS, 30 if lean_dim == 1 else 7)):
        weight, copy = numbers(30, 20, seed=9), torch.zeros(30, 20, dtype=torch.bfloat16)
        beside = {weight: Beside(copy, start=torch.ones(30, 20), decay=0.5)}
        group = {"params": [weight], "lean_dim": lean_dim, "l2": l2}
        optimizer = InPlaceAdam([group], OptimizerConfig(), 0.1, kernels, beside)
        norms = []
        for grad in grads:
            optimizer.begin_step()
            optimizer.grad_scale = torch.tensor(0.5)
            parts = range(0, 30, at_once)
            norms.append(sum(optimizer.update(weight, k, grad[k : k + at_once]) for k in parts))
        assert torch.allclose(copy.float(), weight, rtol=BF16, atol=0)
        found.append((weight, optimizer.state[weight]["exp_avg_sq"], torch.stack(norms)))
    for ours in found[1:]:
        for value, plain in zip(ours, found[0], strict=True):
            assert torch.allclose(value, plain, rtol=1e-5, atol=1e-6)


def test_an_update_on_a_gpu_compiles_nothing(monkeypatch):
    def refuse(function):
        def call(*args):
            raise AssertionError(f"{function.__name__} would be compiled")

        return call

    kernels = TritonKernels()
    monkeypatch.setattr(kernels, "fuse", refuse)
    for lean_dim in (None, 0, 1):
        params = [numbers(30, 20), numbers(20)]
        optimizer = InPlaceAdam(
            [{"params": params, "lean_dim": lean_dim}], OptimizerConfig(), 0.1, kernels
        )
        optimizer.begin_step()
        for param in params:
            optimizer.update(param, 0, numbers(*param.shape, seed=1))


def test_an_optimizer_with_many_parameters_equals_the_plain_one():
    grads = {shape: numbers(*shape, seed=len(shape)) for shape in ((30, 20), (7,), (1,))}
    found = []
    for kernels in (KERNELS, PLAIN):
        params = [torch.zeros(shape, requires_grad=True) for shape in grads]
        optimizer = InPlaceAdam(params, OptimizerConfig(), lr=0.1, kernels=kernels)
        for _ in range(3):
            for param, grad in zip(params, grads.values(), strict=True):
                param.grad = grad.clone()
            optimizer.step()
        found.append([param.detach() for param in params])
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-7)


def test_a_weight_is_drawn_to_its_start_however_its_gradient_comes():
    start, grad, found = numbers(30, 20, seed=1), numbers(30, 20, seed=2), []
    for kernels in (KERNELS, PLAIN):
        weight = torch.zeros(30, 20)
        beside = {weight: Beside(start=start, decay=0.5)}
        optimizer = InPlaceAdam([weight], OptimizerConfig(), 0.1, kernels, beside)
        optimizer.begin_step()
        if kernels is KERNELS:
            optimizer.update_many([(weight, grad.clone())])
        else:
            optimizer.update(weight, 0, grad.clone())
        found.append(weight)
    assert torch.allclose(*found, rtol=1e-5, atol=1e-7)
