"""Compiled and uncompiled, the loss and the update are the same to rounding; no compiler is a
remark, or an error where it was demanded."""

import pytest
import torch
from torch._dynamo.utils import counters

from dist_vasp.config.schema import OptimizerConfig
from dist_vasp.kernels import choose, compiled
from dist_vasp.kernels.choose import choose_kernels
from dist_vasp.kernels.compiled import COMPILED
from dist_vasp.kernels.interface import PLAIN
from dist_vasp.model.losses import make_loss
from dist_vasp.training.step.optimizer import InPlaceAdam
from dist_vasp.training.step.plain_update import SMALL
from tests.oracles.rounding import bounded, within


@pytest.fixture(autouse=True)
def configured(monkeypatch, tmp_path):
    """As `kernels` does it. torch's graph cache would hand out code made for other vector units."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    compiled._configure()


def case(rows: int, columns: int, n_paths: int):
    generator = torch.Generator().manual_seed(rows + columns)
    logits = [torch.randn(rows, columns, generator=generator) * 4 for _ in range(n_paths)]
    ones = (torch.rand(rows, columns, generator=generator) < 0.1).nonzero(as_tuple=True)
    return logits, ones, torch.rand(rows, generator=generator)


def in_double(
    kind: str, logits: list, ones: tuple, weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Value and gradients of the plain block in double precision."""
    loss, logits = make_loss(kind), [path.double() for path in logits]
    stats = loss.row_stats(logits, ones) if kind == "cosine" else None
    value, grads = loss.block(logits, ones, weight.double(), stats)
    return {"value": value} | {f"gradient {path}": grad for path, grad in enumerate(grads)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["focal", "cosine"])
def test_a_compiled_block_equals_the_plain_one(kind):
    fast, reference = make_loss(kind, kernels=COMPILED), make_loss(kind)
    graphs = []
    for rows, columns in ((12, 40), (33, 17), (7, 256)):
        logits, ones, weight = case(rows, columns, 3)
        stats = reference.row_stats(logits, ones) if kind == "cosine" else None
        (a, grads_a), (b, grads_b) = (
            loss.block(logits, ones, weight, stats) for loss in (fast, reference)
        )
        exact = bounded(lambda kind=kind, data=(logits, ones, weight): in_double(kind, *data))
        for value, grads in ((a, grads_a), (b, grads_b)):
            within(value, exact, "value", kind)
            for path, grad in enumerate(grads):
                within(grad, exact, f"gradient {path}", kind)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0, "one compilation serves every size"


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [OptimizerConfig(), OptimizerConfig(name="adamw", weight_decay=0.1)],
    ids=["nadam", "adamw"],
)
@pytest.mark.parametrize("lean_dim", [None, 0, 1])
def test_a_compiled_update_equals_the_plain_one(config, lean_dim):
    generator = torch.Generator().manual_seed(0)
    rows = 30 if lean_dim is not None else SMALL // 20 + 1  # one of fewer numbers is not compiled
    start = torch.randn(rows, 20, generator=generator)
    gradients = [torch.randn(rows, 20, generator=generator) for _ in range(4)]

    def updated(weight, kernels) -> dict[str, torch.Tensor]:
        """The weight after four steps, and what the optimizer keeps of it."""
        optimizer = InPlaceAdam(
            [{"params": [weight], "lean_dim": lean_dim}], config, lr=0.1, kernels=kernels
        )
        for step, gradient in enumerate(gradients):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)  # another number every step
            optimizer.grad_scale = 1.0 if step % 2 else 0.5
            optimizer.begin_step()
            optimizer.update(weight, 0, gradient.to(weight.dtype, copy=True))
            graphs.append(counters["stats"]["unique_graphs"])
        return {"weight": weight, **optimizer.state[weight]}

    graphs: list[int] = []
    found = updated(start.clone(), COMPILED)
    assert graphs[0] == graphs[-1] > 0, "one compilation serves every step"
    exact = bounded(lambda: updated(start.double(), PLAIN))
    for result in (found, updated(start.clone(), PLAIN)):
        for name, value in result.items():
            within(value, exact, name)
    assert (found["weight"] - start).abs().max() > 0.05


def test_no_compiler(monkeypatch):
    def no_compiler(_):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(compiled, "_try", no_compiler)
    many, cpu = choose.WORTH_COMPILING, torch.device("cpu")
    assert choose_kernels("never", many, cpu) == (PLAIN, "")
    assert choose_kernels("auto", many - 1, cpu) == (PLAIN, "")
    kernels, remark = choose_kernels("auto", many, cpu)
    assert kernels is PLAIN
    assert "No working C++ compiler found); install" in remark
    with pytest.raises(
        ValueError,
        match=r"parallel\.compile is always.*No working C\+\+ compiler found\); install "
        r"a C\+\+ compiler",
    ):
        choose_kernels("always", 1, cpu)
