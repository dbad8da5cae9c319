"""The whole step of a GPU on CPU tensors: padding, kernels in Triton's interpreter, one host read.

Losses of ten steps equal those of the CPU's path.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_vasp.config.schema import (
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.data.stream import Batch
from tests.support.interpreter import interpreted
from tests.support.partitioned import SMALL, csr, random_rows, share
from tests.support.ranks import run_ranks

pytestmark = interpreted

pytest.importorskip("triton", reason="triton is not installed; pip install -e '.[dev]'")

N_ITEMS, N_ROWS, STEPS = 20, 6, 10
CASES = {
    "vasp": {},
    "vasp clipped": {"clip_norm": 0.5},
    "vasp lean": {"item_state": "lean"},
    "vasp lean and clipped": {"item_state": "lean", "clip_norm": 0.5},
    "vasp in blocks": {"block_columns": 128},
    "vasp accumulated": {"accumulation": 2},
    "wide_deep": {},
    "nease cosine": {"name": "adam"},
    "flvae": {},
    "flvae multinomial": {"name": "adamw", "weight_decay": 0.1},
}


def config(case: str, precision: str = "fp32") -> Config:
    kind, *words = case.split()
    changes = dict(CASES[case])
    block_columns = changes.pop("block_columns", 0)
    loss = words[0] if words and words[0] in ("cosine", "multinomial") else "focal"
    return Config(
        model=ModelConfig(kind=kind, **SMALL),
        loss=LossConfig(kind=loss),
        optimizer=OptimizerConfig(schedule=[Stage(99, 0.002)], **changes),
        parallel=ParallelConfig(block_columns=block_columns, precision=precision),
        run=RunConfig(seed=5),
        device="cpu",
    )


def batch(step: int, ranks) -> Batch:
    mine, padded = share(N_ROWS, ranks)
    n = mine.stop - mine.start
    sides = [
        csr(random_rows(N_ROWS, N_ITEMS, seed + step, empty=(3 + seed % 2,))[mine])
        for seed in (100, 201)
    ]
    lanes = tuple((lane, 1) for lane in range(mine.start, mine.stop))
    keys = np.arange(n, dtype=np.uint64)
    return Batch(0, step, *sides, keys, lanes, n, N_ROWS, N_ROWS, padded)


def again(compute):
    """What records a step, without a GPU: a replay is another call."""
    result = torch.zeros(1, dtype=torch.float64)

    def replay() -> None:
        found = compute()
        result.resize_(found.shape).copy_(found)

    return replay, result


def losses(
    ranks, cases: list[str], kernels: str, precision: str = "fp32", steps: int = STEPS,
    captured: bool = False,
) -> dict[str, list]:  # fmt: skip
    """(loss, gradient norm) of each step of each case, and what the ends of its slices hold."""
    from dist_vasp.kernels.cuda import TritonKernels
    from dist_vasp.kernels.interface import PLAIN
    from dist_vasp.training.step import captured_step, engine

    captured_step.Recorder = lambda device: again  # type: ignore[assignment,misc]
    if captured:
        engine.Trainer._can_be_captured = lambda self: True  # type: ignore[method-assign]
    chosen = {"triton": TritonKernels(), "plain": PLAIN}[kernels]
    engine.choose_kernels = lambda *_: (chosen, "")  # type: ignore[assignment]
    found = {}
    for case in cases:
        trainer = engine.Trainer(config(case, precision), N_ITEMS, ranks)
        reports = [trainer.step(batch(step, ranks)) for step in range(steps)]
        found[case] = [(report.loss, report.grad_norm) for report in reports]
        for piece in trainer.model.slices():
            beyond = piece.whole.movedim(piece.item_dim, 0)[piece.hi - piece.lo :]
            assert not beyond.any(), f"{case}: the padding of {piece.name} has changed"
        for matrix in trainer.model.matrices:
            for piece in matrix.blocks:
                assert not torch.diagonal(piece.tensor[piece.lo :]).any()
        with trainer.evaluating() as trunk:
            x = trainer.batches.receive(batch(STEPS, ranks))[0].x
            scores = [block for _, block in trainer.model.scores(trunk, x)]
        found[f"{case} scores"] = torch.cat(scores, dim=1).tolist()
    return found


def check(world_size: int, cases: list[str]) -> None:
    gpu = run_ranks(losses, world_size, cases, "triton", timeout=300)
    cpu = run_ranks(losses, world_size, cases, "plain")
    for ours, plain in zip(gpu, cpu, strict=True):
        for case in cases:
            (loss, norm), (plain_loss, plain_norm) = np.array(ours[case]).T, np.array(plain[case]).T
            assert np.allclose(loss, plain_loss, rtol=1e-5, atol=0), case
            # Ten steps carry the roundings of both on; a gradient is a sum that cancels.
            assert np.allclose(norm, plain_norm, rtol=1e-3, atol=0), case
            scores = (found[f"{case} scores"] for found in (ours, plain))
            assert np.allclose(*scores, rtol=1e-3, atol=1e-4), case


SLOW = pytest.mark.slow
RECORDED = ["vasp", "vasp clipped", "vasp lean", "flvae", "wide_deep"]


@SLOW
@pytest.mark.parametrize(
    "cases",
    [["vasp lean and clipped"], RECORDED],
    ids=["one", "many"],
)
def test_replayed_steps_equal_those_that_are_computed(cases):
    """The rows lie in buffers with room for more; the number of ids changes with every step."""
    (replayed,) = run_ranks(losses, 1, cases, "triton", "fp32", 3, True, timeout=300)
    (computed,) = run_ranks(losses, 1, cases, "triton", "fp32", 3, timeout=300)
    assert replayed == computed


def test_ten_steps_equal_those_of_the_cpu():
    check(1, ["vasp"])


@SLOW
def test_ten_steps_of_every_case_equal_those_of_the_cpu():
    check(1, list(CASES))


@SLOW
def test_ten_steps_on_two_ranks_equal_those_of_the_cpu():
    check(2, ["vasp lean and clipped", "vasp accumulated", "wide_deep", "flvae multinomial"])


@SLOW
@pytest.mark.parametrize("cases", [["vasp"], ["flvae multinomial"]], ids=["vasp", "flvae"])
def test_bf16_agrees_to_the_rounding_of_its_products(cases):
    (half,) = run_ranks(losses, 1, cases, "triton", "bf16")
    (full,) = run_ranks(losses, 1, cases, "plain", "fp32")
    for case in cases:
        first, wanted = half[case][0][0], full[case][0][0]
        assert first == pytest.approx(wanted, rel=5e-3) and first != wanted, case
        assert np.allclose(np.array(half[case])[:, 0], np.array(full[case])[:, 0], rtol=2e-2), case


class Asked(TorchFunctionMode):
    """Collects the calls that read a tensor of the device as Python numbers."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("tolist", "cpu", "numpy"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class HostReads(TorchDispatchMode):
    """Collects what would wait for a GPU: numbers read back, shapes that depend on numbers."""

    def __init__(self, host: list[torch.Tensor]) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.host = {id(scalar) for scalar in host}  # scalars that are on the host anyway

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "item")
        if waits and id(args[0]) not in self.host:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def reads(ranks, cases: list[str]) -> dict[str, list[str]]:
    """What one step reads back, by case."""
    from dist_vasp.kernels.cuda import TritonKernels
    from dist_vasp.training.step import engine

    engine.choose_kernels = lambda *_: (TritonKernels(), "")  # type: ignore[assignment]
    found = {}
    for case in cases:
        trainer = engine.Trainer(config(case), N_ITEMS, ranks)
        trainer.step(batch(0, ranks))
        scalars = [
            state[name]
            for optimizer in trainer.optimizers()
            for state in optimizer.state.values()
            for name in ("step", "mu_product")
        ]
        following = batch(1, ranks)
        with HostReads(scalars) as mode, Asked(mode.seen):
            trainer.step(following)
        found[case] = mode.seen
    return found


@SLOW
def test_a_step_reads_from_the_device_once():
    cases = [case for case in CASES if case != "vasp in blocks"]
    (found,) = run_ranks(reads, 1, cases, timeout=300)
    assert {case: seen for case, seen in found.items() if seen != ["tolist"]} == {}
