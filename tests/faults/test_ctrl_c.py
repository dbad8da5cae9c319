"""Ctrl-C at any moment, under each launcher: one line of ours, status 130, and a run that resumes.

A terminal sends SIGINT to its foreground process group; here the launcher's session is that group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support.jobs import RunFolder, assert_same_run, environment, free_port, hear_signals
from tests.support.make_shards import write_folder
from tests.support.paths import PYTHONPATH, ROOT

BIN = Path(sys.executable).parent
PATIENCE_S = 180
N_ITEMS, STEPS, EPOCH = 60, 36, 9  # of an epoch, and of the run
TRAIN = "--device cpu --model.hidden 8 --model.latent 4 --data.batch_size 16 --data.workers 0 "
TRAIN += "--parallel.lanes 4 --run.keep 100 --optimizer.schedule"
SCHEDULE = f"[{{epochs: {STEPS // EPOCH}, lr: 0.01}}]"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    rows = [
        np.sort(rng.choice(N_ITEMS, rng.integers(4, 15), replace=False)) for _ in range(16 * EPOCH)
    ]
    held_out = [(row[1:], row[:1]) for row in rows[:40]]
    write_folder(path, rows, held_out[:20], held_out[20:], n_items=N_ITEMS)
    return path


def command(launcher: str, shards: Path, run: Path) -> list[str]:
    words = {
        "dist-vasp": [sys.executable, "-m", "dist_vasp", "train", "--ranks", "2"],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2"],
        "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2"],
    }[launcher]
    if launcher == "deepspeed":
        words += ["--master_port", str(free_port()), str(ROOT / "launch" / "train.py")]
    if launcher == "torchrun":
        words += ["--master_port", str(free_port()), "--", str(ROOT / "launch" / "train.py")]
    return [*words, "--shards", str(shards), "--run", str(run), *TRAIN.split(), SCHEDULE]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    env = environment(PYTHONPATH=PYTHONPATH, OMP_NUM_THREADS="1")
    with open(log, "wb") as output:
        return subprocess.Popen(
            words,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ROOT,
            preexec_fn=hear_signals,
        )


def moments(run: RunFolder) -> dict[str, Callable[[], bool]]:
    """When to press Ctrl-C."""
    checkpoints = run.path / "checkpoints"
    started: list[float] = []

    def ranks_import() -> bool:
        if not started and n_ranks(run.path) == 2:
            started.append(time.monotonic())
        return bool(started) and time.monotonic() - started[0] > 0.7

    return {
        "start-up": ranks_import,
        "a step": lambda: run.step() >= 3,
        "an evaluation": lambda: run.step() == EPOCH,
        "the last save": lambda: (
            run.step() == STEPS and (run.saving() or (checkpoints / f"step-{STEPS:08}").exists())
        ),
    }


def n_ranks(run: Path) -> int:
    """How many ranks of this run there are."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(run) in process.cmdline() and "LOCAL_RANK" in process.environ():
                found += 1
    return found


def ours(log: Path) -> list[str]:
    """The lines after a Ctrl-C that the program itself prints."""
    signs = ("error:", "stopped on request")
    return [line for line in log.read_text().splitlines() if line.startswith(signs)]


def is_running(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def press(launcher: str, moment: str, shards: Path, folder: Path) -> tuple[int, RunFolder, Path]:
    """Train, press Ctrl-C at the moment, and return the status, the run and what was printed."""
    run, log = RunFolder(folder / "run"), folder / "log"
    process = start(command(launcher, shards, run.path), log)
    is_time = moments(run)[moment]
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not is_time() and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(PATIENCE_S)
        while is_running(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)  # deepspeed's front end ends before the ranks have saved
    finally:
        if is_running(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, run, log


def finish(shards: Path, run: Path) -> RunFolder:
    """Train to the end, resuming what is there."""
    log = run.with_suffix(".log")
    assert start(command("dist-vasp", shards, run), log).wait(PATIENCE_S) == 0, log.read_text()
    return RunFolder(run)


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> RunFolder:
    """A run that nobody interrupts."""
    return finish(shards, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["dist-vasp", "deepspeed", "torchrun"])
@pytest.mark.parametrize("moment", ["start-up", "a step", "an evaluation", "the last save"])
def test_ctrl_c(launcher, moment, shards, whole, tmp_path):
    status, run, log = press(launcher, moment, shards, tmp_path)
    said, text = ours(log), log.read_text()
    print(f"\n{launcher}, {moment}: status {status}, {said}, {text.count('Traceback')} tracebacks")
    assert len(said) <= 1, text
    sources = ("launch", "dist_vasp")
    assert not any(f'File "{ROOT / folder}' in text for folder in sources), "a traceback of ours"
    assert status != 0 or moment == "the last save"
    if launcher == "dist-vasp":  # the others end in their own ways
        assert "Traceback" not in text
        assert status == 130 or moment == "the last save"
    assert_same_run(finish(shards, run.path), whole)
