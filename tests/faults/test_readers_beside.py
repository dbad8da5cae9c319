"""Readers beside a training that saves a best checkpoint with every step: none is wrong, none
fails.

`pytest tests/faults/test_readers_beside.py --loads 200 -m slow -s` reads more often, through the
commands too.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dist_vasp import Recommender
from tests.support.invoke import Commands
from tests.support.paths import ROOT
from tests.support.sizes import sizes

# A training whose every evaluation is the best so far: a best checkpoint a step.
ALWAYS_BETTER = """
import itertools, sys
from dist_vasp.ranking.metrics import RankingMetrics
found = RankingMetrics.result
count = itertools.count()
RankingMetrics.result = lambda self: {**found(self), "recall@20": next(count)}
from launch.train import main
main([*sys.argv[1:], "--run.best_by", "recall@20"])
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("beside")
    commands = Commands(folder)
    commands.succeed(
        "python -m data_tools.synthesize data.parquet --users 80 --items 40 "
        "--interactions 1500 --seed 1",
        "python -m data_tools.shard data.parquet shards --val_users 10 "
        "--test_users 10 --users_per_shard 64",
    )
    return folder / "shards"


class Training:
    """A training beside the readers, as a process of its own."""

    def __init__(self, shards: Path, run: Path) -> None:
        model = sizes(8, 4, 2, 1)
        options = [
            "--data.shards",
            str(shards),
            "--run.dir",
            str(run),
            "--device",
            "cpu",
            "--data.workers",
            "0",
        ]
        options += [
            "--data.batch_size",
            "64",
            "--parallel.lanes",
            "4",
            "--optimizer.schedule",
            "[{epochs: 1000000, lr: 1.0e-4}]",
        ]
        self.run, self.log = run, open(run.with_suffix(".log"), "w")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                ALWAYS_BETTER,
                *model,
                *options,
                "--run.checkpoint_every_steps",
                "7",
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "best").exists():
            assert self._process.poll() is None and time.monotonic() < deadline, run.with_suffix(
                ".log"
            ).read_text()
            time.sleep(0.05)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(120)
        self.log.close()
        assert self._process.returncode == 0, self.run.with_suffix(".log").read_text()[-2000:]

    def validation(self) -> dict[int, float]:
        """NDCG@100 by step, as the training has recorded it."""
        lines = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["ndcg@100"] for line in lines if "loss" not in line}


@pytest.mark.slow
def test_a_recommender_is_of_one_checkpoint(shards, tmp_path, pytestconfig):
    loads = pytestconfig.getoption("loads") or 15
    with Training(shards, tmp_path / "run") as training:
        steps = []
        for verify in [True, False] * (loads // 2 + 1):
            r = Recommender.load(training.run, verify=verify)
            steps.append(r.sources.members[0].opened.step)
            before = r.recommend([[1, 2, 3]], 5)
            check_digests(r)
            assert np.array_equal(before.scores, r.recommend([[1, 2, 3]], 5).scores)
    print(
        f"{len(steps)} loads, of {len(set(steps))} checkpoints, steps {min(steps)} to {max(steps)}"
    )


def check_digests(r: Recommender) -> None:
    """What is mapped is what the header says, to the last byte."""
    for name, digest in r.sources.members[0].opened.header.files.items():
        handle = r.sources.members[0].opened.handles[name]
        handle.seek(0)
        assert hashlib.file_digest(handle, "sha256").hexdigest() == digest
    items = r.sources.members[0].opened.header.files["items-00000-of-00001.safetensors"]
    (file,) = r.sources.members[0].model.model.storage.files
    assert hashlib.sha256(file._pages[:]).hexdigest() == items


@pytest.mark.slow
def test_commands_beside_a_training(shards, tmp_path, pytestconfig):
    """evaluate, recommend and the Recommender in turn; evaluate's figure is the one that the
    training had for that step."""
    loads = pytestconfig.getoption("loads") or 24
    (tmp_path / "histories.csv").write_text("user,item\na,1\na,2\nb,3\n")
    kinds = {"evaluate": 0, "recommend": 0, "Recommender": 0}
    start, wrong = time.monotonic(), []
    commands = Commands(tmp_path)
    with Training(shards, tmp_path / "run") as training:
        first = max(training.validation(), default=0)
        for load in range(loads):
            kind = list(kinds)[load % 3]
            kinds[kind] += 1
            if kind == "evaluate":
                done = commands.run(
                    "python launch/evaluate.py --run run --split validation "
                    "--json e.json --device cpu"
                )
                if done.status == 0:
                    at = int(done.out.split("best-")[1].split()[0])
                    figure = json.loads((tmp_path / "e.json").read_text())["validation"]["ndcg@100"]
                    if figure != training.validation()[at]:
                        wrong.append(
                            f"evaluate of step {at}: {figure}, expected {training.validation()[at]}"
                        )
                (tmp_path / "e.json").unlink(missing_ok=True)
            elif kind == "recommend":
                line = (
                    "python launch/recommend.py --run run --histories histories.csv "
                    "--output lists.csv --k 3 --device cpu"
                )
                done = commands.run(line + " --overwrite")
                if done.status == 0:
                    rows = list(csv.DictReader((tmp_path / "lists.csv").read_text().splitlines()))
                    if [row["rank"] for row in rows] != ["1", "2", "3"] * 2:
                        wrong.append(f"recommend: {rows}")
            else:
                done = commands.run("len(Recommender.load('run').recommend([[1, 2]], 3).ids[0])")
                if done.out.strip() != "3":
                    wrong.append(f"Recommender: {done.out}")
            if done.status:
                wrong.append(f"{kind}: status {done.status}: {done.err}")
        evaluations = {at: 0 for at in training.validation() if at > first}
        seconds = time.monotonic() - start
    print(
        f"{kinds}: {len(wrong)} wrong or failing; {len(evaluations)} best "
        f"checkpoints meanwhile, {len(evaluations) / seconds:.1f} a second"
    )
    assert not wrong, "\n".join(wrong)
