"""result.json speaks of the weights beside it, whatever attempts came before, and of the data that
training began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.invoke import Commands

TRAIN = (
    "--data.shards shards --device cpu --data.workers 0 --data.batch_size 32 --parallel.lanes 4 "
    "--model.hidden 8 --model.latent 4 --model.encoder_layers 2 --model.decoder_layers 1"
)


def train(run: str, epochs: int, rate: str = "0.003", more: str = "") -> str:
    return (
        f"python launch/train.py {TRAIN} --run.dir {run} --optimizer.schedule "
        f"'[{{epochs: {epochs}, lr: {rate}}}]' {more}"
    )


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    shutil.copytree(prepared / "shards", folder / "shards")
    return folder


@pytest.fixture(scope="module")
def commands(prepared, folder):
    commands = Commands(folder)
    commands.succeed(
        f"python -m data_tools.shard {prepared}/interactions.parquet others "
        f"--val_users 10 --test_users 20 --seed 5",
    )
    return commands


def check_result(commands: Commands, folder: Path, run: str) -> str:
    """The checkpoint of result.json, whose metrics are those of evaluate.py, to the last digit."""
    result = json.loads((folder / run / "result.json").read_text())
    header = json.loads(
        (folder / run / "checkpoints" / result["checkpoint"] / "checkpoint.json").read_text()
    )
    assert header["header_sha256"] == result["checkpoint_sha256"]
    for split in ("validation", "test"):
        file = folder / f"{run}-{split}.json"
        commands.succeed(
            f"python launch/evaluate.py --run {run} --split {split} --device cpu --json {file.name}"
        )
        assert json.loads(file.read_text()) == {split: result[split]}
        file.unlink()
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    found = max(
        (line for line in lines if line.get("split") == "validation"),
        key=lambda line: line["ndcg@100"],
    )
    assert (
        found["ndcg@100"] == result["validation"]["ndcg@100"]
        and result["checkpoint"] == f"best-{found['step']:08d}"
    )
    return result["checkpoint"]


def test_a_diverged_attempt_leaves_nothing(commands, folder):
    done = commands.run(train("diverged", 5, "900.0", "--data.batch_size 128"))
    assert done.status == 1 and "the last good checkpoint is none" in done.err
    assert list((folder / "diverged" / "checkpoints").iterdir()) == []
    commands.succeed(train("diverged", 1, "0.003", "--data.batch_size 128"))
    assert check_result(commands, folder, "diverged") == "best-00000001"


@pytest.mark.slow
def test_a_finished_run_that_is_extended_and_killed_has_no_result(commands, folder):
    commands.succeed(train("extended", 1))
    check_result(commands, folder, "extended")
    commands.succeed(train("extended", 1))  # nothing to do: evaluated again
    check_result(commands, folder, "extended")
    kill = (
        "import os; from dist_vasp.training.run_dir import RunDir; RunDir.record = "
        "lambda *_: os._exit(9)"
    )
    words = train("extended", 3).split(maxsplit=2)[2]
    done = commands.run(
        f"{kill}; import shlex; from launch.train import main; main(shlex.split({words!r}))"
    )
    assert done.status == 9, done.err
    assert not (folder / "extended" / "result.json").exists()
    commands.succeed(train("extended", 3))
    check_result(commands, folder, "extended")


def test_another_rate_after_a_kill_gets_its_own_best(commands, folder):
    """Killed when the best checkpoint of the first epoch is whole, and no step checkpoint is."""
    kill = (
        "import os; from dist_vasp.training.state import Saver; Saver.save = lambda "
        "self, state: (self.finish(), os._exit(9))"
    )
    words = train("stale", 2, "0.02").split(maxsplit=2)[2]
    done = commands.run(
        f"{kill}; import shlex; from launch.train import main; main(shlex.split({words!r}))"
    )
    assert done.status == 9, done.err
    best = folder / "stale" / "checkpoints" / "best" / "trunk.safetensors"
    abandoned, name = best.read_bytes(), best.parent.resolve().name
    commands.succeed(train("stale", 1, "0.0003"))
    assert check_result(commands, folder, "stale") == name, "of the same step"
    assert best.read_bytes() != abandoned


@pytest.mark.parametrize("what", ["folder", "shard"])
def test_shards_that_are_replaced_meanwhile(commands, folder, what):
    run = f"replaced-{what}"
    shutil.copytree(folder / "shards", folder / "kept", dirs_exist_ok=True)
    swap = "import shutil; from dist_vasp.training import run as t; check = t.check_same_shards; "
    if what == "folder":
        swap += (
            "t.check_same_shards = lambda *a: (shutil.copytree('others', 'shards', "
            "dirs_exist_ok=True), check(*a))"
        )
    else:
        swap += (
            "t.check_same_shards = lambda *a: "
            "(shutil.copy('others/validation-000000.tar', "
            "'shards/validation-000000.tar'), check(*a))"
        )
    words = train(run, 1).split(maxsplit=2)[2]
    try:
        done = commands.run(
            f"{swap}; import shlex; from launch.train import main; main(shlex.split({words!r}))"
        )
    finally:
        shutil.rmtree(folder / "shards")
        shutil.move(folder / "kept", folder / "shards")
    reason = (
        "was replaced while the run was going on"
        if what == "folder"
        else r"validation-000000.tar has"
    )
    assert (
        done.status == 2 and reason in done.err and "the same command resumes there" in done.err
    ), done.err
    assert not (folder / run / "result.json").exists()
    commands.succeed(train(run, 1))
    check_result(commands, folder, run)
