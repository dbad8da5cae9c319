"""The benchmark as a user meets it: two tiny jobs, what the JSON, the table and the plot hold, and
one sentence per mistake."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from dist_vasp.commands import benchmark as command
from dist_vasp.commands.plan import _sizes
from dist_vasp.measure.step import LABELS
from dist_vasp.parallel import local_ranks
from dist_vasp.plan.estimate import make_plan
from dist_vasp.plan.rates import Rates
from tests.support.invoke import forked_local_ranks
from tests.support.make_shards import write_folder

N_ITEMS, PER_RANK = 90, 24
SIZES = [
    "--model.hidden=16",
    "--model.latent=8",
    "--model.encoder_layers=2",
    "--model.decoder_layers=1",
    "--parallel.lanes=4",
]
SMALL = [
    *SIZES,
    "--data.batch_size=48",
    "--data.workers=1",
    "--device=cpu",
    "--steps=3",
    "--rounds=1",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("shards")
    write_folder(
        path,
        [random.choice(N_ITEMS, 12, replace=False) for _ in range(96)],
        n_items=N_ITEMS,
        users_per_shard=16,
    )
    return path


@pytest.fixture(scope="module")
def written(shards, tmp_path_factory) -> Path:
    """The folder of a benchmark on 1 and 2 ranks."""
    folder = tmp_path_factory.mktemp("benchmark") / "not there yet"
    weak = ["--ranks=1,2", "--modes=weak", f"--users_per_rank={PER_RANK}", "--threads=1", "--floor"]
    with mock.patch.object(local_ranks, "subprocess", forked_local_ranks()):
        command.main([f"--data.shards={shards}", f"--output={folder}", *weak, *SMALL])
    return folder


@pytest.mark.slow
def test_every_row_says_where_the_step_went(written):
    result = json.loads((written / "benchmark.json").read_text())
    cores = len(os.sched_getaffinity(0))
    assert (result["threads_per_rank"], result["cores"]) == (1, cores)
    assert [(r["mode"], r["ranks"], r["users_per_step"]) for r in result["rows"]] == [
        ("weak", 1, 24),
        ("weak", 2, 48),
    ]
    for row in result["rows"]:
        assert set(row["parts"]) == set(LABELS)
        assert all(seconds >= -1e-6 for seconds in row["parts"].values()), row["parts"]
        assert {label for label, seconds in row["parts"].items() if seconds > 0} >= set(LABELS) - {
            "communication"
        }
        assert row["cores_per_rank"] == min(1, cores / row["ranks"])
        assert 50e6 < row["peak_memory"] < 3e9
        assert set(row["rates"]) == {"flops", "copy", "gather"} and min(row["rates"].values()) > 0
        assert row["floor_seconds"] == pytest.approx(sum(row["floor"].values()))
        useful = row["floor"]["matrix products"] * row["rates"]["flops"] / row["step_seconds"]
        assert row["useful_gflops_per_second"] == pytest.approx(useful / 1e9)
    one, two = result["rows"]
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["users_per_second"] / one["users_per_second"] / 2)
    assert two["parts"]["communication"] > 0


@pytest.mark.slow
def test_bytes_moved_are_those_of_the_plan(written, shards):
    one, two = json.loads((written / "benchmark.json").read_text())["rows"]
    assert one["bytes_moved"] == 0 == sum(one["bytes_by_collective"].values())
    assert two["bytes_moved"] == sum(two["bytes_by_collective"].values())
    config, _ = command.parse(
        command.make_parser("benchmark.py", ""), [f"--data.shards={shards}", *SMALL[:-2]]
    )
    plan = make_plan(config, _sizes(str(shards), 0, 0), 2, 1, Rates())
    assert two["bytes_moved"] == pytest.approx(plan.traffic_total, rel=0.02)


@pytest.mark.slow
def test_table_and_plot(written):
    text = (written / "benchmark.md").read_text()
    lines = text.splitlines()
    assert lines[0].startswith("1 threads a rank on ")
    for label in (
        *LABELS,
        "users/s",
        "efficiency",
        "MB moved",
        "peak GB",
        "GFLOP/s useful",
        "cores a rank",
        "step / floor",
    ):
        assert f" {label} " in text
    widths = [line.count("|") for line in lines if line.startswith("|")]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 2, (
        "two tables, each of one width"
    )
    assert (written / "scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in written.iterdir()) == [
        "benchmark.json",
        "benchmark.md",
        "scaling.png",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--ranks=0"], "--ranks is '0', expected numbers of ranks such as 1,2,4"),
        (["--ranks=1,x"], "--ranks is '1,x'"),
        (["--modes=sideways"], "--modes is 'sideways', expected weak, strong"),
        (["--output="], "--output is not set"),
        (["--data.shards="], "data.shards is not set"),
        (["--steps=0"], "--steps is 0, expected at least 1"),
        (["--rounds=0"], "--rounds is 0, expected at least 1"),
        (["--threads=-1"], "--threads is -1"),
        (["--users_per_rank=-1"], "--users_per_rank is -1"),
        (["--data.shards=nowhere"], "nowhere"),
        pytest.param(
            ["--ranks=3", "--modes=strong"], "3 ranks do not divide it", marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes_are_one_sentence(shards, tmp_path, wrong, message):
    given = [
        f"--data.shards={shards}",
        f"--output={tmp_path / 'out'}",
        "--ranks=1",
        "--threads=1",
        *SMALL,
    ]
    with pytest.raises(ValueError) as caught:
        command.main([*given, *wrong])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*.json"))
