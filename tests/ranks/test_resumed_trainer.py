"""A trainer that resumes from a checkpoint goes on as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dist_vasp.checkpoint import write
from dist_vasp.checkpoint.read import open_checkpoint, verify
from dist_vasp.checkpoint.weights import load_weights
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
from dist_vasp.model.registry import kind_of
from dist_vasp.parallel.comm import Ranks
from tests.support.checkpoints import HEADER, N_ITEMS
from tests.support.partitioned import SMALL, csr, random_rows, share
from tests.support.ranks import run_ranks

N_ROWS = 12
CASES = [
    ("vasp", "nadam", 0, 1),
    ("vasp", "nadam", 1, 2),
    ("vasp", "adamw", 2, 1),
    ("vasp", "nadam", 3, 1),
    ("nease", "adam", 1, 1),
    ("multvae", "adam", 1, 1),
]


def _batch(step: int, ranks: Ranks) -> Batch:
    x, y = (
        random_rows(N_ROWS, N_ITEMS, 10 + step, empty=(3,)),
        random_rows(N_ROWS, N_ITEMS, 20 + step, empty=(5,)),
    )
    mine, padded = share(N_ROWS, ranks)
    n = mine.stop - mine.start
    lanes = tuple((lane, 1) for lane in range(mine.start, mine.stop))
    return Batch(
        0,
        step,
        csr(x[mine]),
        csr(y[mine]),
        np.arange(n, dtype=np.uint64),
        lanes,
        n,
        N_ROWS,
        N_ROWS,
        padded,
    )


def _state(trainer) -> dict[str, np.ndarray]:
    items = {f"{p.name}[{p.lo}:{p.hi}]": p.tensor.numpy().copy() for p in trainer.item_pieces(True)}
    return items | {name: t.numpy().copy() for name, t in trainer.trunk_tensors(True).items()}


def _train_save_go_on(ranks, folder):
    """For each case, the state after five steps in one go, and after three, a checkpoint, and two
    of a fresh trainer."""
    from dist_vasp.training.step.engine import Trainer

    found = []
    for kind, name, stage, accumulation in CASES:
        config = Config(
            model=ModelConfig(kind=kind, **SMALL),
            loss=LossConfig(kind=kind_of(kind).losses[0], kl_weight=0.5, kl_anneal_steps=8),
            optimizer=OptimizerConfig(
                name=name, schedule=[Stage(10, 0.01)], accumulation=accumulation
            ),
            parallel=ParallelConfig(zero_stage=stage),
            run=RunConfig(seed=5),
            device="cpu",
        )
        whole = Trainer(config, N_ITEMS, ranks)
        for step in range(3):
            whole.step(_batch(step, ranks))
        path = folder / f"{kind}-{stage}" / "step-00000003"
        header = replace(HEADER, optimizer=whole.optimizer_scalars())
        write.save(path, header, whole.item_pieces(True), whole.trunk_tensors(True), ranks)
        reports = [whole.step(_batch(step, ranks)) for step in (3, 4)]

        resumed = Trainer(config, N_ITEMS, ranks)  # its start is overwritten
        opened = open_checkpoint(path)
        verify(opened, ranks)
        shapes = resumed.trunk.shapes(moments=True) if resumed.trunk else {}
        tensors = load_weights(opened, resumed.item_pieces(True), shapes)
        if resumed.trunk:
            resumed.trunk.load(tensors)
        resumed.load_scalars(opened.header.optimizer, 0)
        assert opened.header.optimizer["step"] == 3
        reports_resumed = [resumed.step(_batch(step, ranks)) for step in (3, 4)]
        found.append(((_state(whole), reports), (_state(resumed), reports_resumed)))
    return found


def test_a_resumed_trainer_goes_on_bitwise(tmp_path):
    for by_rank in run_ranks(_train_save_go_on, 2, tmp_path):
        for case, ((whole, reports), (resumed, reports_resumed)) in zip(
            CASES, by_rank, strict=True
        ):
            assert reports == reports_resumed, case
            for step, report in zip((3, 4), reports, strict=True):  # of 8 in which it rises to .5
                assert report.loss == report.focal + step / 16 * report.kl, case
            assert whole.keys() == resumed.keys()
            for name, expected in whole.items():
                assert np.array_equal(expected, resumed[name]), f"{case} {name}"
