"""Stopped or killed at any moment and resumed, a run ends bitwise as one that was left alone
(invariant 4).

Two ranks of two threads with two loader workers each. Every round asks for some more steps, sends a
signal to a rank, a loader worker, the launcher or all of them at a random moment, resumes, and
evaluates what was delivered: the metrics of result.json are those of the weights beside it, to the
last digit. Copies of the run are resumed with another schedule, and with one that diverges.

Every tenth round and the run left alone are processes of their own; the others are forks of one
that has loaded the libraries (forks.py). `pytest tests/faults/test_kill.py --kills 100 -s` makes
100 rounds and prints a line for each.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from dist_vasp.signals import INTERRUPTED
from tests.support.forks import Forks
from tests.support.invoke import Commands
from tests.support.jobs import Job, RunFolder, assert_same_run
from tests.support.make_shards import write_folder
from tests.support.sizes import sizes

STEPS_PER_EPOCH, BATCH, N_ITEMS = 7, 48, 211
PER_ROUND = 2 * STEPS_PER_EPOCH  # steps that a round asks for
RATE, OTHER_RATE, ABSURD_RATE = 1e-3, 3e-3, 900.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
TARGETS = ("rank 0", "rank 1", "worker", "launcher", "group")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder, chance = tmp_path_factory.mktemp("kill") / "shards", np.random.default_rng(0)

    def users(n: int) -> list[np.ndarray]:
        """Each likes a range of the catalogue, so that there is something to learn."""
        return [
            np.unique((chance.integers(N_ITEMS) + chance.geometric(0.05, 14)) % N_ITEMS)
            for _ in range(n)
        ]

    held_out = [(row[1:], row[:1]) for row in map(chance.permutation, users(160))]
    write_folder(
        folder, users(STEPS_PER_EPOCH * BATCH), held_out[:80], held_out[80:], n_items=N_ITEMS
    )
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Commands:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    return commands


VASP = ()
RECVAE = (  # its encoder trains for two epochs, then its decoder for one
    *("--model.kind", "recvae", "--loss.kind", "multinomial", "--loss.kl_weight", "0.005"),
    *("--data.input_dropout", "0.5", "--model.recvae_encoder_epochs", "2"),
)


def training(
    shards: Path,
    run_dir: Path,
    max_steps: int,
    rate: float = RATE,
    model: tuple[str, ...] = VASP,
) -> list[str]:
    return [
        *model,
        *(
            "--data.shards",
            str(shards),
            "--run.dir",
            str(run_dir),
            "--device",
            "cpu",
            "--data.workers",
            "2",
            "--parallel.compile",
            "never",
        ),
        *(
            "--data.batch_size",
            str(BATCH),
            "--parallel.lanes",
            "8",
            "--run.max_steps",
            str(max_steps),
        ),
        *sizes(33, 17, 3, 2),
        *(
            "--run.checkpoint_every_steps",
            "5",
            "--optimizer.schedule",
            f"[{{epochs: 1000000, lr: {rate}}}]",
        ),
    ]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as forks:
        yield forks


def start(arguments: list[str], log: Path, forks: Forks | None) -> Job:
    return Job(
        *arguments,
        log=log,
        variables={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
        forks=forks,
    )


def check_delivered(run: RunFolder, commands: Commands, scratch: Path) -> None:
    """What result.json says of the best checkpoint is what evaluate.py finds for it, and the best
    line of metrics.jsonl."""
    result = json.loads((run.path / "result.json").read_text())
    assert result["checkpoint"] == (run.checkpoints / "best").resolve().name
    for split in ("validation", "test"):
        commands.succeed(
            f"python launch/evaluate.py --device cpu --run {run.path} --split "
            f"{split} --json {scratch}"
        )
        assert json.loads(scratch.read_text()) == {split: result[split]}
        scratch.unlink()
    told = [line for line in run.lines() if line.get("split") == "validation"]
    best = max(told, key=lambda line: line["ndcg@100"])
    assert {name: best[name] for name in result["validation"]} == result["validation"]
    assert result["checkpoint"] == f"best-{best['step']:08d}"


class Attempt:
    """One start of the run, seen from outside."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self._before, self.resumed_from = run, run.opened(), run.saved_step()

    def steps(self) -> int:
        """Steps this attempt has made."""
        return (
            max(self.run.step() - self.resumed_from, 0) if self.run.opened() != self._before else 0
        )

    def evaluating(self) -> bool:
        """The last line is the last step of an epoch, and its evaluation is still to come."""
        lines = self.run.lines()
        return self.steps() > 0 and "loss" in lines[-1] and lines[-1]["step"] % STEPS_PER_EPOCH == 0


@dataclass
class Disturbance:
    """A signal, whom it is sent to, and when."""

    number: signal.Signals
    target: str
    aim: str
    steps: int
    delay: float

    @classmethod
    def choose(cls, chance: random.Random) -> Disturbance:
        """Anywhere, and more often where it hurts."""
        aim = chance.choice(["start", "step", "step", "save", "evaluation", "end"])
        delay = (
            chance.uniform(0, 7)
            if aim == "start"
            else chance.choice([0.0, chance.uniform(0, 0.15)])
        )
        return cls(
            chance.choice(SIGNALS),
            chance.choice(TARGETS),
            aim,
            chance.randint(0, PER_ROUND - 1),
            delay,
        )

    def moment(self, attempt: Attempt, last: int) -> Callable[[], bool]:
        """The condition to wait for."""
        if self.aim == "start":
            return lambda: True
        hit = {
            "step": lambda: attempt.steps() >= self.steps,
            "save": attempt.run.saving,
            "evaluation": attempt.evaluating,
            "end": lambda: attempt.run.step() >= last,
        }[self.aim]
        return lambda: (attempt.steps() > 0 and hit()) or attempt.run.step() >= last

    def send(self, job: Job) -> None:
        try:
            if self.target == "group":
                job.signal_group(self.number)
            elif self.target == "launcher":
                os.kill(job.group, self.number)
            elif self.target == "worker":
                rank = psutil.Process(job.ranks()[0])
                workers = [child.pid for child in rank.children()]
                if workers:
                    os.kill(workers[0], self.number)
            else:
                job.signal_rank(int(self.target[-1]), self.number)
        except (ProcessLookupError, IndexError, psutil.Error):
            pass  # the job ended first

    def check(self, statuses: list[int], job: Job, attempt: Attempt, last: int) -> None:
        """What docs/faults.md promises of status, output, and what is lost."""
        assert "Traceback" not in job.output or attempt.steps() == 0, job.output
        stopped = re.search(r"stopped on request after step (\d+)", job.output)
        if stopped:
            assert attempt.run.saved_step() == attempt.run.step() == int(stopped[1]), (
                "nothing is lost"
            )
        if self.target == "worker":
            assert statuses == [0], job.output
        if self.number != signal.SIGKILL and self.target.startswith("rank") and attempt.steps() > 0:
            expected = (0, INTERRUPTED) if self.number == signal.SIGINT else (0,)  # 0: at its end
            assert len(statuses) == 1 and statuses[0] in expected, job.output
        if (
            self.number != signal.SIGKILL
            and self.target != "worker"
            and attempt.steps() > 0
            and attempt.run.step() < last
        ):
            assert stopped, job.output


@pytest.mark.slow
@pytest.mark.parametrize("model", [VASP, RECVAE], ids=["vasp", "recvae"])
def test_signals_leave_no_trace(shards, commands, forks, tmp_path, pytestconfig, model):
    rounds = pytestconfig.getoption("kills")
    chance, seen, started = random.Random(rounds), Counter[str](), time.monotonic()
    whole, disturbed = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "disturbed")
    scratch = tmp_path / "evaluated.json"
    last = 0
    for turn in range(rounds):
        last += PER_ROUND
        arguments, attempt, what = (
            training(shards, disturbed.path, last, model=model),
            Attempt(disturbed),
            Disturbance.choose(chance),
        )
        with start(
            arguments, tmp_path / f"round-{turn}.log", None if turn % 10 == 9 else forks
        ) as job:
            job.wait_for_ranks()
            job.wait_until(what.moment(attempt, last), f"the moment of {what}", 0.001, ended=True)
            time.sleep(what.delay)
            saving, evaluating = disturbed.saving(), attempt.evaluating()
            what.send(job)
            at = time.monotonic()
            statuses = job.end()
            what.check(statuses, job, attempt, last)
            gone = time.monotonic() - at
        for name, value in (
            (what.number.name, 1),
            (what.target, 1),
            ("during a save", saving),
            ("in evaluation", evaluating),
        ):
            seen[name] += value
        if (disturbed.path / "result.json").exists():
            check_delivered(disturbed, commands, scratch)
            seen["results checked after a signal"] += 1
        if model is VASP and turn % 5 == 1:
            check_another_schedule(disturbed, shards, commands, forks, tmp_path / "side", last)
        if model is VASP and turn % 5 == 3:
            check_divergence(disturbed, shards, commands, forks, tmp_path / "side", last)
        steps = attempt.steps()
        with start(arguments, tmp_path / f"again-{turn}.log", forks) as job:
            assert job.end(600) == [0], job.output
        check_delivered(disturbed, commands, scratch)
        print(
            f"round {turn + 1}: {what.number.name} to {what.target} ({what.aim}), "
            f"{steps} steps{', saving' * saving}"
            f"{', evaluating' * evaluating}; status {statuses} after {gone:.1f} s; metrics equal",
            flush=True,
        )
    alone = training(shards, whole.path, last, model=model)
    with start(alone, tmp_path / "whole.log", None) as job:
        assert job.end(900) == [0], job.output
    assert_same_run(disturbed, whole)
    result, expected = (
        json.loads((run.path / "result.json").read_text()) for run in (disturbed, whole)
    )
    clocked = {
        "seconds_training": 0,
        "checkpoint_sha256": "",
    }  # the header of a checkpoint holds the seconds
    assert result | clocked == expected | clocked
    print(
        f"{dict(seen)}; {last} steps; equal, bitwise; {time.monotonic() - started:.0f} s",
        flush=True,
    )


def copy_of(run: RunFolder, path: Path) -> RunFolder:
    shutil.rmtree(path, ignore_errors=True)
    return RunFolder(Path(shutil.copytree(run.path, path, symlinks=True)))


def check_another_schedule(
    run: RunFolder, shards: Path, commands: Commands, forks: Forks, path: Path, last: int
) -> None:
    """Bests of the attempt that was stopped are not taken for those of the attempt that follows
    it."""
    if not run.saved_step():
        return
    side = copy_of(run, path)
    with start(
        training(shards, side.path, last + PER_ROUND, OTHER_RATE), path.with_suffix(".log"), forks
    ) as job:
        assert job.end(300) == [0], job.output
    check_delivered(side, commands, path.with_suffix(".json"))


def check_divergence(
    run: RunFolder, shards: Path, commands: Commands, forks: Forks, path: Path, last: int
) -> None:
    """An attempt that diverges leaves nothing that the sane one after it would deliver."""
    if not run.saved_step():
        return
    side = copy_of(run, path)
    with start(
        training(shards, side.path, last + PER_ROUND, ABSURD_RATE), path.with_suffix(".log"), forks
    ) as job:
        assert job.end(300) == [1], job.output
        assert "error: step" in job.output, job.output
    with start(
        training(shards, side.path, last + PER_ROUND), path.with_suffix(".log"), forks
    ) as job:
        assert job.end(300) == [0], job.output
    check_delivered(side, commands, path.with_suffix(".json"))
