"""Any layout, any stage: saved on one, resumed on another, the run goes on as if nothing had
happened (invariant 4)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_vasp.config.command_line import from_dict
from dist_vasp.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.parallel.comm import Ranks, form_groups
from dist_vasp.parallel.partition import Layout
from tests.support.make_shards import write_folder
from tests.support.partitioned import assemble, export
from tests.support.ranks import run_ranks

N_ITEMS = 97  # divisible by none of 2, 3, 4
BEFORE, AFTER = 10, 20  # steps before the checkpoint and after it
# (ranks, replicas, ZeRO stage)
LAYOUTS = {
    "1 rank, stage 0": (1, 1, 0),
    "2 ranks, stage 1": (2, 1, 1),
    "2 ranks, stage 3": (2, 1, 3),
    "3 ranks, stage 2": (3, 1, 2),
}
LAYOUTS |= {"2 x 2 ranks, stage 1": (4, 2, 1)}
OPTIMIZERS = {"nadam": 0.0, "adamw": 0.1}  # and their weight decay


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    centres, sizes = rng.integers(N_ITEMS, size=300), rng.integers(1, 30, size=300)
    users = [
        sorted({int(i) for i in (c + rng.normal(0, 8, n)).round() % N_ITEMS})
        for c, n in zip(centres, sizes, strict=True)
    ]
    path = tmp_path_factory.mktemp("shards")
    write_folder(path, train=users, n_items=N_ITEMS, users_per_shard=37)
    return path


def _config(shards: Path, run_dir: Path, replicas: int = 1, stage: int = 1, **changes) -> Config:
    """Trunk sizes are odd on purpose: nothing divides by the number of ranks."""
    name = changes.get("name", "nadam")
    return Config(
        data=DataConfig(shards=str(shards), batch_size=changes.get("batch_size", 40), workers=0),
        model=changes.get(
            "model", ModelConfig(hidden=33, latent=17, encoder_layers=4, decoder_layers=3)
        ),
        optimizer=OptimizerConfig(
            name=name,
            weight_decay=OPTIMIZERS[name],
            schedule=[Stage(1, 1e-3), Stage(1000, 5e-4)],
            accumulation=changes.get("accumulation", 1),
        ),
        parallel=ParallelConfig(
            replicas=replicas,
            zero_stage=stage,
            lanes=12,
            precision=changes.get("precision", "auto"),
        ),
        run=RunConfig(dir=str(run_dir), seed=3),
        device="cpu",
    )


def _start(config: Config, ranks: Ranks):
    """Stream, trainer, saver and the folder of the checkpoints, as `train` makes them."""
    from dist_vasp.training.batches import make_stream
    from dist_vasp.training.state import Saver
    from dist_vasp.training.step.engine import Trainer

    stream = make_stream(config, ranks)
    trainer = Trainer(config, stream.n_items, ranks)
    folder = Path(config.run.dir) / "checkpoints"
    return stream, trainer, Saver(trainer, stream, folder, lambda _: None), folder


def _state(trainer) -> tuple[list, dict[str, np.ndarray]]:
    return export(trainer.item_pieces(True)), {
        name: p.numpy().copy() for name, p in trainer.trunk_tensors(True).items()
    }


def _whole(states: list) -> dict[str, torch.Tensor]:
    """Every parameter and moment, whole, out of the states of one partition group's ranks."""
    return assemble([piece for rank in states for piece in rank[0]]) | {
        k: torch.from_numpy(p) for k, p in states[0][1].items()
    }


# --- save on x, resume on y -----------------------------------------------------------------------


def _train_and_save(ranks: Ranks, configs: list[Config]) -> list[list[float]]:
    from dist_vasp.training.state import RunState

    found = []
    for config in configs:
        stream, trainer, saver, _ = _start(config, ranks)
        for batch in stream.batches(0, BEFORE, 0):
            trainer.step(batch)
        saver.save(RunState(BEFORE))
        saver.finish()
        found.append(
            [trainer.step(batch).loss for batch in stream.batches(BEFORE, BEFORE + AFTER, 0)]
        )
    return found


def _resume_and_train(ranks: Ranks, configs: list[Config]) -> list[list[float]]:
    from dist_vasp.training.state import resume

    found = []
    for config in configs:
        stream, trainer, _, folder = _start(config, ranks)
        state = resume(trainer, stream, folder, ranks)
        assert state is not None and state.step == BEFORE
        found.append(
            [trainer.step(batch).loss for batch in stream.batches(BEFORE, BEFORE + AFTER, 0)]
        )
    return found


@pytest.mark.slow
def test_every_layout_resumes_from_every_layout(shards, tmp_path):
    def configs(of: str, on: str) -> list[Config]:
        """The runs saved on one layout, one of each optimizer, to go on on another."""
        _, replicas, stage = LAYOUTS[on]
        return [
            _config(shards, tmp_path / of.replace(" ", "") / name, replicas, stage, name=name)
            for name in OPTIMIZERS
        ]

    def each(fn, layout: str, jobs: list[Config]) -> np.ndarray:
        n, replicas, _ = LAYOUTS[layout]
        by_rank = run_ranks(fn, n, jobs, replicas=replicas, timeout=400)
        assert all(losses == by_rank[0] for losses in by_rank), "the ranks do not agree on the loss"
        return np.array(by_rank[0])

    straight = {x: each(_train_and_save, x, configs(x, x)) for x in LAYOUTS}
    worst = 0.0
    for y in LAYOUTS:
        resumed = each(_resume_and_train, y, [config for x in LAYOUTS for config in configs(x, y)])
        for x, losses in zip(
            LAYOUTS, resumed.reshape(len(LAYOUTS), len(OPTIMIZERS), AFTER), strict=True
        ):
            np.testing.assert_allclose(
                losses, straight[x], rtol=1e-5, err_msg=f"saved on {x}, resumed on {y}"
            )
            worst = max(worst, float(np.abs(losses / straight[x] - 1).max()))
            if x == y:
                assert (losses == straight[x]).all(), (
                    f"{x}: a resume on the same layout must be bitwise"
                )
    print(
        f"{len(LAYOUTS) ** 2} pairs x {len(OPTIMIZERS)} optimizers: the largest "
        f"relative difference of a loss is {worst:.1e}"
    )


# --- four ranks -----------------------------------------------------------------------------------


def _train_on_four(ranks: Ranks, shards: Path, cases: list[tuple[int, int, int]], steps: int):
    """Losses and state of (replicas, stage, accumulation) after some steps, all in one set of
    processes."""
    found = []
    for replicas, stage, accumulation in cases:
        of_case = form_groups(ranks.rank, Layout.of(4, 0, replicas), torch.device("cpu"))
        stream, trainer, _, _ = _start(
            _config(shards, shards.parent / "run", replicas, stage, accumulation=accumulation),
            of_case,
        )
        losses = [trainer.step(batch).loss for batch in stream.batches(0, steps, 0)]
        found.append((losses, _state(trainer)))
    return found


@pytest.mark.slow
def test_layouts_and_accumulation_do_not_change_the_run(shards):
    """4x1, 2x2 and 1x4 train to the same parameters; micro-batches give the step of the whole
    batch."""
    cases = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 0, 1), (2, 1, 2), (2, 2, 3), (1, 3, 3)]
    by_rank = run_ranks(_train_on_four, 4, shards, cases, 12, timeout=200)
    losses = np.array([of_case[0] for of_case in by_rank[0]])
    wholes = [
        _whole([rank[c][1] for rank in by_rank[: 4 // replicas]])
        for c, (replicas, _, _) in enumerate(cases)
    ]
    for case, found, whole in zip(cases[1:], losses[1:], wholes[1:], strict=True):
        np.testing.assert_allclose(found, losses[0], rtol=1e-5, err_msg=f"{case}")
        assert whole.keys() == wholes[0].keys()
        for name, expected in wholes[0].items():
            distance = torch.linalg.vector_norm(whole[name] - expected) / torch.linalg.vector_norm(
                expected
            )
            assert distance < 1e-4, (
                f"(replicas, stage, accumulation) {case}: {name} is {distance:.1e} away"
            )
    for c, (replicas, _, _) in enumerate(cases):  # owners of the same items hold the same, bitwise
        for rank in range(4):
            ours, first = by_rank[rank][c][1][0], by_rank[rank % (4 // replicas)][c][1][0]
            assert all(np.array_equal(a[4], b[4]) for a, b in zip(ours, first, strict=True)), (
                f"{cases[c]}, rank {rank}"
            )


# --- bf16 -----------------------------------------------------------------------------------------


def _bf16(ranks: Ranks, shards: Path, root: Path) -> list[list[float]]:
    """Train, save, resume into a new trainer, save again, and one more step of each."""
    from dist_vasp.training.state import RunState, resume

    found = []
    for stage in range(4):
        tiny = ModelConfig(hidden=9, latent=5, encoder_layers=2, decoder_layers=2)
        first, again = (
            _config(shards, root / f"{stage}-{k}", 1, stage, precision="bf16", model=tiny)
            for k in ("first", "again")
        )
        stream, trainer, saver, folder = _start(first, ranks)
        batch = stream.batch(0)
        losses = [trainer.step(batch).loss for _ in range(5)]
        saver.save(RunState(5))
        saver.finish()
        _, resumed, second, _ = _start(again, ranks)
        assert resume(resumed, stream, folder, ranks) is not None
        second.save(RunState(5))
        second.finish()
        after = [t.step(batch).loss for t in (trainer, resumed)]
        assert after[0] == after[1], f"stage {stage}: {after}"
        found.append(losses)
    return found


@pytest.mark.slow
def test_bf16_trunk_trains_and_resumes_bitwise(shards, tmp_path):
    losses, _ = run_ranks(_bf16, 2, shards, tmp_path, timeout=200)
    assert np.isfinite(losses).all()
    assert (np.diff(losses) < 0).all(), (
        "the loss of one batch, trained on again and again, must fall"
    )
    for stage in (1, 2, 3):
        first, again = (
            tmp_path / f"{stage}-{k}" / "checkpoints" / "step-00000005" for k in ("first", "again")
        )
        names = sorted(p.name for p in first.glob("*.safetensors"))
        assert names == [
            "items-00000-of-00002.safetensors",
            "items-00001-of-00002.safetensors",
            "trunk.safetensors",
        ]
        for name in names:
            assert (first / name).read_bytes() == (again / name).read_bytes(), (
                f"stage {stage}: {name}"
            )


def test_the_earlier_name_of_the_precision_is_read(shards):
    config = _config(shards, shards)
    raw = asdict(config)
    del raw["parallel"]["precision"]
    raw["parallel"]["trunk_dtype"] = "bf16"
    assert from_dict(raw).parallel.wanted_precision == "bf16"
    raw["parallel"]["trunk_dtype"] = "fp16"
    with pytest.raises(ValueError, match=r"trunk_dtype.*fp16"):
        from_dict(raw)
