"""The doctor finds what would stop a job, says what to do, and has nothing to say against what is
sound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_vasp.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, RunConfig
from dist_vasp.doctor import job, machine
from dist_vasp.doctor.findings import error, ok, table, warning
from dist_vasp.doctor.job import check_job
from dist_vasp.doctor.machine import available_memory, check_machine, cpu_quota
from dist_vasp.doctor.roundtrip import judge, measure
from tests.support.invoke import fails, run_script
from tests.support.make_shards import write_folder
from tests.support.ranks import run_ranks
from tests.support.sizes import sizes

N_ITEMS = 60


@pytest.fixture
def shards(tmp_path) -> Path:
    random = np.random.default_rng(0)
    rows = [np.sort(random.choice(N_ITEMS, 8, replace=False)) for _ in range(60)]
    write_folder(
        tmp_path / "shards",
        rows,
        [(r[:4], r[4:]) for r in rows[:9]],
        [(r[:4], r[4:]) for r in rows[:9]],
        n_items=N_ITEMS,
    )
    return tmp_path / "shards"


def _config(shards: Path, **more) -> Config:
    small = ModelConfig(hidden=8, latent=4, encoder_layers=2, decoder_layers=2)
    return Config(
        data=DataConfig(shards=str(shards)),
        model=small,
        run=RunConfig(dir=str(shards.parent / "run")),
        **more,
    )


def _check(config: Config, ranks: int = 2, checksums: bool = False) -> dict:
    return {
        f.check: f for f in check_job(config, ranks, ranks, checksums, lambda done, total: None)
    }


def test_a_sound_job(shards):
    found = _check(_config(shards), checksums=True)
    assert list(found) == ["shards", "layout", "plan", "run.dir"]
    assert {f.level for f in found.values()} == {"ok"} and not any(f.do for f in found.values())
    assert "every byte verified" in found["shards"].text


def test_a_damaged_shard_needs_the_checksums_a_missing_one_does_not(shards):
    tar = next(shards.glob("train-*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(bytes(data))
    assert _check(_config(shards))["shards"].level == "ok"
    found = _check(_config(shards), checksums=True)
    assert (
        found["shards"].level == "error"
        and tar.name in found["shards"].text
        and "plan" not in found
    )
    tar.unlink()
    assert f"{tar.name} has no bytes" in _check(_config(shards))["shards"].text
    assert _check(_config(shards.parent))["shards"].level == "error"


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        (ParallelConfig(partitions=3), "parallel.partitions"),
        (ParallelConfig(lanes=3), "parallel.lanes is 3"),
        (ParallelConfig(replicas=4), "parallel.replicas"),
    ],
)
def test_a_layout_that_does_not_fit_the_ranks(shards, parallel, said):
    found = _check(_config(shards, parallel=parallel))["layout"]
    assert found.level == "error" and said in found.text and found.do


def test_a_plan_that_does_not_fit_names_one_that_does(shards, monkeypatch):
    config = _config(shards)
    big = replace(config, model=replace(config.model, hidden=4096))
    monkeypatch.setattr(job, "available_memory", lambda: (236 * 10**7, True))
    found = _check(big)["plan"]
    assert (
        found.level == "error"
        and "1.18 GB free here for each rank" in found.text
        and "use 4 partitions" in found.do
    )
    monkeypatch.setattr(job, "available_memory", lambda: (10**9, True))
    assert "no partitioning fits" in _check(big)["plan"].do


def test_a_full_disk_and_a_folder_that_cannot_be_written(shards, monkeypatch):
    usage = type("Usage", (), {"free": 10, "total": 10})
    monkeypatch.setattr(job.shutil, "disk_usage", lambda path: usage)
    found = _check(_config(shards))["run.dir"]
    assert found.level == "error" and "not even one fits" in found.text
    usage.free = 100_000
    assert _check(_config(shards))["run.dir"].level == "warning"
    monkeypatch.undo()
    file = shards.parent / "file"
    file.touch()
    found = _check(replace(_config(shards), run=RunConfig(dir=str(file / "run"))))["run.dir"]
    assert found.level == "error" and "cannot be written" in found.text


def test_a_missing_tracking_library(shards, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    found = _check(
        replace(_config(shards), run=RunConfig(dir=str(shards.parent / "r"), wandb="films"))
    )["tracking"]
    assert found.level == "error" and "pip install wandb" in found.do


# --- the machine ----------------------------------------------------------------------------------


def test_this_machine_has_no_errors():
    found = {f.check: f for f in check_machine("auto")}
    assert {"versions", "devices", "compiler", "cores", "memory"} <= set(found)
    assert found["versions"].level != "error" and found["compiler"].level == "ok"


def test_a_missing_library_another_version_and_no_compiler(monkeypatch, tmp_path):
    wanted = ["torch==1.0", "no_such_library>=1", 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(machine.metadata, "requires", lambda name: wanted)
    found = next(machine._versions())
    assert (
        found.level == "error"
        and "missing: no_such_library" in found.text
        and "pytest" not in found.text
    )
    wanted.remove("no_such_library>=1")
    assert next(machine._versions()).level == "warning"
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "does not compile" in machine._compiler(False).text
    assert (machine._compiler(False).level, machine._compiler(True).level) == ("warning", "error")


def test_limits_of_control_groups(tmp_path, monkeypatch):
    inner = tmp_path / "job"
    inner.mkdir()
    monkeypatch.setattr(machine, "_groups", lambda: [inner, tmp_path])
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 700\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert available_memory() == (1700, True)
    assert cpu_quota() == 0.5 and machine._cores().level == "warning"
    assert machine._memory().level == "error"


def test_round_trip_between_ranks():
    found = run_ranks(measure, 2)
    assert all(f["right"] and f["ranks"] == 2 and f["bytes_per_second"] > 0 for f in found)
    assert "gloo between 2 ranks" in judge(found[0]).text
    assert judge({**found[0], "right": False}).level == "error"
    assert judge({**found[0], "bytes_per_second": 1e6}).level == "warning"
    assert judge({**found[0], "bytes_per_second": 1e9}).level == "ok"


# --- the command ----------------------------------------------------------------------------------


def test_the_verdict_of_a_table():
    assert (
        table([ok("a", "fine")])
        == "ok       a  fine\nno errors, no warnings: a job can be submitted"
    )
    said = table([warning("a", "slow", "wait"), error("long", "broken", "mend")])
    assert "-> wait" in said and said.endswith(
        "1 error, 1 warning: fix the errors before a job is submitted"
    )


@pytest.mark.slow
def test_command_alone(shards, tmp_path):
    done = run_script(
        "doctor",
        "--device",
        "cpu",
        "--shards",
        shards,
        "--run.dir",
        tmp_path / "r",
        "--json",
        *SMALL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f["check"]: f for f in json.loads(done.stdout)}
    assert found["round trip"]["level"] == "ok" or "GB/s" in found["round trip"]["text"]
    assert found["plan"]["level"] == "ok" and not (tmp_path / "r").exists()


def test_command_under_the_launcher_and_with_an_error(shards, tmp_path):
    shutil_target = next(shards.glob("test-*.tar"))
    shutil_target.unlink()
    done = run_script(
        "doctor",
        "--device",
        "cpu",
        "--shards",
        shards,
        "--run.dir",
        tmp_path / "r",
        "--json",
        tmp_path / "f.json",
        *SMALL,
        ranks=2,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "gloo between 2 ranks" in done.stdout and "1 error" in done.stdout
    assert [
        f["check"] for f in json.loads((tmp_path / "f.json").read_text()) if f["level"] == "error"
    ] == ["shards"]


def test_command_with_wrong_options(tmp_path):
    assert "--json" in fails("doctor", "--json", tmp_path / "no" / "f.json")
    assert "model.hiden" in fails("doctor", "--model.hiden", "3")


SMALL = sizes()
