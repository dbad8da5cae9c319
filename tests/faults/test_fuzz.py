"""Mutated shards and checkpoints: every one is detected with exit status 2 and one line, or is a
change of values that trains on.

The cases are pure functions of their seeds, which count from 0: a failure is repeated with `python
-m tests.support.fuzz_server BASE SEED SEED+1`, where BASE is what `make_base` writes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools import shard
from tests.support.fuzz_files import CANARY, mutate, target
from tests.support.fuzz_server import arguments, commands, judge
from tests.support.jobs import environment, free_port
from tests.support.make_shards import write_folder
from tests.support.paths import PYTHONPATH, ROOT

SERVERS = 2
N_ITEMS = 60


def launch(
    script: str, *argv: str, ranks: int = 0, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks:
        launcher = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_accelerators",
            str(ranks),
        ]
        launcher += ["--master_port", str(free_port())]
    module = (
        ["-m", "data_tools.verify"]
        if script == "verify"
        else [str(ROOT / "launch" / f"{script}.py")]
    )
    env = environment(PYTHONPATH=PYTHONPATH)
    return subprocess.run(
        [*launcher, *module, *argv],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def make_base(folder: Path) -> Path:
    """Sound shards, histories, and a run of each kind that stopped after two steps; the one with a
    trunk on two ranks."""
    random = np.random.default_rng(0)
    popular = np.arange(N_ITEMS, 0, -1) / np.arange(N_ITEMS, 0, -1).sum()
    rows = [
        np.sort(random.choice(N_ITEMS, random.integers(5, 15), replace=False, p=popular))
        for _ in range(76)
    ]
    (folder / "histories.csv").write_text(
        "user,item\n" + "".join(f"{u},{1000 + i}\n" for u in range(76) for i in rows[u])
    )
    sizes = ["--users_per_shard", "20", "--val_users", "8", "--test_users", "8"]
    assert shard.main([str(folder / "histories.csv"), str(folder / "shards"), *sizes]) == 0
    for kind, ranks in (("vasp", 2), ("nease", 0)):
        done = launch("train", *arguments(folder, folder / kind, kind, 2), ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        shutil.rmtree(folder / kind / "tensorboard")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("fuzz"))


def test_a_mutation_is_a_function_of_its_seed(tmp_path):
    write_folder(
        tmp_path / "base" / "shards", [[u % 7, 7 + u % 5] for u in range(20)], n_items=N_ITEMS
    )
    for seed in [seed for seed in range(100) if target(seed)[0].startswith("shards/")][:30]:
        found = []
        for name in ("a", "b"):
            folder = tmp_path / f"{name}{seed}"
            shutil.copytree(tmp_path / "base", folder)
            found.append(
                (
                    mutate(seed, folder),
                    [p.read_bytes() for p in sorted((folder / "shards").iterdir())],
                )
            )
        assert found[0] == found[1], seed


@pytest.mark.slow
def test_mutated_files(base, request, tmp_path, capsys):
    n = request.config.getoption("--fuzz")
    servers = []
    for first in range(SERVERS):
        argv = [
            sys.executable,
            "-m",
            "tests.support.fuzz_server",
            str(base),
            str(first),
            str(n),
            str(SERVERS),
        ]
        output = open(tmp_path / f"{first}.jsonl", "w")  # noqa: SIM115 - the server's
        servers.append(subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=output))
    try:
        assert [server.wait(timeout=60 + 6 * n) for server in servers] == [0] * SERVERS
    finally:
        for server in servers:
            server.kill()
            server.wait()
    cases = [
        json.loads(line)
        for first in range(SERVERS)
        for line in (tmp_path / f"{first}.jsonl").read_text().splitlines()
    ]
    assert len(cases) == n
    failed = [
        case
        for case in cases
        if any(outcome.startswith("FAILED") for outcome in case["results"].values())
    ]
    with capsys.disabled():
        print("\n" + figures(cases))
    assert not failed, "\n".join(map(str, failed[:20]))


def figures(cases: list[dict]) -> str:
    """A case counts as what its most severe command said: a checksum, a parser, a loss that is not
    finite, or nothing."""
    order = ["checksum", "parser", "diverged", "went on"]
    worst = [
        (case["vouched"], min(case["results"].values(), key=order.index))
        for case in cases
        if known(case, order)
    ]
    lines = [f"{len(cases)} mutated files"]
    for vouched in (False, True):
        counts = Counter(outcome for v, outcome in worst if v == vouched)
        told = ", ".join(f"{counts[o]} {o}" for o in order)
        lines.append(
            f"checksum {'made right' if vouched else 'left alone'}: "
            f"{sum(counts.values())} files: {told}"
        )
    return "\n".join(lines)


def known(case: dict, order: list[str]) -> bool:
    return set(case["results"].values()) <= set(order)


@pytest.mark.slow
def test_mutated_files_on_the_command_line(base, tmp_path):
    """A few of them as a user meets them: a fresh interpreter, exit status 2, one line."""
    seen: Counter[str] = Counter()
    for seed in range(200):
        folder = tmp_path / str(seed)
        shutil.copytree(base, folder, symlinks=True)
        mutation = mutate(seed, folder)
        kind = f"{mutation.run} {mutation.kind}"
        script, argv = commands(seed, folder, mutation.file, mutation.run)[0]
        if seen[kind] or not mutation.vouched:
            continue
        seen[kind] += 1
        done = launch(script, *argv, cwd=folder)
        outcome = judge(script, done.returncode, done.stderr, 0, 0)
        assert outcome in ("checksum", "parser", "went on"), (seed, mutation, outcome)
        assert not (folder / CANARY).exists()
        if sum(seen.values()) == 10:
            break
