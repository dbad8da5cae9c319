"""What a rank holds: of the trunk what ZeRO promises, of the item matrices its share, and never a
whole catalogue (invariant 5)."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_vasp.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.model.partitioned import PartitionedModel
from dist_vasp.parallel.comm import Ranks
from tests.support.make_shards import write_folder
from tests.support.ranks import run_ranks

# --- what is kept between steps -------------------------------------------------------------------

WORLD = 4


def _held(ranks: Ranks, model: ModelConfig, n_items: int, stage: int) -> dict[str, int]:
    """What lives on this rank before the first step, counted from the tensors themselves; moments
    exist."""
    from dist_vasp.training.step.engine import Trainer

    config = Config(
        model=model, parallel=ParallelConfig(zero_stage=stage), run=RunConfig(seed=1), device="cpu"
    )
    trainer = Trainer(config, n_items, ranks)
    trunk = trainer.trunk
    assert trunk is not None
    trunk.ensure_state()
    pieces = trainer.item_pieces(True)
    parameters = list(trunk.module.parameters())
    return {
        "whole trunk": trunk.n_parameters,
        "tensors of the trunk": len(parameters),
        "moments": sum(
            t.numel() for state in trunk.optimizer.state.values() for t in state.values() if t.dim()
        ),
        "parameters": sum(p.data.numel() for p in parameters)
        if stage < 3
        else sum(p.ds_tensor.numel() for p in parameters),
        "kept whole": sum(p.data.numel() for p in parameters if p.data.numel() > 1)
        if stage == 3
        else 0,
        "bytes of items": sum(p.tensor.numel() * p.tensor.element_size() for p in pieces),
    }


def _check_held(model: ModelConfig, n_items: int) -> None:
    whole_items = (
        3 * 4 * n_items * (2 * model.hidden + 1 + model.latent + 1 + n_items)
    )  # weights and two moments, fp32
    for stage in (0, 1, 2, 3):
        by_rank = run_ranks(_held, WORLD, model, n_items, stage, timeout=300)
        for held in by_rank:
            whole = held["whole trunk"]
            share, padding = -(-whole // WORLD), held["tensors of the trunk"] + 8
            if stage == 0:
                assert held["moments"] == 2 * whole, held
            else:
                assert 2 * (whole // WORLD) <= held["moments"] + 2 * padding and held[
                    "moments"
                ] <= 2 * (share + padding), held
            if stage < 3:
                assert held["parameters"] == whole, held
            else:
                assert share <= held["parameters"] <= share + padding, held
            assert abs(held["bytes of items"] / (whole_items / WORLD) - 1) < 0.01, held
        totals = {key: sum(held[key] for held in by_rank) for key in by_rank[0]}
        assert totals["bytes of items"] == whole_items
        assert totals["moments"] >= 2 * whole
        print(f"stage {stage}: {by_rank[0]}", flush=True)


@pytest.mark.slow
def test_fifty_million_parameters_are_shared_out():
    """No forward: H 2048 and L 1024 are only built.

    Biases and norms (under 1e5 elements) stay whole at stage 3 besides.
    """
    _check_held(ModelConfig(hidden=2048, latent=1024), 1009)


def _gradients(ranks: Ranks, folder: Path) -> list[dict[str, int]]:
    return [_gradients_at(ranks, folder, stage) for stage in (0, 1, 2, 3)]


def _gradients_at(ranks: Ranks, folder: Path, stage: int) -> dict[str, int]:
    """Gradient elements of the trunk on this rank between the last backward of a step and the
    update."""
    trainer, stream = _trainer(ranks, folder, stage)
    trunk, seen = trainer.trunk, {}
    assert trunk is not None
    update = trunk.step

    def look_and_step() -> None:
        zero = trunk._engine.optimizer
        partitioned = [
            g for group in getattr(zero, "averaged_gradients", {}).values() if group for g in group
        ]
        seen["whole"] = sum(p.grad.numel() for p in trunk.module.parameters() if p.grad is not None)
        seen["share"] = sum(g.numel() for g in partitioned)
        update()

    trunk.step = look_and_step  # type: ignore[method-assign]
    trainer.step(stream.batch(0))
    items = [p.tensor.grad for p in trainer.model.slices()]
    assert items == [None] * len(items), "gradients of item matrices are applied and dropped"
    moments = sum(
        t.numel() for state in trunk.optimizer.state.values() for t in state.values() if t.dim()
    )
    return {
        **seen,
        "trunk": trunk.n_parameters,
        "tensors": len(list(trunk.module.parameters())),
        "moments": moments,
    }


def test_gradients_and_moments_of_a_step(folder):
    for by_stage in run_ranks(_gradients, 3, folder, timeout=300):
        for stage, found in enumerate(by_stage):
            share, padding = -(-found["trunk"] // 3), found["tensors"] + 8
            if stage == 0:
                assert (
                    found["whole"] == found["trunk"] and found["moments"] == 2 * found["trunk"]
                ), found
            else:
                assert found["whole"] == 0, found
                assert share - padding <= found["share"] <= share + padding, found
                assert 2 * (share - padding) <= found["moments"] <= 2 * (share + padding), found


# --- what is ever allocated -----------------------------------------------------------------------

# I is prime and the smallest whole matrix that may not exist, I x L, is larger than the largest
# share that may: J x H.
N_ITEMS, H, L, COLUMNS, USERS = 997, 37, 19, 16, 46


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)

    def rows(n: int) -> list[np.ndarray]:
        return [
            np.sort(rng.choice(N_ITEMS, size=rng.integers(2, 12), replace=False)) for _ in range(n)
        ]

    path = tmp_path_factory.mktemp("shards")
    heldout = [(row[1:], row[:1]) for row in rows(50)]
    write_folder(
        path, rows(2 * USERS), heldout[:25], heldout[25:], n_items=N_ITEMS, users_per_shard=23
    )
    return path


def _config(folder: Path, stage: int, **optimizer) -> Config:
    return Config(
        data=DataConfig(shards=str(folder), batch_size=USERS, workers=0),
        model=ModelConfig(hidden=H, latent=L, encoder_layers=2, decoder_layers=1),
        optimizer=OptimizerConfig(schedule=[Stage(9, 1e-3)], **optimizer),
        parallel=ParallelConfig(zero_stage=stage, lanes=6, block_columns=COLUMNS),
        run=RunConfig(dir=str(folder.parent / "run"), seed=1),
        device="cpu",
    )


def _trainer(ranks: Ranks, folder: Path, stage: int, **optimizer):
    from dist_vasp.training.batches import make_stream
    from dist_vasp.training.step.engine import Trainer

    config = _config(folder, stage, **optimizer)
    stream = make_stream(config, ranks)
    return Trainer(config, stream.n_items, ranks), stream


class Allocations(TorchDispatchMode):
    """Shape, bytes and operation of every tensor that an operation gives back while the mode is on.

    Not those that only look into a file: safetensors maps it whole, of any size, and copies parts
    of it out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[tuple[int, ...], int], str] = {}
        self._files: dict[
            int, torch.Tensor
        ] = {}  # by address, and held, so that no other storage can get the address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
                continue  # a tensor on the meta device has a shape and no memory
            if func is torch.ops.aten.set_.source_Storage:
                self._files[tensor.untyped_storage().data_ptr()] = tensor
            if tensor.untyped_storage().data_ptr() not in self._files:
                self.seen.setdefault(
                    (tuple(tensor.shape), tensor.numel() * tensor.element_size()), str(func)
                )
        return out


def _record(ranks: Ranks, folder: Path, root: Path) -> dict[str, dict]:
    from dist_vasp.checkpoint.write import save as save_checkpoint
    from dist_vasp.ranking import evaluate as ranking
    from dist_vasp.ranking.load import load_model
    from dist_vasp.training.state import RunState, Saver, resume

    ranking._SELECT_COLUMNS = (
        100  # blocks are joined before the best are selected: narrower than a rank's share here
    )
    recorded: dict[str, dict] = {}

    def during(what: str, work):
        with Allocations() as mode:
            result = work()
        recorded[what] = mode.seen
        return result

    trainer, stream = during("start", lambda: _trainer(ranks, folder, 1))
    batch = stream.batch(0)
    during("step", lambda: trainer.step(batch))
    for name, options in {
        "clipped step": {"clip_norm": 0.1},
        "two micro-batches": {"accumulation": 2},
    }.items():
        other, _ = _trainer(ranks, folder, 2, **options)
        during(name, lambda other=other: other.step(batch))

    def evaluate():
        with trainer.evaluating() as trunk:
            found = ranking.evaluate(
                ranking.model_scorer(trainer.model, trunk), folder, "test", ranks
            )
        assert found is not None and found.result()["n_users"] == 25

    during("evaluation", evaluate)
    saver = Saver(trainer, stream, root / "checkpoints", lambda _: None)

    def save():
        saver.save(RunState(1))
        saver.save_best(RunState(1))
        saver.finish()

    during("save", save)
    header = saver._header(RunState(2))
    in_front = lambda: save_checkpoint(  # noqa: E731
        root / "checkpoints" / "step-00000002",
        header,
        trainer.item_pieces(True),
        trainer.trunk_tensors(True),
        ranks,
    )
    during("save in the foreground", in_front)
    fresh, _ = _trainer(ranks, folder, 3)
    assert during("load", lambda: resume(fresh, stream, root / "checkpoints", ranks)) is not None
    (root / "items.parquet").write_bytes((folder / "items.parquet").read_bytes())
    during("load to evaluate", lambda: load_model(root, None, ranks))
    return recorded


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_rank_ever_holds_a_whole_catalogue(folder, tmp_path, world_size):
    J, G = -(-N_ITEMS // world_size), 2 * USERS
    smallest = N_ITEMS * min(H, L, 25, G)  # (U, I), (G, I), I x H, I x L, I x I: none is smaller
    assert max(J * H, N_ITEMS * COLUMNS) < smallest, (
        "the sizes of this test do not tell a share from a whole"
    )
    for rank, recorded in enumerate(run_ranks(_record, world_size, folder, tmp_path)):
        for what, seen in recorded.items():
            assert seen, what
            for (shape, n_bytes), operation in seen.items():
                n = int(np.prod(shape))
                assert n < smallest, (
                    f"rank {rank}, {what}: {operation} gives {shape}, {n_bytes} bytes"
                )
                whole_axes = [d for d in shape if d in (N_ITEMS, N_ITEMS + 1)]
                width = n // N_ITEMS
                assert not whole_axes or len(shape) == 1 or width <= COLUMNS, (
                    f"rank {rank}, {what}: {operation} gives {shape}"
                )
        # the record is worth something: the shares themselves are seen, and so is the gradient's
        # block
        blocks = {
            (N_ITEMS, COLUMNS),
            ((rank + 1) * N_ITEMS // world_size - rank * N_ITEMS // world_size, H),
        }
        assert blocks <= {shape for shape, _ in recorded["start"]} and (N_ITEMS, COLUMNS) in {
            s for s, _ in recorded["step"]
        }


def _alive_at_the_end(ranks: Ranks, config: Config) -> list[str]:
    """The kinds of what a training still holds when its best checkpoint is loaded for the
    result."""
    from dist_vasp.training import train
    from dist_vasp.training.step.engine import Trainer
    from dist_vasp.training.step.optimizer import InPlaceAdam

    alive: list[str] = []

    def final_result(*_) -> None:
        held = (Trainer, InPlaceAdam, PartitionedModel)
        alive.extend(type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, held))

    train.final_result = final_result  # type: ignore[assignment]
    train.train(config, ranks)
    return alive


@pytest.mark.parametrize(
    "stage", range(3)
)  # at stage 3 DeepSpeed keeps this rank's share of the trunk
def test_no_model_is_left_beside_that_of_the_result(folder, tmp_path, stage):
    run = RunConfig(dir=str(tmp_path / "run"), max_steps=2)
    config = replace(_config(folder, stage), run=run)
    assert run_ranks(_alive_at_the_end, 2, config) == [[], []]


def test_the_record_sees_a_whole_matrix():
    with Allocations() as mode:
        (torch.ones(5, 3, requires_grad=True) @ torch.ones(3, 7)).sum().backward()
    assert {(5, 7), (5, 3)} <= {shape for shape, _ in mode.seen}, (
        "what backward allocates is recorded too"
    )
