"""The plan's arithmetic against what a real step counts."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_vasp.config.schema import (
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    Stage,
)
from dist_vasp.data.stream import StreamOptions, TrainStream
from dist_vasp.model.build import measure_size
from dist_vasp.model.registry import kind_of
from dist_vasp.plan.estimate import make_plan, smallest_that_fits
from dist_vasp.plan.rates import Rates
from dist_vasp.plan.terms import CPU, Device, Sizes
from launch import plan as command
from tests.support.make_shards import write_folder
from tests.support.ranks import run_ranks

SIZES = {"hidden": 24, "latent": 8, "encoder_layers": 4, "decoder_layers": 3}


def _config(
    folder: str = "", kind: str = "vasp", optimizer: dict | None = None, **parallel
) -> Config:
    return Config(
        data=DataConfig(shards=str(folder), batch_size=96),
        model=ModelConfig(kind=kind, **SIZES),
        loss=LossConfig(kind=(*kind_of(kind).losses, "focal")[0]),
        optimizer=OptimizerConfig(schedule=[Stage(10, 1e-3)], **(optimizer or {})),
        parallel=ParallelConfig(lanes=48, **parallel),
        run=RunConfig(seed=1),
        device="cpu",
    )


def _folder(path, n_items: int, lengths: list[int]):
    rng = np.random.default_rng(0)
    users = [sorted(rng.choice(n_items, n, replace=False).tolist()) for n in lengths]
    write_folder(path, train=users, n_items=n_items, users_per_shard=50)
    return path


def _moved(ranks, config: Config):
    """(bytes a step of the item layers, of the trunk's engine; parameters of items, of the trunk),
    meaned over an epoch's steps."""
    from dist_vasp.training.step.engine import Trainer
    from dist_vasp.training.step.zero import watch_traffic

    d, p = config.data, config.parallel
    options = StreamOptions(d.batch_size, p.lanes, seed=1, halves=config.halves)
    stream = TrainStream(d.shards, options, ranks.rank, ranks.world_size)
    trainer = Trainer(config, stream.n_items, ranks)
    of_trunk: list[int] = []
    watch_traffic(lambda _, n_bytes: of_trunk.append(n_bytes))
    steps = stream.steps_per_epoch
    for step in range(steps):
        trainer.step(stream.batch(step))
    count = sum(
        sum(g.bytes_moved.values())
        for g in (ranks.world, ranks.partition_group, ranks.replica_group)
    )
    n_item = sum(piece.tensor.numel() for piece in trainer.model.slices())
    assert trainer.trunk is not None
    return count / steps, sum(of_trunk) / steps, n_item, trainer.trunk.n_parameters


@pytest.mark.parametrize(
    ("kind", "world", "replicas", "stage", "options"),
    [
        ("vasp", 2, 1, 1, {}),
        ("vasp", 3, 1, 0, {"accumulation": 2}),
        ("vasp", 4, 2, 2, {"clip_norm": 0.5}),
        ("vasp", 2, 1, 3, {}),
        ("recvae", 3, 1, 0, {}),  # an epoch of its encoder
    ],
)
def test_bytes_moved_are_those_of_a_real_epoch(tmp_path, kind, world, replicas, stage, options):
    """To the byte for the item layers, whose collectives are ours; the engine's send some scalars
    besides and pad."""
    config = _config(
        _folder(tmp_path / "d", 211, [20] * 400),
        kind,
        optimizer=options,
        replicas=replicas,
        zero_stage=stage,
    )
    plan = make_plan(config, Sizes(211, 20.0, 400), world // replicas, replicas, Rates())
    over_replicas, trunk = (
        plan.traffic["replicas: item gradients"],
        plan.traffic["trunk under ZeRO"],
    )
    found = run_ranks(_moved, world, config, replicas=replicas)
    for moved, of_trunk, n_item, n_trunk in found:
        # J, and with it a replica's gradients, is one item more on some ranks; the counts of comm
        # are whole numbers
        exact = plan.traffic_total - trunk - over_replicas
        assert moved - exact == pytest.approx(
            over_replicas, rel=0.02, abs=1 + 0.01 * exact * (options.get("accumulation", 1) > 1)
        )
        # stage 3 keeps what is small gathered: the plan is its upper bound
        assert (
            of_trunk == pytest.approx(trunk, rel=0.02)
            if stage < 3
            else trunk * 2 / 3 <= of_trunk <= trunk
        )
        size = measure_size(config, 211, world // replicas)
        assert n_trunk == size.trunk
        assert n_item == pytest.approx(size.items, rel=0.02)


@pytest.mark.parametrize(
    "catalogues", [(200, 2000), pytest.param((2000, 20000), marks=pytest.mark.slow)]
)
def test_traffic_does_not_grow_with_the_catalogue(tmp_path, catalogues):
    """The same users with histories of the same lengths: not a byte more or less."""
    lengths = np.random.default_rng(3).integers(2, 60, 400).tolist()
    moved = [
        run_ranks(_moved, 2, _config(_folder(tmp_path / str(n), n, lengths)), timeout=600)[0][:2]
        for n in catalogues
    ]
    print(
        f"bytes a step and rank (item layers, trunk) at {catalogues[0]} and "
        f"{catalogues[1]} items: {moved}"
    )
    assert moved[0] == moved[1]
    assert moved[0][0] > 0


def _peak(ranks, config: Config) -> tuple[float, float]:
    """Bytes of weights and moments, and what a step holds beside them at its peak by the
    allocator's own events.

    The least of four steps: the threads of the collectives let go of their buffers a little sooner
    or later.
    """
    from torch.profiler import ProfilerActivity, profile

    from dist_vasp.training.step.engine import Trainer

    d, p = config.data, config.parallel
    options = StreamOptions(d.batch_size, p.lanes, seed=1, halves=config.halves)
    stream = TrainStream(d.shards, options, ranks.rank, ranks.world_size)
    trainer = Trainer(config, stream.n_items, ranks)
    batches = [stream.batch(step) for step in range(6)]
    for batch in batches[:2]:
        trainer.step(batch)
    peaks = []
    for batch in batches[2:]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            trainer.step(batch)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            recorded.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_text())["traceEvents"]
        peaks.append(
            max(
                event["args"]["Total Allocated"]
                for event in events
                if event.get("name") == "[memory]"
            )
        )
    return sum(p.tensor.numel() * 4 for p in trainer.item_pieces(True)), min(peaks)


@pytest.mark.parametrize("state", ["full", "lean"])
def test_memory_is_that_of_live_tensors(tmp_path, state):
    """Weights and moments to the byte, what a step holds for a while within a tenth; 2 ranks, a
    trunk that counts."""
    config = _config(_folder(tmp_path / "d", 900, [20] * 192), optimizer={"item_state": state})
    config = replace(config, model=ModelConfig(hidden=96, latent=48))
    plan = make_plan(config, Sizes(900, 20.0, 192), 2, 1, Rates()).memory
    for_a_while = sum(
        plan[kind]
        for kind in ("trunk activations", "rows of the group", "one block, or trunk gradients")
    )
    for stays, peak in run_ranks(_peak, 2, config):
        vectors = 4 * (
            2 * 450 + 450 + 2 * 2
        )  # lean: second moments, one per vector, and those of biases
        assert stays == pytest.approx(
            plan["item weights"] + plan["item moments"], abs=0 if state == "full" else 4 * vectors
        )
        assert peak == pytest.approx(
            for_a_while, rel=0.1
        )  # some hundred kB come and go with the collectives' threads


def test_every_kind_has_its_parameters():
    nease, flvae = (measure_size(_config(kind=kind), 100) for kind in ("nease", "flvae"))
    assert nease.trunk == 0
    assert nease.items == 100 * 100
    assert flvae.items == 100 * (2 * 24 + 1 + 8 + 1)


def test_smallest_that_fits_fits_and_is_the_smallest():
    config = _config()
    sizes = Sizes(100_000, 50.0)
    one = make_plan(config, sizes, 1, 1, Rates())
    assert one.memory_total > 100e9
    plan = smallest_that_fits(config, sizes, 20e9, Rates(), CPU)
    assert plan is not None
    assert plan.memory_total <= 20e9
    assert make_plan(config, sizes, plan.partitions - 1, 1, Rates()).memory_total > 20e9
    assert smallest_that_fits(config, sizes, 1e6, Rates(), CPU) is None


def test_the_command_prints_and_refuses(tmp_path, capsys):
    command.main(
        [
            "--items",
            "1000000",
            "--ranks",
            "64",
            "--device_memory_gb",
            "80",
            "--json",
            str(tmp_path / "plan.json"),
        ]
    )
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


def _of_netflix(precision: str, device: Device, **optimizer) -> dict[str, float]:
    config = Config(
        data=DataConfig(batch_size=1024),
        model=ModelConfig(hidden=4096, latent=2048),
        optimizer=OptimizerConfig(**optimizer),
        parallel=ParallelConfig(precision=precision),
    )
    return make_plan(config, Sizes(17_769, 122.0), 1, 1, None, device).memory


def test_memory_on_a_gpu_follows_the_precision():
    gpu = Device("cuda")
    exact, half = (_of_netflix(precision, gpu) for precision in ("fp32", "auto"))
    copies = "copies of weights in bf16"
    size = measure_size(Config(model=ModelConfig(hidden=4096, latent=2048)), 17_769)
    padded = 17_792 / 17_769
    assert half["item weights"] == exact["item weights"] == pytest.approx(4 * size.items * padded)
    assert half[copies] == pytest.approx(2 * (size.items * padded + size.trunk))
    assert not exact[copies]
    assert half["trunk activations"] == exact["trunk activations"] / 2
    assert not _of_netflix("auto", CPU)[copies], "auto is fp32 on a CPU"
    # An H100 took 12.3 GB in fp32 before there were copies (docs/gpu.md).
    assert sum(exact.values()) == pytest.approx(12.3e9, rel=0.1)
    small = Device("cuda", 8_000_000_000)  # cuts the output side into more blocks
    block = "one block, or trunk gradients"
    assert _of_netflix("fp32", small)[block] < exact[block]


def test_rates_are_named_and_a_gpu_without_any_has_no_times(tmp_path, capsys):
    def printed(*options: str) -> str:
        command.main(["--items", "17769", *options])
        return capsys.readouterr().out

    assert "rates of a CPU machine" in printed() and "time of a step" in printed()
    h100 = printed("--rates", "h100", "--ranks", "2")
    assert "on cuda in bf16" in h100 and "rates of one H100 in bf16: 790 TFLOP/s" in h100
    assert "communication was not measured" in h100 and "time of a step without overlap, ms" in h100
    assert "51 TFLOP/s" in printed("--rates", "h100", "--parallel.precision", "fp32")
    found = tmp_path / "plan.json"
    without = printed("--device", "cuda", "--json", str(found))
    assert "no time: no rates of this device" in without and "time of a step" not in without
    assert json.loads(found.read_text())["step_seconds"] is None
    rates = tmp_path / "benchmark.json"
    rates.write_text(json.dumps({"rows": [{"rates": {"flops": 3e12, "copy": 1, "gather": 1}}]}))
    assert f"rates of {rates}: 3 TFLOP/s" in printed("--rates", str(rates))
    with pytest.raises(ValueError, match="--rates h100 is for device cuda, but device is cpu"):
        command.main(["--items", "9", "--rates", "h100", "--device", "cpu"])


def test_a_frozen_matrix_has_no_moments_and_apart_it_is_not_read():
    sizes = Sizes(1000, 50.0)
    trained, frozen, apart, drawn = (
        make_plan(Config(model=model, optimizer=optimizer), sizes, 2, 1, Rates())
        for model, optimizer in (
            (ModelConfig(init_from_ease="x"), OptimizerConfig()),
            (ModelConfig(init_from_ease="x", nease="frozen"), OptimizerConfig()),
            (ModelConfig(init_from_ease="x", nease="apart"), OptimizerConfig()),
            (ModelConfig(init_from_ease="x"), OptimizerConfig(nease_decay=1.0)),
        )
    )
    columns = 1000 * 500
    assert trained.memory["item moments"] - frozen.memory["item moments"] == 8 * columns
    assert drawn.memory["item moments"] - trained.memory["item moments"] == 4 * columns
    assert frozen.memory["item weights"] == trained.memory["item weights"]
    assert (
        apart.arithmetic["gathers (bytes)"]
        < frozen.arithmetic["gathers (bytes)"]
        == trained.arithmetic["gathers (bytes)"]
    )


def test_a_plan_names_the_inputs_that_fit(capsys):
    """What `model.neighbours` makes of a million items: the largest power of 2 that fits is named,
    and twice as many do not fit."""
    given = ["--model.kind", "ease", "--items", "1000000", "--ranks", "2"]
    command.main([*given, "--device_memory_gb", "4"])
    out = capsys.readouterr().out
    found = re.search(r"takes 4,000\.0 GB; model\.neighbours (\d+) fits 4 GB a rank", out)
    assert found, out
    sizes = Sizes(1_000_000, 100.0)
    for K, fits in ((int(found[1]), True), (2 * int(found[1]), False)):
        config = Config(model=ModelConfig(kind="ease", neighbours=K))
        assert (make_plan(config, sizes, 2, 1, None).memory_total <= 4e9) is fits
    command.main([*given[:2], "--items", "1000"])
    assert "takes 0.0 GB; --device_memory_gb M says which" in capsys.readouterr().out


def test_a_plan_counts_what_a_support_holds():
    config = Config(model=ModelConfig(kind="ease", neighbours=8))
    memory = make_plan(config, Sizes(1000, 20.0, 300), 2, 1, Rates()).memory
    assert memory["item weights and ids"] == 500 * 8 * (4 + 4)
    assert memory["systems"] == 4 * 500 * 8 * 9
    size = measure_size(Config(model=ModelConfig(kind="nease", neighbours=8)), 1000, 2)
    assert (size.trained, size.frozen, size.supports) == (500 * 8, 500 * 8, 1)
