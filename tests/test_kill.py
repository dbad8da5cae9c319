"""Killed at any moment and resumed, a run ends bitwise as one that was never killed (invariant 4).

`pytest tests/test_kill.py --kills 50 -s` kills more often and prints a line per kill.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.jobs import ROOT, Job, RunFolder, assert_same_run

STEPS_PER_EPOCH = 17
PER_ATTEMPT = 9  # steps that an attempt makes at most before it is killed, unless it waits for an evaluation


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """The demo's data, by the demo's commands."""
    folder = tmp_path_factory.mktemp("demo")
    data, out = folder / "interactions.parquet", folder / "shards"
    for command in (
        f"data_tools.synthesize {data} --users 3000 --items 800 --interactions 120000 --seed 1",
        f"data_tools.shard {data} {out} --val_users 300 --test_users 600 --users_per_shard 200",
    ):
        subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, check=True, capture_output=True)
    return out


def training(shards: Path, run_dir: Path, max_steps: int) -> list[str]:
    return [
        *("--config", str(ROOT / "configs" / "demo.yaml"), "--data.shards", str(shards), "--run.dir", str(run_dir)),
        *("--run.max_steps", str(max_steps), "--run.checkpoint_every_steps", "5"),
        *("--optimizer.schedule", "[{epochs: 2, lr: 1.0e-3}, {epochs: 1000, lr: 2.0e-4}]"),
    ]


class Attempt:
    """One start of the run, seen from outside."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self._before, self.resumed_from = run, run.opened(), run.saved_step()

    def steps(self) -> int:
        """Steps this attempt has made."""
        return max(self.run.step() - self.resumed_from, 0) if self.run.opened() != self._before else 0

    def evaluating(self) -> bool:
        """The last line is the last step of an epoch, and its evaluation is still to come."""
        lines = self.run.lines()
        return self.steps() > 0 and "loss" in lines[-1] and lines[-1]["step"] % STEPS_PER_EPOCH == 0


def choose_moment(chance: random.Random, attempt: Attempt) -> tuple[str, Callable[[], bool], float]:
    """(name, condition to wait for, seconds to wait after it): anywhere, and more often where it hurts."""
    aim, steps = chance.choice(["start", "step", "step", "save", "evaluation"]), chance.randint(0, PER_ATTEMPT)
    if aim == "start":
        return aim, lambda: True, chance.uniform(0, 7)
    hit = {"step": lambda: attempt.steps() >= steps, "save": attempt.run.saving, "evaluation": attempt.evaluating}[aim]
    opened = lambda: attempt.steps() > 0 or (aim == "step" and steps == 0 and attempt.run.opened() != 0)  # noqa: E731
    most = STEPS_PER_EPOCH if aim == "evaluation" else PER_ATTEMPT
    return aim, lambda: (opened() and hit()) or attempt.steps() > most, chance.choice([0.0, chance.uniform(0, 0.15)])


@pytest.mark.slow
def test_kills_leave_no_trace(shards, tmp_path, pytestconfig):
    kills = pytestconfig.getoption("kills")
    max_steps = 12 * kills + 20  # more than the attempts make together
    started = time.monotonic()
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    with Job(*training(shards, whole.path, max_steps), log=tmp_path / "whole.log") as job:
        assert job.end(600) == [0], job.output

    chance, seen = random.Random(kills), Counter[str]()
    for kill in range(kills):
        attempt = Attempt(killed)
        log = tmp_path / f"attempt-{kill}.log"
        with Job(*training(shards, killed.path, max_steps), log=log) as job:
            job.wait_for_ranks()
            aim, moment, delay = choose_moment(chance, attempt)
            job.wait_until(moment, f"the moment ({aim}) of kill {kill}", 0.001)
            time.sleep(delay)
            victim = chance.randrange(2) if kill % 2 == 0 else None
            seen["during a save"] += (saving := killed.saving())
            seen["during an evaluation"] += (evaluating := attempt.evaluating())
            if victim is None:
                job.signal_group(signal.SIGKILL)
            else:
                job.signal_rank(victim, signal.SIGKILL)
            at = time.monotonic()
            assert job.end() != [0], job.output
            gone, steps = time.monotonic() - at, attempt.steps()
            seen["before the first step"] += steps == 0
            seen["of one rank" if victim is not None else "of all"] += 1
            lost = max(killed.step() - killed.saved_step(), 0) if steps else 0
            print(
                f"kill {kill + 1} ({aim}, {'all' if victim is None else f'rank {victim}'}): resumed from {attempt.resumed_from}, "
                f"{steps} steps{', saving' * saving}{', evaluating' * evaluating}; gone after {gone:.1f} s; {lost} steps lost",
                flush=True,
            )
    assert seen["of one rank"] + seen["of all"] == kills
    with Job(*training(shards, killed.path, max_steps), log=tmp_path / "last.log") as job:
        assert job.end(600) == [0], job.output
    assert_same_run(killed, whole)
    print(f"{dict(seen)}; {max_steps} steps; equal, bitwise; {time.monotonic() - started:.0f} s", flush=True)
