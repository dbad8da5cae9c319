"""Every Triton kernel equals its meaning in plain torch. They run in Triton's interpreter, on CPUs.

Float32 results lie within the bounds of rounding, bfloat16 ones within its last place.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")

import numpy as np
import torch

from dist_vasp.kernels import cuda
from dist_vasp.kernels.cuda import TritonKernels
from dist_vasp.kernels.interface import AdamStep, Weights
from dist_vasp.model.losses import FocalLoss
from tests.oracles.rounding import bounded, within
from tests.support.interpreter import interpreted

KERNELS = TritonKernels()
# Entries that a mask leaves out afterwards.
pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value"),
]
BY = AdamStep(0.9, 0.999, 1e-7, 0.02, 0.05, 1.5, 0.99, 0.1, 0.001, 0.5)
ON_DEVICE = torch.tensor(BY)
BF16 = 2.0**-7  # the interpreter cuts off where a GPU rounds


def bags(n: int, n_rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """n bags of rows: the first holds every row, the last and every third none."""
    rng = np.random.default_rng(seed)
    rows = [np.arange(n_rows) if k == 0 else np.sort(rng.choice(n_rows, rng.integers(0, 3), False))
            for k in range(n)]  # fmt: skip
    rows = [row[:0] if n > 1 and (k % 3 == 2 or k == n - 1) else row for k, row in enumerate(rows)]
    indptr = torch.tensor(np.cumsum([0, *map(len, rows)]))
    return torch.tensor(np.concatenate(rows)), indptr


def summed(table: torch.Tensor, ids: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """Sums of rows as a product with a dense matrix."""
    dense = torch.zeros(len(indptr) - 1, len(table), dtype=table.dtype)
    row_of = torch.repeat_interleave(torch.arange(len(dense)), indptr.diff())
    dense[row_of, ids] = 1
    return dense @ table


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SIZES = [(1, 1, 1), (6, 200, 1), (7, 5, 3), (13, 40, 130), (3, 9, 1030)]


@pytest.mark.parametrize(("n", "n_rows", "n_columns"), SIZES)
def test_sums_of_rows(n, n_rows, n_columns):
    ids, indptr = bags(n, n_rows, 1)
    table = numbers(n_rows, n_columns)
    exact = bounded(lambda: {"sums": summed(table.double(), ids, indptr)})
    within(KERNELS.sum_rows(table, ids, indptr), exact, "sums")
    half = table.bfloat16()
    wanted = summed(half.double(), ids, indptr)
    size = summed(half.double().abs(), ids, indptr)
    assert (KERNELS.sum_rows(half, ids, indptr).double() - wanted).abs().le(BF16 * size).all()
    found = KERNELS.sum_rows(half, ids, indptr, torch.float32)
    assert found.dtype == torch.float32
    assert (found.double() - wanted).abs().le(1e-6 * size).all()


def test_an_index_pointer_may_start_anywhere():
    ids, indptr = bags(9, 20, 2)
    table = numbers(20, 6)
    assert torch.equal(
        KERNELS.sum_rows(table, ids, indptr[3:8]), KERNELS.sum_rows(table, ids, indptr)[3:7]
    )
    assert KERNELS.sum_rows(table, ids, indptr[:1]).shape == (0, 6)


def adam(weights: dict[str, torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of BY in plain torch."""
    g = grad * BY.grad_scale
    m = weights["m"] * BY.beta1 + g * BY.rest1
    v = weights["v"] * BY.beta2 + g * g * BY.rest2
    denominator = v.sqrt() * BY.of_root + BY.eps
    if "denominators" in weights:
        v, denominator = weights["v"], weights["denominators"]
    step = m * BY.of_momentum + g * BY.of_grad
    return {
        "p": weights["p"] * BY.shrink - step / denominator,
        "m": m,
        "v": v,
        "norm": (g * g).sum(),
    }


def start(*shape: int) -> dict[str, torch.Tensor]:
    return {
        "p": numbers(*shape, seed=1),
        "m": numbers(*shape, seed=2),
        "v": numbers(*shape, seed=3) ** 2,
    }


@pytest.mark.parametrize("lean", [None, 0, 1], ids=["full", "lean rows", "lean columns"])
@pytest.mark.parametrize(("n", "n_rows", "n_columns"), SIZES)
def test_an_update_by_sums_of_rows(n, n_rows, n_columns, lean):
    ids, indptr = bags(n, n_rows, 3)
    n_real = n_columns - 1  # the last column is padding
    grad = numbers(n_rows, n_columns, seed=4)
    grad[:, n_real:] = 0
    before, diagonal = start(n, n_columns), 1
    for part in before.values():
        part[:, n_real:] = 0
    if lean is not None:
        before["denominators"] = 0.5 + numbers(*((n, 1), (1, n_columns))[lean], seed=5) ** 2

    def updated() -> dict[str, torch.Tensor]:
        whole = {name: part.double() for name, part in before.items()}
        sums = summed(grad.double(), ids, indptr)
        for i in range(diagonal, min(n, n_columns + diagonal)):
            sums[i, i - diagonal] = 0
        return adam(whole, sums)

    exact = bounded(updated)
    p, m, v = (before[name].clone() for name in "pmv")
    copy = torch.zeros_like(p, dtype=torch.bfloat16)
    of = Weights(p, m, v, copy=copy)
    if lean is not None:
        of = Weights(p, m, None, before["denominators"], copy)
    norm = KERNELS.update_sum(grad, (ids, indptr), diagonal, of, ON_DEVICE)
    for name, value in {"p": p, "m": m, "v": v, "norm": norm}.items():
        within(value, exact, name)
    assert torch.allclose(copy.float(), p, rtol=BF16, atol=0)
    if lean is None:
        assert not p[:, n_real:].any() and not m[:, n_real:].any() and not v[:, n_real:].any()


def adam_by_row(weights: dict[str, torch.Tensor], grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """One step of BY in plain torch, with one second moment for each row."""
    g = grad * BY.grad_scale
    v = weights["v"] * BY.beta2 + (g * g).sum(dim=1, keepdim=True) * (BY.rest2 / g.shape[1])
    return adam(weights | {"denominators": v.sqrt() * BY.of_root + BY.eps}, grad) | {"v": v}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sums", [False, True], ids=["dense", "sums"])
@pytest.mark.parametrize(("n", "n_rows", "n_columns"), [*SIZES, (3, 5, 4100)])
def test_an_update_of_rows_with_one_second_moment(n, n_rows, n_columns, sums, dtype):
    ids, indptr = bags(n, n_rows, 3)
    grad = numbers(n_rows if sums else n, n_columns, seed=4).to(dtype)
    before = start(n + 2, n_columns) | {"v": numbers(n + 2, 1, seed=3) ** 2}  # two rows of padding
    for part in before.values():
        part[n:] = 0

    def updated() -> dict[str, torch.Tensor]:
        whole = {name: part[:n].double() for name, part in before.items()}
        return adam_by_row(whole, summed(grad.double(), ids, indptr) if sums else grad.double())

    exact = bounded(updated)
    p, m, v = (before[name].clone() for name in "pmv")
    copy = torch.zeros_like(p, dtype=torch.bfloat16)
    of = Weights(p, m, v, copy=copy)
    norm = KERNELS.update_rows(grad, (ids, indptr) if sums else None, of, ON_DEVICE)
    for name, value in {"p": p[:n], "m": m[:n], "v": v[:n], "norm": norm}.items():
        within(value, exact, name)
    assert torch.allclose(copy.float(), p, rtol=BF16, atol=0)
    assert not any(part[n:].any() for part in (p, m, v))


def test_rows_without_a_gradient_stay_zero():
    p, m, v = torch.zeros(3, 6), torch.zeros(3, 6), torch.zeros(3, 1)
    KERNELS.update_rows(torch.zeros(3, 6), None, Weights(p, m, v), ON_DEVICE)
    assert not p.any() and not m.any() and not v.any()


def test_the_diagonal_of_a_matrix_stays_zero():
    ids, indptr = bags(6, 10, 3)
    p = numbers(6, 6)
    torch.diagonal(p).zero_()
    of = Weights(p, torch.zeros(6, 6), torch.zeros(6, 6))
    for _ in range(3):
        KERNELS.update_sum(numbers(10, 6, seed=8), (ids, indptr), 0, of, ON_DEVICE)
    assert not torch.diagonal(p).any()
    assert p.count_nonzero() == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_updates_in_one_pass(dtype):
    shapes, parts, exact, befores = [(1,), (50, 41), (2049,), (4096,)], [], [], []
    for k, shape in enumerate(shapes):
        grad, before = numbers(*shape, seed=k).to(dtype), start(*shape)
        befores.append(before)
        exact.append(
            bounded(
                lambda before=before, grad=grad: adam(
                    {name: part.double() for name, part in before.items()}, grad.double()
                )
            )
        )
        copy = torch.zeros(shape, dtype=torch.bfloat16) if k != 1 else None
        p, m, v = (before[name].clone() for name in "pmv")
        parts.append((grad, Weights(p, m, v, copy=copy)))
    norm = KERNELS.update_many(parts, ON_DEVICE)
    pairs = zip(befores, parts, strict=True)
    total = sum(float(adam(before, grad.double())["norm"]) for before, (grad, _) in pairs)
    assert float(norm) == pytest.approx(total, rel=1e-5)
    for (_, of), want in zip(parts, exact, strict=True):
        for name, value in {"p": of.weights, "m": of.first, "v": of.second}.items():
            within(value, want, name)
        if of.copy is not None:
            assert torch.allclose(of.copy.float(), of.weights, rtol=BF16, atol=0)


@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.3])
@pytest.mark.parametrize("n_paths", [1, 2, 3])
@pytest.mark.parametrize(("n_rows", "n_items"), [(1, 1), (3, 127), (2, 1100)])
def test_the_focal_loss(n_rows, n_items, n_paths, gamma):
    n_padded = -(-n_items // 128) * 128
    padded = [8 * numbers(n_rows, n_padded, seed=k) for k in range(n_paths)]
    padded[0][0, 0] = 20.0
    is_one = torch.rand(n_rows, n_items, generator=torch.Generator().manual_seed(5)) < 0.2
    weight = torch.rand(n_rows, generator=torch.Generator().manual_seed(6))
    logits = [path[:, :n_items] for path in padded]
    plain = FocalLoss(0.25, gamma)

    def in_double(logits: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        ones = is_one.nonzero(as_tuple=True)
        value, grads = plain.block([path.double() for path in logits], ones, weight.double())
        return {"value": value} | {f"gradient {path}": grad for path, grad in enumerate(grads)}

    exact = bounded(lambda: in_double(logits))
    value, grads = KERNELS.focal(logits, is_one, weight, 0.25, gamma)
    within(value, exact, "value")
    for path, grad in enumerate(grads):
        assert grad.shape == (n_rows, n_padded) and not grad[:, n_items:].any()
        within(grad[:, :n_items], exact, f"gradient {path}")

    half = [path.bfloat16() for path in padded]
    wanted = in_double([path[:, :n_items] for path in half])
    value, grads = KERNELS.focal([path[:, :n_items] for path in half], is_one, weight, 0.25, gamma)
    assert float(value) == pytest.approx(float(wanted["value"]), rel=1e-5)
    for path, grad in enumerate(grads):
        error = (grad[:, :n_items].double() - wanted[f"gradient {path}"]).abs()
        assert error.le(BF16 * wanted[f"gradient {path}"].abs() + 1e-12).all()


def test_tables_of_a_recorded_step_lie_in_memory_that_was_there_before(monkeypatch):
    kernels, parts = TritonKernels(), [(numbers(5, 3, seed=k), numbers(5, 3)) for k in range(2)]
    weights = [Weights(numbers(5, 3), numbers(5, 3), numbers(5, 3) ** 2) for _ in range(4)]
    kernels.update_many(
        [(grad, of) for (grad, _), of in zip(parts, weights, strict=False)], ON_DEVICE
    )
    monkeypatch.setattr(cuda, "_is_recording", lambda device: True)
    tables = [kernels._addresses([of.weights], torch.device("cpu")) for of in weights]
    assert not torch.cat(tables).any()
    kernels.end_recording()
    assert torch.cat(tables).tolist() == [of.weights.data_ptr() for of in weights]
    assert len({table.untyped_storage().data_ptr() for table in tables}) == 1
    monkeypatch.setattr(cuda.RecordedTables, "_SIZE", 8)
    with pytest.raises(RuntimeError, match="too many steps"):
        kernels._addresses([weights[0].weights], torch.device("cpu"))
