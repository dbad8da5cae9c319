"""The program dist-vasp: its subcommands, and the ranks that it starts itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_vasp.parallel import local_ranks
from dist_vasp.parallel.local_ranks import LocalRanks
from tests.support.invoke import run_words
from tests.support.jobs import environment
from tests.support.make_shards import write_folder
from tests.support.paths import PYTHONPATH, ROOT

N_ITEMS = 30
PATIENCE_S = 120
TRAIN = "--device cpu --model.hidden 8 --model.latent 4 --data.batch_size 16 --data.workers 0 "
TRAIN += "--parallel.lanes 4 --optimizer.schedule"
FOREVER = "[{epochs: 100000, lr: 0.01}]"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    rows = [np.sort(rng.choice(N_ITEMS, rng.integers(4, 15), replace=False)) for _ in range(60)]
    held_out = [(row[1:], row[:1]) for row in rows[40:]]
    write_folder(path, rows[:40], held_out[:10], held_out[10:], n_items=N_ITEMS)
    return path


def start(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dist_vasp", *map(str, arguments)]
    env = environment(PYTHONPATH=PYTHONPATH, **variables)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def finish(*arguments: str | Path, **variables: str) -> tuple[int, str, str]:
    process = start(*arguments, **variables)
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def train(shards: Path, run: Path, schedule: str) -> list[str]:
    data = ["train", "--ranks", "2", "--data.shards", str(shards), "--run.dir", str(run)]
    return [*data, *TRAIN.split(), schedule]


def test_every_command_is_a_subcommand():
    status, out, _ = finish("--help")
    listed = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__"}
    assert status == 0
    assert listed == scripts | {"shard", "verify", "synthesize", "configs", "completion", "demo"}
    for name in scripts:
        assert (ROOT / "dist_vasp" / "commands" / f"{name}.py").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "trian is not a command, did you mean train?; `dist-vasp --help` lists them"),
        ("train --ranks 0", "--ranks: '0' is not an integer of at least 1; `--help-all` lists all"),
        ("verify", "the following arguments are required"),
        ("train --ranks 2 --device cpu", "data.shards is not set; pass --data.shards"),
        ("evaluate --run nowhere", "nowhere"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(line, message):
    done = run_words(["python", "-m", "dist_vasp", *line.split()], ROOT)
    err = done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_ranks_that_a_launcher_contradicts_are_refused():
    words = ["python", "-m", "dist_vasp", "train", "--ranks", "4"]
    done = run_words(words, ROOT, {"WORLD_SIZE": "1", "RANK": "0"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: --ranks is 4, but a launcher has set WORLD_SIZE=1; leave out --ranks, or unset "
        "WORLD_SIZE\n"
    )


def test_train_starts_its_ranks_and_only_rank_0_prints(shards, tmp_path):
    status, out, err = finish(*train(shards, tmp_path / "run", "[{epochs: 2, lr: 0.01}]"))
    assert (status, err) == (0, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["world_size"] == 2
    assert out.count("seconds_training") == 0 and out.count("s of training, checkpoint") == 1
    assert "[INFO]" not in out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_ranks_which_save(shards, tmp_path, number):
    run = tmp_path / "run"
    process = start(*train(shards, run, FOREVER))
    try:
        end = time.monotonic() + PATIENCE_S
        while not _has_steps(run) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 0), err
    assert err == "" or number == signal.SIGTERM
    assert "stopped on request after step" in out
    assert any((run / "checkpoints").iterdir())


def _has_steps(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def test_a_rank_that_fails_ends_the_others(tmp_path, monkeypatch):
    """A rank that is killed: the status is 128 + the signal, and nothing is left running."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(local_ranks, "_GRACE_S", 1.0)
    with open(tmp_path / "log", "wb") as log:
        command = ["doctor", "--round_trip", str(tmp_path / "result"), "--device", "cpu"]
        with LocalRanks(command, 2, [log] * 2) as ranks:
            assert ranks.wait(0.01) is None
            os.kill(ranks.pids[1], signal.SIGKILL)
            assert ranks.wait(PATIENCE_S) == 128 + signal.SIGKILL
            assert ranks.statuses[1] == 128 + signal.SIGKILL and ranks.statuses[0] != 0
    for pid in ranks.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
