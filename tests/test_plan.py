"""The plan's arithmetic against what a real step counts."""

from __future__ import annotations

import numpy as np
import pytest

from dist_vasp.config import Config, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, Stage
from dist_vasp.data.stream import TrainStream
from dist_vasp.plan import Rates, Sizes, make_plan, smallest_that_fits
from launch import plan as command
from tests.make_shards import write_folder
from tests.ranks import run_ranks

SIZES = {"hidden": 24, "latent": 8, "encoder_layers": 4, "decoder_layers": 3}


def _config(folder: str = "", replicas: int = 1, kind: str = "vasp") -> Config:
    return Config(
        data=DataConfig(shards=str(folder), batch_size=96),
        model=ModelConfig(kind=kind, **SIZES),
        optimizer=OptimizerConfig(schedule=[Stage(10, 1e-3)]),
        parallel=ParallelConfig(lanes=48, replicas=replicas),
        run=RunConfig(seed=1),
        device="cpu",
    )


def _folder(path, n_items: int, per_user: int = 20):
    rng = np.random.default_rng(0)
    users = [sorted(rng.choice(n_items, per_user, replace=False).tolist()) for _ in range(400)]
    write_folder(path, train=users, n_items=n_items, users_per_shard=50)
    return path


def _moved(ranks, config: Config, steps: int = 4):
    from dist_vasp.training.engine import Trainer

    stream = TrainStream(config.data.shards, 96, 48, 1, True, ranks.rank, ranks.world_size)
    trainer = Trainer(config, stream.n_items, ranks)
    for step in range(steps):
        trainer.step(stream.batch(step))
    count = sum(sum(g.bytes_moved.values()) for g in (ranks.world, ranks.partition_group, ranks.replica_group))
    n_item = sum(piece.tensor.numel() for piece in trainer.model.slices())
    return count / steps, n_item, trainer.trunk.n_parameters, stream.steps_per_epoch


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 2)])
def test_traffic_and_parameters_are_those_of_a_real_step(tmp_path, world, replicas):
    config = _config(_folder(tmp_path / "d", 211), replicas)
    measured = run_ranks(_moved, world, config, replicas=replicas)
    plan = make_plan(config, Sizes(211, 20.0), world // replicas, replicas, Rates())
    over_replicas = plan.traffic["replicas: item gradients"]
    of_rows = plan.traffic_total - plan.traffic["trunk under ZeRO"] - over_replicas
    users_a_step = 400 / np.ceil(400 / 96)  # users are spread evenly over the steps of an epoch
    for moved, n_item, n_trunk, _ in measured:
        assert moved == pytest.approx(of_rows * users_a_step / 96 + over_replicas, rel=0.1)  # small batches pad much
        assert n_trunk == config.model.trunk_parameters()
        assert n_item == pytest.approx(config.model.item_parameters(211, 211 / (world // replicas)), rel=0.02)


def test_traffic_does_not_grow_with_the_catalogue(tmp_path):
    """Acceptance: bytes moved at I 2,000 and at I 20,000 with the same lengths of histories."""
    moved = [run_ranks(_moved, 2, _config(_folder(tmp_path / str(n), n)))[0][0] for n in (200, 2000)]
    assert moved[1] == pytest.approx(moved[0], rel=0.01)


def test_every_kind_has_its_parameters():
    assert _config(kind="nease").model.trunk_parameters() == 0
    assert _config(kind="nease").model.item_parameters(100, 100) == 100 * 100
    assert _config(kind="flvae").model.item_parameters(100, 100) == 100 * (2 * 24 + 1 + 8 + 1)


def test_smallest_that_fits_fits_and_is_the_smallest():
    config = _config()
    sizes = Sizes(100_000, 50.0)
    one = make_plan(config, sizes, 1, 1, Rates())
    assert one.memory_total > 100e9
    plan = smallest_that_fits(config, sizes, 20e9, Rates(), "cpu")
    assert plan is not None
    assert plan.memory_total <= 20e9
    assert make_plan(config, sizes, plan.partitions - 1, 1, Rates()).memory_total > 20e9
    assert smallest_that_fits(config, sizes, 1e6, Rates(), "cpu") is None


def test_the_command_prints_and_refuses(tmp_path, capsys):
    command.main(["--items", "1000000", "--ranks", "64", "--device_memory_gb", "80", "--json", str(tmp_path / "plan.json")])
    out = capsys.readouterr().out
    assert "smallest partitioning that fits 80 GB" in out
    assert (tmp_path / "plan.json").is_file()
    for argv, text in (
        (["--ranks", "0", "--items", "5"], "--ranks is 0"),
        ([], "--items"),
        (["--items", "9", "--rates", "nope"], "--rates nope"),
    ):
        with pytest.raises(ValueError, match=text):
            command.main(argv)
