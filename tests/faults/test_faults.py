"""Every fault of docs/faults.md, made for real: how the run ends, what it says, and that a resume
ends as if nothing had happened.

`pytest tests/faults/test_faults.py -s` prints for each what was seen; the table in docs/faults.md
is written from that.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from dist_vasp.data.stream import StreamOptions, TrainStream
from dist_vasp.signals import INTERRUPTED
from dist_vasp.training.run_dir import RunDir
from tests.support.forks import Forks
from tests.support.jobs import Job, RunFolder, assert_same_run, environment, free_port
from tests.support.make_shards import write_folder
from tests.support.paths import ROOT
from tests.support.sizes import sizes

pytestmark = pytest.mark.slow

N_ITEMS, BATCH, LANES, STEPS_PER_EPOCH, STEPS = 301, 24, 6, 8, 40
ENDLESS = ("--run.max_steps", "100000", "--optimizer.schedule", "[{epochs: 100000, lr: 0.001}]")
STOP_WITHIN_S = (
    25.0  # what section 7 of DESIGN.md and issue 3 promise; a limit here, not a measurement
)


def rows(n: int, seed: int, n_items: int = N_ITEMS) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [
        np.sort(random.choice(n_items, random.integers(2, 20), replace=False)) for _ in range(n)
    ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    heldout = [(row[1:], row[:1]) for row in rows(60, 1)]
    write_folder(
        path, rows(BATCH * STEPS_PER_EPOCH, 0), heldout[:30], heldout[30:], n_items=N_ITEMS
    )
    return path


def training(shards: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of a run of 5 epochs; later ones win."""
    return [
        *("--data.shards", str(shards), "--run.dir", str(run_dir), "--device", "cpu"),
        *(
            "--data.batch_size",
            str(BATCH),
            "--parallel.lanes",
            str(LANES),
            "--run.max_steps",
            str(STEPS),
        ),
        *("--run.checkpoint_every_steps", "4", "--optimizer.schedule", "[{epochs: 9, lr: 0.001}]"),
        *sizes(33, 17, 3, 2),
        *more,
    ]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Starts jobs fast, where the start is not what is tested."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory) -> RunFolder:
    """The run that nothing happens to, on 2 ranks."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with Job(*training(shards, path), log=path.with_suffix(".log")) as job:
        assert job.end() == [0], job.output
    return RunFolder(path)


def ends(job: Job, what: str, within: float = 120.0) -> list[int]:
    """The statuses of the job, and a line that says what was seen."""
    at = time.monotonic()
    statuses = job.end(within)
    said = [
        line
        for line in job.output.splitlines()
        if line.startswith(("error: ", "stopped on request"))
    ]
    print(
        f"\n{what}: status {statuses} after {time.monotonic() - at:.1f} s; " + " | ".join(said),
        flush=True,
    )
    assert "Traceback" not in job.output, job.output
    return statuses


def errors(job: Job) -> list[str]:
    return [line for line in job.output.splitlines() if line.startswith("error: ")]


def wait_for_step(job: Job, run: RunFolder, step: int = 5) -> None:
    job.wait_until(lambda: run.step() >= step, f"step {step}")


def assert_begins_as(run: RunFolder, whole: RunFolder) -> None:
    """The steps that both have made are the same."""
    pairs = list(zip(run.told(), whole.told(), strict=False))
    assert pairs and all(ours == theirs for ours, theirs in pairs)


def resumes(
    arguments: list[str], run: RunFolder, whole: RunFolder, log: Path, forks: Forks
) -> None:
    """The same command goes on, and the end is bitwise that of the run that was left alone."""
    saved = run.saved_step()
    with Job(*arguments, log=log, forks=forks) as job:
        assert job.end() == [0], job.output
        assert saved == 0 or f"(resumed from step {saved})" in job.output
    assert_same_run(run, whole)


# --- asked to stop --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "to", "threads"),
    [
        (signal.SIGTERM, "rank 1", 1),
        (signal.SIGINT, "rank 0", 1),
        (signal.SIGTERM, "all", 2),
        (signal.SIGINT, "all", 1),
        (signal.SIGHUP, "rank 0", 2),
        (signal.SIGHUP, "all", 2),
    ],
)
def test_a_signal_saves_and_stops_every_rank(shards, whole, forks, tmp_path, number, to, threads):
    """Ranks without a launcher, so that each one's status can be seen.

    To all: their loader workers too.
    """
    run = RunFolder(tmp_path / "run")
    variables = {"OMP_NUM_THREADS": str(threads)}
    with Job(
        *training(shards, run.path), log=tmp_path / "log", bare=True, variables=variables
    ) as job:
        wait_for_step(job, run)
        if to == "all":
            job.signal_group(number)
        else:
            job.signal_rank(int(to[-1]), number)
        status = INTERRUPTED if number == signal.SIGINT else 0
        assert ends(job, f"{number.name} to {to}", STOP_WITHIN_S) == [status, status]
        stopped = re.search(
            r"stopped on request after step (\d+) of 40, saved in (.*); the same command",
            job.output,
        )
        assert stopped, job.output
    assert run.saved_step() == run.step() == int(stopped[1])
    if threads == 1:  # as many as the run left alone: sums in the same order
        assert_begins_as(run, whole)
    if (number, to) in ((signal.SIGTERM, "rank 1"), (signal.SIGINT, "all")):
        resumes(training(shards, run.path), run, whole, tmp_path / "again", forks)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_alone(shards, tmp_path, number):
    """It passes TERM and INT on, one rank after another; HUP ends it, and its ranks notice."""
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path, *ENDLESS), log=tmp_path / "log") as job:
        wait_for_step(job, run)
        os.kill(job.group, number)
        statuses = ends(job, f"{number.name} to the launcher", STOP_WITHIN_S)
        assert statuses == [-number if number == signal.SIGHUP else 1]
        assert "stopped on request after step" in job.output
    assert run.saved_step() == run.step()


def test_a_loader_worker_that_is_killed_costs_nothing(shards, whole, forks, tmp_path):
    run = RunFolder(tmp_path / "run")
    with Job(
        *training(shards, run.path, *ENDLESS, "--data.workers", "2"),
        log=tmp_path / "log",
        forks=forks,
    ) as job:
        wait_for_step(job, run, 2)
        for rank in job.ranks():
            os.kill(psutil.Process(rank).children()[0].pid, signal.SIGKILL)
        warning = "was killed by SIGKILL; training continues, and its batches are read without it"
        job.wait_until(lambda: job.output.count(warning) == 2, "both ranks have noticed")
        wait_for_step(job, run, run.step() + 5)
        job.signal_rank(0, signal.SIGTERM)
        assert ends(job, "SIGKILL to a loader worker of each rank") == [0]
    assert_begins_as(run, whole)


@pytest.mark.parametrize(
    ("output", "status"), [("| head -n 1", 0), (">&- 2>&-", 0), ("> /dev/full", 1)]
)
def test_a_training_whose_output_breaks_ends_with_its_result(
    shards, whole, tmp_path, output, status
):
    run = RunFolder(tmp_path / "run")
    words = " ".join(
        map(
            shlex.quote,
            [sys.executable, str(ROOT / "launch" / "train.py"), *training(shards, run.path)],
        )
    )
    line = f"{words} --data.workers 2 {output}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    print(f"\noutput {output}: status {done.returncode}; {done.stderr}")
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((run.path / "result.json").read_text())["test"]["n_users"] > 0


def test_a_signal_to_the_group_with_its_launcher(shards, tmp_path):
    """The ranks do the same; the status is the launcher's own, and not 0 (docs/faults.md)."""
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path), log=tmp_path / "log") as job:
        wait_for_step(job, run)
        job.signal_group(signal.SIGTERM)
        statuses = ends(job, "SIGTERM to launcher and ranks", STOP_WITHIN_S)
        assert statuses != [0]
        assert "stopped on request after step" in job.output
    assert run.saved_step() == run.step() < STEPS


def test_a_stop_during_start_up_is_kept_in_mind(shards, tmp_path):
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path), log=tmp_path / "log", bare=True) as job:
        job.wait_until(lambda: (run.path / ".lock").exists(), "run.dir is taken")
        job.signal_group(signal.SIGTERM)
        assert ends(job, "SIGTERM to all during start-up") == [0, 0]
    assert run.saved_step() == run.step() >= 1, "the stop is seen after a step"


# --- gone without a word --------------------------------------------------------------------------


def named(rank: int) -> str:
    """The one message about a killed rank."""
    return (
        f"error: rank {rank} on {socket.gethostname()} was killed, or its machine is "
        f"gone; start the same command again"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run(shards, forks, tmp_path, rank):
    """The resume is test_kill.py's matter."""
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path), log=tmp_path / "log", forks=forks) as job:
        wait_for_step(job, run)
        job.signal_rank(rank, signal.SIGKILL)
        assert ends(job, f"SIGKILL to rank {rank}", 60) != [0]
        assert errors(job) == [named(rank)], job.output
    assert run.step() - run.saved_step() <= 4 + 2, (
        "lost: at most checkpoint_every_steps and the steps during one write"
    )


@pytest.mark.parametrize(("rank", "after"), [(0, 0.0), (1, 0.3), (0, 1.0), (1, 2.0)])
def test_a_rank_that_dies_during_start_up_ends_the_run(shards, tmp_path, rank, after):
    """DeepSpeed builds its engine then, in collectives that would wait for half an hour.

    No launcher ends the survivor here.
    """
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path), log=tmp_path / "log", bare=True) as job:
        job.wait_until(lambda: (run.path / ".lock").exists(), "run.dir is taken")
        time.sleep(after)
        job.signal_rank(rank, signal.SIGKILL)
        statuses = ends(job, f"SIGKILL to rank {rank}, {after} s into start-up", 15)
        assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1
        assert errors(job) == [named(rank)], job.output


def test_a_rank_that_never_comes_is_not_waited_for_in_silence(tmp_path):
    code = (
        "from dist_vasp.parallel import start\nfrom dist_vasp.commands.ending import "
        "run\nstart._ALL_STARTED_S = 2.0\n"
    )
    code += "run(lambda _: start.init_ranks(device='cpu') and None)"
    env = environment(
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_port()),
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith(
        "error: rank 0 waited 2 s for 2 ranks to start, but some never came"
    ), done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_without_its_launcher_saves_and_ends(shards, whole, tmp_path):
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path, *ENDLESS), log=tmp_path / "log") as job:
        wait_for_step(job, run, 1)
        os.kill(job.group, signal.SIGKILL)
        assert ends(job, "SIGKILL to the launcher", STOP_WITHIN_S) == [-signal.SIGKILL]
        assert "stopped on request after step" in job.output
    assert run.saved_step() == run.step()
    assert_begins_as(run, whole)


def test_a_rank_that_fails_is_named_with_its_error():
    """A bug on one rank: its traceback, then one line; it ends at once, whatever else still runs in
    it."""
    code = "import threading, time\nfrom dist_vasp.commands.ending import run\n"
    code += (
        "def main(_):\n    threading.Thread(target=time.sleep, "
        "args=(600,)).start()\n    [][3]\nrun(main)"
    )
    env = environment(
        RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29677"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith(
        "error: rank 1: IndexError: list index out of range\n"
    )


# --- the disk -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """12 MB of memory as a filesystem; skips where mounting is not allowed."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "none", path], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_leaves_the_last_checkpoint_good(shards, whole, forks, tmp_path, small_disk):
    """Some other program fills the disk to the last byte while the run goes on."""
    run = RunFolder(small_disk / "run")
    with Job(*training(shards, run.path), log=tmp_path / "log", forks=forks) as job:
        job.wait_until(lambda: run.saved_step() > 0, "the first checkpoint")
        with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while shutil.disk_usage(small_disk).free:
                filler.write(b"\0" * (1 << 16))
        assert ends(job, "full disk", 60) == [2]
        said = errors(job)
        assert len(said) == 1, said
        assert re.search(
            r"(GB free but the checkpoint needs|could not be written).*earlier "
            r"checkpoints are good",
            said[0],
        )
    assert not run.saving(), "the half-written checkpoint is gone"
    (small_disk / "filler").unlink()
    resumes(training(shards, run.path), run, whole, tmp_path / "again", forks)


def test_a_write_that_fails_half_way_leaves_the_last_checkpoint_good(
    shards, whole, forks, tmp_path
):
    """The kernel refuses the second half of a file to one rank: RLIMIT_FSIZE of rank 1 falls while
    it runs."""
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path), log=tmp_path / "log", forks=forks) as job:
        job.wait_until(lambda: run.saved_step() > 0, "the first checkpoint")
        psutil.Process(job.ranks()[1]).rlimit(psutil.RLIMIT_FSIZE, (100_000, 100_000))
        assert ends(job, "a write fails half-way on rank 1", 60) == [2]
        assert len(errors(job)) == 1
        assert re.search(
            r"checkpoint .* could not be written \(.*File too large.*\); "
            r".*earlier checkpoints are good",
            errors(job)[0],
        )
    assert not run.saving()
    resumes(training(shards, run.path), run, whole, tmp_path / "again", forks)


def test_a_metrics_file_that_cannot_be_written_says_so(tmp_path):
    run = RunDir(tmp_path / "run")
    run._metrics = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(
        ValueError,
        match=r"metrics\.jsonl could not be written \(No space left on device\).* "
        r"checkpoints are good",
    ):
        run.record({"step": 1}, "train")
    with contextlib.suppress(OSError):
        run._metrics.close()


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cadence", [4, 1])
def test_a_loss_that_is_no_number_names_step_users_and_checkpoint(
    shards, whole, forks, tmp_path, cadence
):
    """The second epoch's learning rate is absurd.

    The weights of its first step are void; saved at every step, they have to go.
    """
    run = RunFolder(tmp_path / "run")
    arguments = training(
        shards, run.path, "--optimizer.schedule", "[{epochs: 1, lr: 0.001}, {epochs: 9, lr: 900.0}]"
    )
    arguments += ["--run.checkpoint_every_steps", str(cadence)]
    with Job(*arguments, log=tmp_path / "log", forks=forks) as job:
        assert ends(job, "a loss that is no number") == [1]
        said = errors(job)
        pattern = (
            r"error: step (\d+): loss (\S+), gradient norm (\S+); the batch holds "
            r"(\d+) users with keys .*"
        )
        pattern += r"\(all in (.*diverged-step-\d+\.json)\); the last good checkpoint is (\S+);"
        named = re.match(pattern, said[0])
        assert len(said) == 1 and named, said
    step = int(named[1])
    assert run.step() == step - 1
    assert Path(named[6]) == run.newest() and 0 < run.saved_step() < step - 1, (
        "a checkpoint whose weights gave a finite loss"
    )
    told = json.loads(Path(named[5]).read_text())
    batch = TrainStream(shards, StreamOptions(BATCH, LANES)).batch(step - 1)
    assert told == {"step": step, "user_keys": sorted({int(key) for key in batch.user_keys})}
    assert int(named[4]) == len(told["user_keys"])
    # the first epoch's checkpoint is as good as ever
    for path in sorted(run.checkpoints.glob("step-*")):
        if path.name > f"step-{STEPS_PER_EPOCH:08d}":
            shutil.rmtree(path)
    assert run.saved_step() <= STEPS_PER_EPOCH
    resumes(training(shards, run.path), run, whole, tmp_path / "again", forks)


# --- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [("trunk.safetensors", "flipped"), ("items-00001-of-00002.safetensors", "truncated")],
)
def test_a_damaged_checkpoint_is_named_before_training(
    shards, whole, forks, tmp_path, name, damage
):
    run = RunFolder(Path(shutil.copytree(whole.path, tmp_path / "run", symlinks=True)))
    newest = run.newest()
    assert newest is not None
    file, told = newest / name, run.metrics.read_bytes()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data if damage == "flipped" else data[:-100])
    arguments = training(shards, run.path, "--run.max_steps", str(STEPS + 4))
    with Job(*arguments, log=tmp_path / "log", forks=forks) as job:
        assert ends(job, f"{name} {damage}") == [2]
        assert len(errors(job)) == 1
        assert re.search(
            rf"{re.escape(str(file))} has SHA-256 .*checkpoint\.json says .*remove this checkpoint",
            errors(job)[0],
        )
    assert run.metrics.read_bytes() == told, "training had gone on"
    if damage == "flipped":  # the way out that the message names
        shutil.rmtree(newest)
        resumes(training(shards, run.path), run, whole, tmp_path / "again", forks)


def test_a_shard_that_changes_under_a_run_is_noticed(shards, whole, forks, tmp_path):
    run, copy = RunFolder(tmp_path / "run"), Path(shutil.copytree(shards, tmp_path / "shards"))
    victim = copy / "train-000003.tar"
    good = victim.read_bytes()
    with Job(*training(copy, run.path), log=tmp_path / "log", forks=forks) as job:
        wait_for_step(job, run, 2)
        other = copy / ".other"
        other.write_bytes(good[:3000] + b"\x01" + good[3001:])
        os.replace(other, victim)
        assert ends(job, "a shard is replaced", 60) == [2]
        assert any(
            re.search(
                r"rank \d: .*train-000003\.tar .*it was damaged or replaced; restore it", line
            )
            for line in errors(job)
        )
    assert run.step() < STEPS
    victim.write_bytes(good)
    resumes(training(copy, run.path), run, whole, tmp_path / "again", forks)


# --- two runs, one folder -------------------------------------------------------------------------


def test_a_second_run_into_one_folder_is_refused(shards, whole, forks, tmp_path):
    run = RunFolder(tmp_path / "run")
    with Job(*training(shards, run.path, *ENDLESS), log=tmp_path / "log", forks=forks) as first:
        wait_for_step(first, run, 1)
        with Job(
            *training(shards, run.path, *ENDLESS), log=tmp_path / "second", forks=forks
        ) as second:
            assert ends(second, "a second run into the same run.dir") == [2]
            said = errors(second)
            assert len(said) == 1 and re.search(
                r"run\.dir .* is in use by process \d+ on \S+; wait for it to end", said[0]
            ), said
        first.signal_rank(0, signal.SIGTERM)
        assert first.end() == [0], "the first run was disturbed"
    assert_begins_as(run, whole)


# --- growth ---------------------------------------------------------------------------------------


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight of a checkpoint, whole."""
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted(checkpoint.glob("items-*.safetensors")):
        for key, tensor in load_file(file).items():
            name, lo = key[: key.index("[")], int(key[key.index("[") + 1 : key.index(":")])
            pieces.setdefault(name, []).append((lo, tensor))
    items = {
        name: torch.cat(
            [tensor for _, tensor in sorted(parts, key=lambda p: p[0])], dim=int("nease" in name)
        )
        for name, parts in pieces.items()
    }
    everything = items | {
        f"trunk.{name}": tensor
        for name, tensor in load_file(checkpoint / "trunk.safetensors").items()
    }
    return {
        name: tensor
        for name, tensor in everything.items()
        if not name.endswith((".exp_avg", ".exp_avg_sq"))
    }


def test_a_grown_catalogue_keeps_what_is_known(whole, forks, tmp_path):
    """A larger vocabulary in another order; a learning rate of 0 shows the weights that training
    would start from."""
    grown, n_new, rng = tmp_path / "grown", 340, np.random.default_rng(5)
    ids = rng.permutation(
        np.concatenate([1000 + np.arange(10, N_ITEMS), 5000 + np.arange(n_new - (N_ITEMS - 10))])
    )  # 10 are gone
    write_folder(
        grown, rows(BATCH * STEPS_PER_EPOCH, 3, n_new), n_items=n_new, item_ids=ids.tolist()
    )
    first_step = ("--run.max_steps", "1", "--optimizer.schedule", "[{epochs: 1, lr: 0.0}]")
    runs = {"fresh": [], "grown": ["--init_from", str(whole.path)]}
    for name, more in runs.items():
        with Job(
            *training(grown, tmp_path / "runs" / name, *first_step, *more),
            log=tmp_path / f"{name}.log",
            ranks=3,
            forks=forks,
        ) as job:
            assert ends(job, f"{name} on {n_new} items") == [0]
    fresh, found = (
        tensors(tmp_path / "runs" / name / "checkpoints" / "step-00000001") for name in runs
    )
    old = tensors((whole.checkpoints / "best").resolve())
    assert found.keys() == old.keys() == fresh.keys()

    new_ids = pq.read_table(grown / "items.parquet")["id"].to_numpy()
    assert (new_ids == ids).all()
    known, row = torch.from_numpy(new_ids < 5000), torch.from_numpy(new_ids - 1000)
    assert int(known.sum()) == N_ITEMS - 10
    for name, tensor in found.items():
        if name == "output.nease.weight":
            both = known[:, None] & known[None, :]
            expected = torch.where(
                both,
                old[name][row.clamp(max=N_ITEMS - 1)][:, row.clamp(max=N_ITEMS - 1)],
                fresh[name],
            )
            assert tensor.shape == (n_new, n_new) and torch.diagonal(tensor).count_nonzero() == 0
        elif name.startswith("trunk."):
            expected = old[name]
        else:
            expected = fresh[name].clone()
            expected[known] = old[name][row[known]]
        assert torch.equal(tensor, expected), name
